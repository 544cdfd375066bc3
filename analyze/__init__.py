"""Replay of retrieval-based attention methods against a trace, without its model.

Public names are in `__init__.pyi`. Each is loaded when it is asked for, since what lists or
completes methods must not wait for all that replays them.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
