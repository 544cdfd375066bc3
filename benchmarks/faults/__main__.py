"""What is lost when captures and runs end at any moment, and what is noticed of damage.

    python -m benchmarks.faults --out benchmarks/results/faults.md

A tiny random model is captured over and over, each time in a process of its own that is ended by
SIGKILL at a moment drawn at random, or whose disk fills up (`capture.py`). After each the trace is
verified, what the capture had reported as finished must be there, and the same capture with
`resume` must come to the bytes of one that was never interrupted. Then chunks of a whole trace are
spoilt, one at a time, and `verify_trace` must name the very array and sequence. Runs of `analyze`
are killed likewise and gone on with, and so are workers of one (`analyze.py`) and parts of a Dask
cluster (`cluster.py`), commands are given where nothing can be written (`read_only.py`), and traces
are written to and read from an object store that fails (`remote.py`).

Nothing but time depends on the machine; where in a capture a moment falls, does.
"""

import tempfile
from pathlib import Path

from benchmarks import page
from benchmarks.faults import analyze, capture, cluster, processes, read_only, remote

SECTIONS = {
    "capture": capture.section,
    "analyze": analyze.section,
    "cluster": cluster.section,
    "read-only": read_only.section,
    "remote": remote.section,
}


def main() -> None:
    """Run all of it, or some sections; print tables, and write them where asked."""
    parser = page.parser(__doc__)
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        choices=[*SECTIONS, []],
        help=f"{', '.join(SECTIONS)}; all by default",
    )
    parser.add_argument("--count", type=int, default=50, help="how often each fault is tried")
    arguments = parser.parse_args()
    lines = ["# Faults", "", f"{page.origin()}."]
    processes.prepare()
    with tempfile.TemporaryDirectory() as temporary:
        captures = capture.Captures(Path(temporary))
        for section in arguments.sections or SECTIONS:
            lines += ["", *SECTIONS[section](captures, arguments.count)]
    page.publish("\n".join(lines), arguments.out)


if __name__ == "__main__":
    main()
