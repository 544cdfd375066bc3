"""What an author of a method needs to test it: a past, a small trace, and the leak check."""

from retrace.testing.checks import check_method
from retrace.testing.pasts import make_past
from retrace.testing.traces import KINDS, make_trace

__all__ = ["KINDS", "check_method", "make_past", "make_trace"]
