"""Streams that are there, whatever a shell closed."""

import os
import sys


def open_closed_streams() -> None:
    """Let what is written to a closed stream go nowhere.

    Otherwise the next file that is opened would take its number, and what is meant for the terminal
    would be written into that.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))
