"""What reading and replaying a trace loads: no library of models, data sets or plots."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from retrace.analyze import analyze
from retrace.traces import open_trace

analyze(open_trace(sys.argv[1]), ["exact", "quest", "loki"], [5], out="r")
print(*({"transformers", "datasets", "matplotlib", "click"} & set(sys.modules)))
"""


def test_replay_loads_no_model_library(trace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(trace)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
    assert Path("r/table.md").exists()


def test_the_command_draws_nothing_when_told(trace: Path) -> None:
    script = (
        "import sys; from retrace.cli.main import main\n"
        "try: main(['analyze', sys.argv[1], '--topk', '5', '--no-plots'])\n"
        "except SystemExit as exit: assert not exit.code\n"
        "assert not {'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(trace)], check=True, capture_output=True)
