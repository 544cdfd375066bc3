"""What a method is: one small frozen dataclass, at the lowest of the levels that fits it.

1. `ScoreMethod` scores keys (or pages of keys); pooling over heads, always-kept keys, budgets,
   causality, output and metrics are the engine's. `EvictionMethod` is the kind that scores keys
   once, whatever the queries since.
2. `SearchMethod` returns ranked key ids, as an index does.
3. `AttendMethod` computes the output itself.

`BlockMethod` is the level of prefill, in which blocks of queries share the keys that they attend,
and `PolicyMethod` leaves each kv head to a method of another level.

The fields of the dataclass are the method's hyperparameters, with the published defaults; each of
them can be set in a spec (`quest:page=32`). A method keeps nothing between calls: what `build`
returns is handed back to every later call as `state`. All queries that a method meets are scaled as
the layer scales them, so that their products with keys are logits (before a softcap).

Shapes and dtypes are types, in the words of jaxtyping: `Float32[Tensor, "keys channels"]`. `#group`
is the group or one for all of it, and `Float` and `Real` are any floating and any number.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Float32, Int64, Real
from torch import Tensor

from retrace.analyze.methods.hooks import calling, numbers
from retrace.analyze.methods.options.budget import Budget
from retrace.analyze.methods.options.cache import Cache
from retrace.analyze.methods.options.keep import Keep
from retrace.analyze.methods.options.merge import RULES as MERGE_RULES
from retrace.analyze.methods.options.pooling import RULES
from retrace.analyze.optional import optional
from retrace.analyze.units.past import Past, last_of
from retrace.analyze.units.unit import HeadGroup
from retrace.traces import LayerRules, RetraceError

Learns = Literal["kv head", "layer", "model"]
Looks = Literal["block", "end"]
LearnedLike = Mapping[str, tuple[torch.dtype, tuple[int | None, ...]]]
"""Dtype and sizes of learned tensors by name; None where a size depends on the data."""

CACHE = {
    "help": "what cached keys and values are held in, such as fp8, int4:32 or k:int4:32+v:fp8; all "
    "formats: docs/caches.md"
}
POOL = {"help": "how heads agree on one selection", "choices": RULES}
KEEP = {
    "help": "keys always attended, within the budget: sink:4+recent:64, recent:0.25k for a share "
    "of it, recent:0.5r of what sinks leave, sink:32<0.25k for at most a share"
}
BUDGET = {"help": "which of the k best: k, fraction:0.25, top-p:0.95 or threshold:2.5"}
MERGE = {
    "help": "what is dropped under decode:R goes into what is kept: d2o, keys and values into "
    "those of the most similar key; cam, values into those of the next keys",
    "choices": MERGE_RULES,
}
OUTPUT = {
    "help": "renorm; mean-fill: the mean value in place of what was left out; true-denominator: "
    "divided by the sum over all visible keys",
    "choices": ("renorm", "mean-fill", "true-denominator"),
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to find the keys that matter. Not used directly: see the levels below."""

    source: ClassVar[str] = ""
    """The paper or library that the method comes from."""
    extra: ClassVar[str | None] = None
    """Name of the optional dependency that it needs, as in `retrace-attention[faiss]`."""
    install: ClassVar[str | None] = None
    """The command that installs that, where an extra cannot."""
    holds_keys: ClassVar[bool | None] = None
    """Whether finding reads every key in full, so that the selected ones are there already: True is
    charged for all keys, unless `aux_bytes` says otherwise, and False for nothing but what is
    selected. A method that says neither this nor `aux_bytes` is told apart: its index is not
    charged."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Files and folders that figures depend on besides code, such as weights, from the folder of
    the class's own file on: where one of them has changed, what is kept is computed again. A
    property, where parameters name them. What the file imports counts without being named."""
    across_layers: ClassVar[bool] = False
    """Whether `build` reads layers below its own."""
    in_turn: ClassVar[bool] = False
    """Whether the answer to a query follows from what was selected for those before it: the trace
    must have all of them. `build` finds them in its past, and works out what they selected, so the
    answer to a query is the same whichever others it is asked with."""
    learns: ClassVar[Learns] = "kv head"
    """What `calibrate` is asked for once: each kv head, each layer, given its first kv head, or the
    model, given the first of its first recorded layer. The others are found through the Past."""
    complete: ClassVar[bool] = False
    """Whether a budget of all visible keys attends all of them."""

    cache: Cache | None = field(default=None, metadata=CACHE)

    @property
    def fitted(self) -> bool:
        """Whether `build` fits to what it is given (a basis, clusters, a graph), rather than
        keeping one quantity per key. A fitted state is built from what comes before the query."""
        return False

    @property
    def calibrated(self) -> bool:
        """Whether `build` needs what `calibrate` gives."""
        return False

    @property
    def reads_all_keys(self) -> bool | None:
        """What `holds_keys` says."""
        return self.holds_keys

    @property
    def charged(self) -> bool:
        """Whether the method says what finding its keys reads."""
        hooks = (type(self).aux_bytes, type(self).aux_bytes_at)
        says = hooks != (Method.aux_bytes, Method.aux_bytes_at)
        return self.reads_all_keys is not None or says

    def __post_init__(self) -> None:
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata.get("least", 1)
            if type(value) is int and value < least:
                raise RetraceError(f"{f.name}={value}: expected at least {least}.")
            choices = f.metadata.get("choices", ())
            if choices and value not in choices:
                raise RetraceError(f"{f.name}={value!r}: expected one of {', '.join(choices)}.")

    def at(self, k: int) -> Self:
        """What the method is under a budget of k keys, with the same state: constants that are
        published for large budgets may have to be smaller for small ones.

        Raises:
            RetraceError: it is not defined for so few.
        """
        return self

    @classmethod
    def install_command(cls) -> str | None:
        """The command that installs the optional dependency; None where there is none."""
        return cls.install or (cls.extra and f"pip install 'retrace-attention[{cls.extra}]'")

    @classmethod
    def is_installed(cls) -> bool:
        """Whether the optional dependency is there."""
        return cls.extra is None or importlib.util.find_spec(cls.extra) is not None

    @classmethod
    def library(cls, module: str | None = None) -> Any:
        """The optional dependency, or a module of it.

        Raises:
            RetraceError: it is not installed.
        """
        assert cls.extra is not None
        return optional(module or cls.extra, cls.install_command() or "")

    def calibrate(self, pasts: Sequence[Past]) -> dict[str, Tensor]:
        """Learn from whole sequences, which no method of the run is then evaluated on. Gradients
        work.

        Args:
            pasts: one for each sequence, of the same layer and kv head (`learns` says which).

        Returns:
            Tensors by name, which `build` finds as `past.calibration`, on its device.
        """
        raise NotImplementedError(f"{type(self).__name__} is calibrated and must define this.")

    def learned_like(self, rules: LayerRules, layers: int) -> LearnedLike | None:
        """What `calibrate` gives, ahead: of what is kept beside the trace, what is different is
        learned anew.

        Args:
            rules: those of the layer.
            layers: how many the trace has.

        Returns:
            Dtype and sizes by name; None where nothing is known.
        """
        return None

    def build(self, past: Past) -> Any:
        """Make the state that answers queries.

        Args:
            past: keys and values (keys, channels) of one kv head and its queries (group, queries,
                channels), on the device that queries will be on. A method that is not fitted is
                handed a whole sequence, and each query's future is hidden when its scores come
                back: what it keeps of a key must depend on that key and earlier ones.

        Returns:
            Anything but None; tensors in it count as bytes of the state. By default the past.
        """
        return past

    def build_each(self, pasts: Sequence[Past]) -> Sequence[Any]:
        """Make the states of several pasts, where one pass over the keys or common steps on a GPU
        take less than each alone.

        Args:
            pasts: of kv heads of one layer and sequence, which all have pasts with the same ends;
                those of a head from the shortest to the longest.

        Returns:
            What `build` gives for each, but for rounding.
        """
        return [self.build(past) for past in pasts]

    def extend(self, state: Any, new: Past) -> Any:
        """Add later keys to a fitted state, by the method's own update rule.

        Args:
            state: what `build` or this gave last; it may be changed and handed back.
            new: the keys that join. While a model decodes, its keys grow: a state that looks back
                at keys or values keeps `new.whole`, since the past that it was built from does not
                hold later ones.

        Returns:
            The state from then on.
        """
        raise NotImplementedError(f"{type(self).__name__} is fitted and must define extend().")

    def aux_bytes(
        self, state: Any, keys: Int64[Tensor, "queries"], group: HeadGroup
    ) -> Real[Tensor, "queries"] | float:
        """Bytes that finding keys reads of the state, once for a query's whole group.

        Args:
            state: what answers the queries.
            keys: how many keys each query sees.
            group: the kv head, its layer's rules, and the bytes of a key and a value as served.

        Returns:
            Bytes, or a number for all queries: finite, and not negative. By default all keys, in a
            method that `holds_keys`, else nothing.
        """
        return keys * group.key_bytes if self.reads_all_keys else 0.0

    def aux_bytes_at(
        self,
        state: Any,
        positions: Int64[Tensor, "queries"],
        keys: Int64[Tensor, "queries"],
        group: HeadGroup,
    ) -> Real[Tensor, "queries"] | float:
        """The same of the queries at some positions, where what is read differs from one to
        another by more than the keys that each sees. By default it does not."""
        return self.aux_bytes(state, keys, group)

    def reads_cache(self, state: Any, group: HeadGroup) -> bool:
        """Whether `aux_bytes` counts every visible key of the model's own cache, read in full, and
        not what the method keeps beside it.

        It tells them apart in layers whose heads share one cache (`rules.cached_bytes`), which is
        then read once for all. By default in a method that `holds_keys`.
        """
        return bool(self.reads_all_keys)

    def attended_bytes(self, group: HeadGroup) -> float:
        """Bytes of one attended key and its value, read once for all heads of the group that attend
        it. A method that says so itself keeps keys and values of its own in place of the cache."""
        return group.value_bytes + (0 if self.reads_all_keys else group.key_bytes)


