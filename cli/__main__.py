"""`python -m retrace.cli` is the same as `retrace`."""

from retrace.cli.main import main

if __name__ == "__main__":
    main(prog_name="retrace")
