"""The error that means: the user can mend this."""


class RetraceError(ValueError):
    """A mistake in what was asked for: one line that names the cause and the cure.

    The command line prints it without a traceback and exits with code 2.
    """
