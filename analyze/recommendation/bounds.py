"""How large means over further sequences may be: for many heads at once, from few sequences.

Student's prediction bound of the mean of a new sample (Hahn and Meeker, Statistical Intervals,
section 4.8), in proportion to the mean: with n sequences of mean m and standard deviation s, the
mean of n' others is above

    m * exp(t * (s / m) * sqrt(1 / n + 1 / n'))

with the probability that t, of n - 1 degrees of freedom, is chosen for. For H heads that is a part
in H of what all of them may miss with (Bonferroni), so that t is taken far out, where it is huge
for few degrees of freedom. Heads are many, though, and vary alike in proportion to their means:
each head's (s / m)^2 is drawn towards what the others have, as far as they agree, and gains the
degrees of freedom that they lend (Smyth, Linear Models and Empirical Bayes Methods for Assessing
Differential Expression in Microarray Experiments, 2004, sections 3 and 6.2).
"""

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

Array = npt.NDArray[np.float64]

CONFIDENCE = 0.95
ENOUGH = 4
"""Sequences from which on the bounds are kept as often as they say; of fewer, what the heads lend
each other is not known well enough."""

ASSUMES = (
    "95 % is for texts of one kind, and heads whose losses vary alike from text to text in "
    "proportion to their means. In simulations of 90 heads all bounds hold together in 95 % of "
    "trials then, in 88 to 92 % where heads vary unlike, in 77 to 82 % where one text in 20 is "
    "three times as hard, and in 31 % where one in 50 is twice as hard for each head by itself."
)
"""What the bounds of all heads together take for granted, and how they fail without it."""


def upper_bounds(values: Array, counts: Array, new_counts: Array) -> Array:
    """Bounds (heads,) that the heads' means over new sequences all keep with `CONFIDENCE`.

    Args:
        values: each sequence's mean of something that is 0 at best (heads, sequences).
        counts: how many queries that is of (heads, sequences), 0 where a sequence has none.
        new_counts: those of the new sequences (heads, new sequences).

    Returns:
        NaN where there are fewer than two sequences, or no new one.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        sequences, total = (counts > 0).sum(axis=1), counts.sum(axis=1)
        mean = (counts * values).sum(axis=1) / total
        squares = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
        relative = squares / mean**2 * sequences / (sequences - 1)
        relative[mean == 0] = 0
        # Sequences weigh as many queries as they have: 1 / n and 1 / n' where these are equal.
        shares = (counts**2).sum(axis=1) / total**2
        shares += (new_counts**2).sum(axis=1) / new_counts.sum(axis=1) ** 2
        relative, freedom = moderated(relative, sequences - 1.0)
        reach = stats.t.ppf(1 - (1 - CONFIDENCE) / len(mean), freedom)
        bounds: Array = mean * np.exp(reach * np.sqrt(relative * shares))
    return bounds


def moderated(variances: Array, freedom: Array) -> tuple[Array, Array]:
    """Variances (any,) of so many degrees of freedom, drawn towards each other, and the degrees of
    freedom they have then.

    The true ones are taken to be as if s0^2 d0 / chi^2 of d0 degrees of freedom; d0 and s0 are such
    that logarithms have the mean and variance that they have. What does not vary at all has no part
    in it.
    """
    known = variances > 0
    if known.sum() < 2:
        return variances, freedom
    own = freedom[known]
    logs = np.log(variances[known]) - special.digamma(own / 2) + np.log(own / 2)
    apart = logs.var(ddof=1) - special.polygamma(1, own / 2).mean()
    # Of as many degrees of freedom as all have together, it is one variance.
    most = own.sum()
    lent = most
    if apart > special.polygamma(1, most / 2):
        lent = 2 * optimize.brentq(lambda d: special.polygamma(1, d) - apart, 1e-6, most)
    prior = np.exp(logs.mean() + special.digamma(lent / 2) - np.log(lent / 2))
    drawn, total = variances.copy(), freedom.copy()
    drawn[known] = (lent * prior + own * variances[known]) / (lent + own)
    total[known] = np.minimum(lent + own, most)
    return drawn, total
