"""`python -m retrace.cli` is the same as `retrace`."""

import os
import signal
import sys

# Ctrl-C before anything is loaded ends the process without a word; commands say more.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from retrace.cli.main import main  # noqa: E402


def start() -> None:
    """The program."""
    try:
        main(prog_name="retrace")
    except OSError as error:  # of a help page; commands say so themselves
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still holds back
        print(f"Error: The output cannot be written: {error.strerror}.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    start()
