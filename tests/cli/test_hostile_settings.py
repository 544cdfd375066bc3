"""A settings file is data: whatever it says, it is read, or refused in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!python/object/apply:os.system ['touch ran']", "cannot be read as YAML"),
        ("topk: !!python/name:os.system", "cannot be read as YAML"),
        (f"{BOMB}topk: *p\n", "aliases"),
        ("[" * 100_000, "cannot be read as YAML"),
        ("topk: 0-99999999999", "more than 1,000,000 numbers"),
        (f"topk: {'9' * 5000}", "cannot be read as YAML"),
        ("topk: [1, [2, 3]]", "neither a number nor a range"),
        ("topk: {a: b}", "neither a number nor a range"),
    ],
    ids=["call", "name", "aliases", "deep", "range", "digits", "nested", "mapping"],
)
def test_refused_in_one_line(run: Run, trace: Path, text: str, said: str) -> None:
    Path("run.yaml").write_text(text)
    stderr = run("analyze", trace, "--config", "run.yaml", code=2).stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("Error")]
    assert said in line
    assert not Path("ran").exists()
