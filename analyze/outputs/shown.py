"""Text from files as it is shown."""

import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters that a terminal or a browser does not show but obeys: control characters besides tab
and line feed, those that turn the direction of text, and halves of characters."""


def shown(text: str) -> str:
    r"""The text with what would not be seen spelt out: names in files are anybody's.

    >>> print(shown("layer\x1b[2J"))
    layer\x1b[2J
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