@dataclass(frozen=True, kw_only=True)
class ScoreMethod(Method):
    """A method that scores every visible key, or every page of keys."""

    complete: ClassVar[bool] = True
    keeps_new: ClassVar[bool] = False
    """Whether keys since a fitted state was built are all attended, besides the budget: they are
    not scored, and `extend` is never called."""

    pool: str = field(default="none", metadata=POOL)
    keep: Keep = field(default=Keep(), metadata=KEEP)
    budget: Budget = field(default=Budget(), metadata=BUDGET)
    output: str = field(default="renorm", metadata=OUTPUT)

    def scores(
        self,
        state: Any,
        queries: Float32[Tensor, "group queries channels"],
        positions: Int64[Tensor, "queries"],
    ) -> Float[Tensor, "group queries units"]:
        """Estimate how much each key, or page of keys, is worth to each query.

        Args:
            state: what `build` or `extend` gave; do not change it.
            queries: of the group; with `pool=mean-query` that is one.
            positions: of the queries, ascending.

        Returns:
            Units are keys, or pages where `unit_size` is more than 1, from the sequence's first to
            at least the one at the last of `positions`. Higher is better, and -inf is never
            attended. Units that a query does not see may hold anything but NaN. Where scores
            estimate logits, a budget by mass or threshold, a softmax in pooling and mean fill mean
            what they say.
        """
        raise NotImplementedError

    @property
    def unit_size(self) -> int:
        """Keys in one unit of selection: 1, or a page's."""
        return 1

    @property
    def fixed(self) -> bool:
        """Whether the method is the same under every budget, so that `at` gives itself."""
        return type(self).at is Method.at

    @property
    def nested(self) -> bool:
        """Whether what a budget attends a larger one does too, so that one list holds all."""
        if not self.fixed or self.keep.sink_most is not None:
            return False
        given_alone = type(self).allowance is ScoreMethod.allowance and self.budget.rule == "k"
        # Those that are kept have no part in a softmax.
        alike = given_alone and self.unit_size == 1 and not self.pool.endswith("softmax")
        return alike or not self.keep.grows

    def units(self, k: int) -> int:
        """How many units a budget of k keys buys."""
        return max(1, k // self.unit_size)

    def attends_all(self, group: HeadGroup) -> bool:
        """Whether the layer of a kv head attends all visible keys whatever the budget: some methods
        leave layers dense, or find keys there by full attention."""
        return False

    def evicted(self, state: Any, end: int) -> Bool[Tensor, "keys"] | None:
        """Which of the keys before `end` are gone for good, so that not even `keep`
        brings them back; None where none is."""
        return None

    def allowance(
        self, state: Any, ks: Int64[Tensor, "budgets 1 1"]
    ) -> Int64[Tensor, "budgets #group 1"]:
        """How many keys each head may attend at budgets `ks`, ascending, where heads or layers
        share one: of each head of the group, or one number for all, which never fall from one
        budget to the next. Recall still counts a head's k best keys only."""
        return ks


@dataclass(frozen=True, kw_only=True)
class EvictionMethod(ScoreMethod):
    """A method that keeps the k most important keys of a past, whatever the queries since.

    They are chosen once, at the past's end, among the keys that the next query sees, and what is
    not chosen is gone: sinks and recent keys that `keep` names are those of the past. Keys since
    then are all attended besides the k, and charged for: what a budget comes to is its `density`.
    Under the protocol `prefix:P` the past ends at P. Under `all` every rebuilding is the end of a
    past of its own, with all keys there as before a model reads its prompt, and on average half of
    the R positions between two of them are attended besides. Under `decode:R:from=P` the past is
    judged at P and every R positions later: then it is what was left before, followed by the keys
    and queries since, whose positions count as if nothing had been between them
    (`past.in_sequence` tells the real ones).
    """

    fitted: ClassVar[bool] = True
    keeps_new: ClassVar[bool] = True
    holds_keys: ClassVar[bool | None] = False

    merge: str = field(default="none", metadata=MERGE)

    @property
    def accumulates(self) -> bool:
        """Whether importance adds up over time, so that under `decode:R` that of a key which is
        left is what it had before and what has come since; only of a `build` that gives no more
        than importance."""
        return False

    def importance(self, past: Past) -> Float[Tensor, "keys"] | Float[Tensor, "group keys"]:
        """Say how much each key is worth to all later queries.

        Args:
            past: what ends where the choice is made.

        Returns:
            One number per key, or per head and key where heads of a group differ.
        """
        raise NotImplementedError

    def build(self, past: Past) -> Float[Tensor, "#group keys"]:
        """The importance of each key."""
        with calling("importance()", lambda: last_of(past)):
            importance = self.importance(past)
        importance = numbers(importance, "importance()", lambda: last_of(past), past.keys)
        keys, heads = len(past.keys), past.group.rules.group
        if importance.shape not in ((keys,), (1, keys), (heads, keys)):
            raise RetraceError(
                f"importance() gave shape {tuple(importance.shape)} at {last_of(past)}; expected "
                f"(keys,) or (group, keys) = {(heads, keys)}."
            )
        return importance.reshape(-1, keys)

    def scores(
        self,
        state: Float[Tensor, "#group keys"],
        queries: Float32[Tensor, "group queries channels"],
        positions: Int64[Tensor, "queries"],
    ) -> Float[Tensor, "group queries units"]:
        """The same for every query."""
        return state[:, None].expand(*queries.shape[:2], -1)


@dataclass(frozen=True, kw_only=True)
class SearchMethod(Method):
    """A method that answers with key ids, as a vector index does.

    Its state holds keys up to some position; the few that came since are searched exactly. In a
    layer with a window or chunks it is built anew as these move, from keys that are all visible:
    its past then begins with the first of them, as if the sequence did, and so do the ids.
    """

    fitted: ClassVar[bool] = True
    incremental: ClassVar[bool] = False
    """Whether adding keys run by run gives what building from all of them would: such an index
    only grows and is never rebuilt."""

    step: int = field(
        default=32,
        metadata={"help": "keys that join the index together; those since are searched exactly"},
    )

    def search(
        self, state: Any, queries: Float32[Tensor, "group queries channels"], k: int
    ) -> Int64[Tensor, "group queries {k}"]:
        """Find keys.

        Args:
            state: what `build` or `extend` gave; do not change it.
            queries: of the group.
            k: how many are wanted.

        Returns:
            Ids, best first, each once, -1 where there are fewer. They count from the first key of
            the past.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AttendMethod(Method):
    """A method that computes the attention output itself.

    `retrace.analyze.methods.toolkit.partial_attention` has the parts that most outputs are put
    together from.
    """

    plain: ClassVar[bool] = False
    """Whether the output is the softmax over the keys that it lists, times their values."""

    def attend(
        self,
        state: Any,
        queries: Float32[Tensor, "group queries channels"],
        positions: Int64[Tensor, "queries"],
        k: int,
    ) -> tuple[
        Float[Tensor, "group queries value_channels"], Int64[Tensor, "group queries attended"]
    ]:
        """Compute the attention output.

        Args:
            state: what `build` or `extend` gave; do not change it.
            queries: of the group.
            positions: of the queries, ascending.
            k: the budget: keys per query and head.

        Returns:
            The output, and the ids of the keys attended, in the method's own order, of which recall
            takes the first k; -1 where there are fewer. `partial_attention.attended_ids` of the
            toolkit makes such ids.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PolicyMethod(Method):
    """A method that leaves each kv head to another one, such as all keys to some heads and recent
    keys alone to others."""

    def answering(self, state: Any | None) -> tuple[Method, Any]:
        """Say which method answers a kv head's queries.

        Args:
            state: what `build` or `extend` gave for the head; None while there is none.

        Returns:
            The method, which runs on this one's cache, and its state; None where it has none yet.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BlockMethod(Method):
    """A method that chooses units of consecutive keys for whole blocks of queries, as a prefill
    does under the protocol `prefill:B`.

    It meets each block of queries whole, and chooses the same keys for all of them: a query then
    attends those of the keys that it sees, and no later one. The keys that a block chooses from go
    up to its own last query.
    """

    holds_keys: ClassVar[bool | None] = False
    looks: ClassVar[Looks] = "block"
    """Which queries it looks at to choose: those of the block alone, or also the last ones that
    are there, at the prompt's `end`, or the chunk's that the block is in. Then `build` is handed
    all up to there, once for a prompt or chunk; otherwise it is handed the whole prompt, and what
    it keeps of a key must depend on that key's unit and earlier ones."""

    block: int = field(default=64, metadata={"help": "keys in a block"})
    keep: Keep = field(default=Keep(recent=1), metadata=KEEP)
    budget: Budget = field(default=Budget(), metadata=BUDGET)

    @property
    def unit_size(self) -> int:
        """Keys in one unit of selection: a block, or 1 where single keys are chosen."""
        return self.block

    def units(self, k: int, end: int) -> int:
        """How many units a budget of k keys buys of the `end` keys up to the block's last query:
        whole ones, one at least, and all where the budget holds all keys."""
        return -(-end // self.unit_size) if k >= end else max(1, k // self.unit_size)

    def block_scores(
        self,
        state: Any,
        queries: Float32[Tensor, "group queries channels"],
        positions: Int64[Tensor, "queries"],
    ) -> Float[Tensor, "group units"]:
        """Estimate how much each unit of keys is worth to a block of queries as a whole.

        Args:
            state: what `build` gave; do not change it.
            queries: all of the block.
            positions: theirs, consecutive.

        Returns:
            Of the units from the sequence's first to the one at the last of `positions`. Higher is
            better, and -inf is never attended. A budget by mass or threshold reads them as
            logarithms of attention mass.
        """
        raise NotImplementedError

    def always(
        self,
        state: Any,
        queries: Float32[Tensor, "group queries channels"],
        positions: Int64[Tensor, "queries"],
    ) -> Bool[Tensor, "#group units"] | None:
        """Units that the block attends whatever the budget, besides those that `keep` names; None
        where there are none."""
        return None

    def choose(
        self,
        state: Any,
        queries: Float32[Tensor, "group queries channels"],
        positions: Int64[Tensor, "queries"],
        k: int,
    ) -> Int64[Tensor, "group chosen"] | None:
        """Choose units of keys, where that is not the best by `block_scores` under a budget.

        Args:
            state: what `build` gave; do not change it.
            queries: all of the block.
            positions: theirs, consecutive.
            k: the budget: keys per query and head.

        Returns:
            Units, best first, each once, -1 where there are fewer: a column is a unit of one key,
            and `retrace.analyze.methods.toolkit.diagonals` makes such of diagonals. What `keep` and
            `always` name comes besides. None asks for the best by `block_scores`.
        """
        return None

    def operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """Multiply-adds of matrix products that choosing takes.

        Args:
            queries: of the block.
            keys: that its last query sees.
            group: the kv head and its layer's rules.

        Returns:
            Those of one query head, for the block.
        """
        return 0.0

    def build_operations(self, queries: int, keys: int, group: HeadGroup) -> float:
        """Those that `build` takes for one query head, of a prompt or chunk of so many queries at
        whose end there are so many keys."""
        return 0.0
