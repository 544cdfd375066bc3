"""A dataset card says what a trace holds, in the words of the Hub."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from retrace.cli.card import card
from retrace.cli.commands.info import describe
from retrace.cli.main import main
from retrace.traces import open_trace

OLD = Path(__file__).parents[2] / "data/format-1/bfloat16.zarr"


@pytest.fixture
def facts() -> dict[str, Any]:
    return describe(open_trace(OLD))


def test_front_matter(facts: dict[str, Any]) -> None:
    facts["model"] = {"pretrained": "owner/model", "model_type": "llama"}
    _, head, body = card(facts, "t.zarr", "mit").split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["license"] == "mit" and front["base_model"] == "owner/model"
    assert front["size_categories"] == ["n<1K"] and "llama" in front["tags"]
    assert front["pretty_name"].startswith("Attention of owner/model")
    assert 'open_trace("hf://datasets/OWNER/NAME/t.zarr")' in body
    assert "| Sequences | 2 sequences, 41 tokens |" in body


def test_nothing_is_made_up(facts: dict[str, Any]) -> None:
    facts["model"], facts["tokens"] = {"pretrained": "/home/me/a|b\n# No"}, 10**12
    text = card(facts, "t.zarr")
    front = yaml.safe_load(text.split("---\n")[1])
    assert "license" not in front and "base_model" not in front
    assert front["size_categories"] == ["n>1T"]
    assert not any(line.startswith("# No") for line in text.splitlines())


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    result = CliRunner().invoke(main, ["info", str(OLD), "--card", str(file)])
    assert result.exit_code == 0 and f"Card: {file}" in result.stderr
    written = file.read_text(encoding="utf-8")
    assert written.startswith("---\n") and "license" not in written
    again = CliRunner().invoke(main, ["info", str(OLD), "--card", str(file)])
    assert again.exit_code == 2 and "is there already" in again.stderr
    assert file.read_text(encoding="utf-8") == written
    alone = CliRunner().invoke(main, ["info", str(OLD), "--license", "mit"])
    assert alone.exit_code == 2 and "--card" in alone.stderr
