"""Files that anybody may have put where one is read."""

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """A file to read: no pipe, which would be waited for, and no device, which may never end.

    Raises:
        OSError: it can't be opened.
        ValueError: it is something else.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise ValueError(f"{path.name} is no regular file")
    return os.fdopen(opened, "rb")
