"""`python -m retrace.cli` is the same as `retrace`."""

import signal

# Ctrl-C before anything is loaded ends the process without a word; commands say more.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from retrace.cli.main import main  # noqa: E402


def start() -> None:
    """The program."""
    main(prog_name="retrace")


if __name__ == "__main__":
    start()
