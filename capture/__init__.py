"""Capture: run a causal language model over text and store what its attention saw, as a trace.

Public names are in `__init__.pyi`. Each is loaded when it is asked for: torch and transformers take
seconds to import, and a help page must not wait for them.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
