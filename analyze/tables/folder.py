"""A results folder: written whole or not at all, and read as data that nobody vouches for."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from retrace.analyze.storage.untrusted import read_facts, read_table
from retrace.analyze.tables.columns import TABLES
from retrace.analyze.tables.validation import DIGESTS, checked_facts, checked_table
from retrace.traces import RetraceError
from retrace.traces.storage.durable import make_folder, remove_all, sync_all, sync_path

FILES = (*(f"{name}.parquet" for name in TABLES), "run.json", "table.md")
"""What is written into a folder."""
SAVING, SAVED = ".saving", ".saved"
"""Folders, in one of results, of what is being written and of what is whole: the second is moved
into its place file by file, and counts before what is there."""


def save(folder: Path, tables: Mapping[str, pd.DataFrame], run: dict[str, Any], text: str) -> None:
    """Write tables by name, a run's facts and `table.md`, all of them or none: a process that is
    killed meanwhile leaves what was there before, or these."""
    make_folder(folder)
    finish_saving(folder)
    aside = folder / SAVING
    remove_all(aside)
    aside.mkdir()
    digests = {}
    for name, frame in tables.items():
        file = aside / f"{name}.parquet"
        frame.to_parquet(file, index=False)
        digests[file.name] = _digest(file)
    (aside / "table.md").write_text(text, encoding="utf-8")
    facts = json.dumps({**run, DIGESTS: digests}, indent=2)
    (aside / "run.json").write_text(facts + "\n", encoding="utf-8")
    sync_all(aside)
    aside.rename(folder / SAVED)
    sync_path(folder)
    finish_saving(folder)


def load(
    folder: Path, columns: Mapping[str, Sequence[str]], optional: set[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The tables of a folder by name, and its run's facts.

    Args:
        folder: where they are.
        columns: those that each table has at the least.
        optional: tables that earlier versions did not write: left out where there is none.

    Raises:
        RetraceError: it is no results folder, its files do not belong together, or one was changed.
    """
    try:
        run = checked_facts(read_facts(_file(folder, "run.json")))
        digests = run.pop(DIGESTS, {})  # of earlier versions there are none
        tables = {}
        for name, wanted in columns.items():
            file = _file(folder, f"{name}.parquet")
            digest = digests.get(f"{name}.parquet")
            if name in optional and digest is None and not file.exists():
                continue
            if digest is not None and _digest(file) != digest:
                raise ValueError(f"{file.name} is not what was written")
            tables[name] = checked_table(read_table(file, wanted), file.name)
    except (OSError, ValueError, RecursionError) as error:
        words = " ".join(str(error).split())
        raise RetraceError(f"{folder} is not a results folder of retrace ({words}).") from error
    return tables, run


def finish_saving(folder: Path) -> None:
    """Put what was saved last into its place, where a killed process did not come to that."""
    # By a link, files of another folder would be moved.
    if (folder / SAVED).is_dir() and not (folder / SAVED).is_symlink():
        for file in (folder / SAVED).iterdir():
            file.replace(folder / file.name)
        sync_path(folder)
        (folder / SAVED).rmdir()


def _file(folder: Path, name: str) -> Path:
    """Where a file of results is: they may not have been put into their place yet.

    Raises:
        ValueError: it is no file of that folder.
    """
    saved = folder / SAVED / name
    file = saved if saved.exists() else folder / name
    if not os.path.realpath(file).startswith(os.path.join(os.path.realpath(folder), "")):
        raise ValueError(f"its {name} leads out of it")
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise ValueError(f"its {name} is no file")
    return file


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
