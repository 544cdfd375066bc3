"""What the tests of reading look at."""

from collections.abc import Callable

import pytest

from benchmarks.tiny_models import byte_tokenizer
from retrace.capture.reading.windows import SequenceSet

Marked = dict[str, list[str]]


@pytest.fixture
def marked() -> Callable[..., Marked]:
    """What is marked of a sequence, as text, by a tokenizer of one token per byte."""

    def of(found: SequenceSet, sequence: int = 0) -> Marked:
        assert found.marks is not None
        tokens = found.sequences[sequence]
        return {
            name: [byte_tokenizer().decode(tokens[span.start : span.stop]) for span in spans]
            for name, spans in found.marks[sequence].items()
        }

    return of
