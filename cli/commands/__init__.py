"""One file a command of `retrace`."""
