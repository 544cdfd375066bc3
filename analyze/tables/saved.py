"""Tables and the facts that they share, in a folder: written all or none, and read as data that
nobody vouches for."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import pandas as pd

from retrace.analyze.storage.untrusted import read_facts, read_table
from retrace.traces import RetraceError
from retrace.traces.storage.durable import make_folder, remove_all, sync_all, sync_path

SAVING, SAVED = ".saving", ".saved"
"""Folders, in the one of the tables, of what is being written and of what is whole: the second is
moved into its place file by file, and counts before what is there."""
DIGESTS = "tables"
"""Where the facts have the SHA-256 of each table."""


class Table(NamedTuple):
    """A table that is saved."""

    field: str
    """Of the class that holds it."""
    file: str
    columns: Sequence[str]
    """Those that it has at the least, and that are read; all that there are if it names none."""
    needed: bool = True
    """False for tables that earlier versions did not write."""


class SavedTables:
    """Tables that are saved together with their facts, as JSON, and in words.

    A process that is killed while it saves leaves what was there before, or these.
    """

    NONE: ClassVar[str]
    """What is said of a folder without them, before `of retrace`."""
    TABLES: ClassVar[tuple[Table, ...]]
    FACTS: ClassVar[tuple[str, str]]
    """The field that holds the facts, and their file."""
    TEXT: ClassVar[str]
    """The file of `text`."""

    def text(self) -> str:
        """The tables as somebody reads them."""
        raise NotImplementedError

    @classmethod
    def checked_table(cls, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """A table, if its columns hold what belongs there.

        Raises:
            ValueError: they hold something else.
        """
        return table

    @classmethod
    def checked_facts(cls, facts: Any) -> dict[str, Any]:
        """The facts, if they have the form that others rely on.

        Raises:
            ValueError: they have another.
        """
        if not isinstance(facts, dict):
            raise ValueError(f"its {cls.FACTS[1]} is no object")
        return facts

    @classmethod
    def files(cls) -> tuple[str, ...]:
        """What is written into a folder."""
        return (*(table.file for table in cls.TABLES), cls.FACTS[1], cls.TEXT)

    def save(self, folder: str | Path) -> None:
        """Write a Parquet file of each table, the facts and the text, all of them or none."""
        folder = Path(folder)
        make_folder(folder)
        finish_saving(folder)
        aside = folder / SAVING
        remove_all(aside)
        aside.mkdir()
        digests = {}
        for table in self.TABLES:
            frame: pd.DataFrame = getattr(self, table.field)
            frame.to_parquet(aside / table.file, index=False)
            digests[table.file] = _digest(aside / table.file)
        (aside / self.TEXT).write_text(self.text(), encoding="utf-8")
        field, file = self.FACTS
        facts = json.dumps({**getattr(self, field), DIGESTS: digests}, indent=2)
        (aside / file).write_text(facts + "\n", encoding="utf-8")
        sync_all(aside)
        aside.rename(folder / SAVED)
        sync_path(folder)
        finish_saving(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder back.

        Raises:
            RetraceError: it is none of these, its files do not belong together, or one was changed.
        """
        folder, (field, facts_file) = Path(folder), cls.FACTS
        try:
            facts = cls.checked_facts(read_facts(_file(folder, facts_file)))
            digests = facts.pop(DIGESTS, {})  # of earlier versions there are none
            if not isinstance(digests, dict):
                raise ValueError(f"its {facts_file} has no {DIGESTS} as retrace writes them")
            tables = {}
            for table in cls.TABLES:
                file, digest = _file(folder, table.file), digests.get(table.file)
                if not table.needed and digest is None and not file.exists():
                    continue
                if digest is not None and _digest(file) != digest:
                    raise ValueError(f"{file.name} is not what was written")
                frame = read_table(file, table.columns or None)
                tables[table.field] = cls.checked_table(frame, file.name)
        except (OSError, ValueError, RecursionError) as error:
            words = " ".join(str(error).split())
            raise RetraceError(f"{folder} {cls.NONE} of retrace ({words}).") from error
        return cls(**{field: facts}, **tables)


def names_in(folder: Path) -> set[str]:
    """The names of what a folder holds, what was saved last among them; of none there are none."""
    places = [folder, folder / SAVED]
    return {path.name for place in places if place.is_dir() for path in place.iterdir()} - {SAVED}


def finish_saving(folder: Path) -> None:
    """Put what was saved last into its place, where a killed process did not come to that."""
    # By a link, files of another folder would be moved.
    if (folder / SAVED).is_dir() and not (folder / SAVED).is_symlink():
        for file in (folder / SAVED).iterdir():
            file.replace(folder / file.name)
        sync_path(folder)
        (folder / SAVED).rmdir()


def _file(folder: Path, name: str) -> Path:
    """Where a file of the tables is: they may not have been put into their place yet.

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
