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
MANY = {name: list(range(100)) for name in ("page", "pool", "keep")}
"""Values whose combinations fill the memory."""


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
        (f"method: {{quest: {MANY}}}", "1,000,000 combinations"),
        ("method: {quest: {page: [8], pages: [1]}}", "Did you mean page or"),
        ("method: {quest: 8, window: 9}", "expected a line such as"),
        ("method: {quest: [8]}", "expected parameters such as"),
        ("method: {quest: {page: [[8]]}}", "a value or a list of them"),
        ("method: {quest: {page: []}}", "a value or a list of them"),
        ("method: {quest: {page: '{8,16}'}}", "no comma and no brace"),
        ("method: [[quest]]", "expected a line such as"),
        ('topk: !!int ""', "tags"),
        ("topk: !!timestamp soon", "tags"),
        (f"topk: 0x{'f' * 5000}", "more than 4,000 characters"),
        ("topk: [" + "1," * 100_000 + "]", "more than 100,000 characters"),
        ('out: "a\\0b"', "is no text"),
        ('out: "\\ud800"', "is no text"),
        (f"protocol: prefix:{'9' * 3000}", "expected all"),
        ("no-plots: 7", "'7' is not a valid boolean"),
        ("out: [a, b]", "out: expected a value"),
        ("method: [exact, null]", "method: expected a value"),
        ("min-context: {a: 1}", "neither a position nor"),
    ],
    ids=[
        "call",
        "name",
        "aliases",
        "deep",
        "range",
        "digits",
        "nested",
        "mapping",
        "grid",
        "parameter",
        "two",
        "list",
        "lists",
        "empty",
        "braces",
        "listed",
        "tag",
        "date",
        "hexadecimal",
        "long",
        "null",
        "surrogate",
        "position",
        "flag",
        "folders",
        "nothing",
        "number",
    ],
)
def test_refused_in_one_line(run: Run, trace: Path, text: str, said: str) -> None:
    Path("run.yaml").write_text(text)
    stderr = run("analyze", trace, "--config", "run.yaml", code=2).stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("Error")]
    assert said in line
    assert not Path("ran").exists()
