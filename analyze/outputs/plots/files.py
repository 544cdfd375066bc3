"""Pictures as files."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from retrace.analyze.outputs.plots.style import Picture
from retrace.traces import RetraceError
from retrace.traces.storage.durable import written_whole

PNG = "png"
FORMATS = (PNG, "svg", "pdf")
DPI = {PNG: 130}
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Metadata without the time, so the same figures are the same bytes."""


def save_pictures(
    pictures: Mapping[str, Picture], folder: Path, formats: Sequence[str] = (PNG,)
) -> list[Path]:
    """Draw pictures and write each in every format, whole; never through a link that lies in its
    place. One of earlier figures in another format is removed.

    Raises:
        RetraceError: a format that is none of `FORMATS`.
    """
    check_formats(formats)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in pictures.items():
        remove_picture(folder, name, [form for form in FORMATS if form not in formats])
        for form in dict.fromkeys(formats):
            files.append(folder / f"{name}.{form}")
            # Drawn anew, since a layout begins where the last one ended.
            save_picture(draw(None), files[-1])
    return files


def save_picture(figure: Figure, file: Path) -> None:
    """Write a figure in the format that a file's name ends in, whole; never through a link that
    lies in its place.

    Raises:
        RetraceError: the format is none of `FORMATS`.
    """
    form = file.suffix.removeprefix(".").lower()
    check_formats([form])
    drawn = BytesIO()
    # TrueType letters, which journals ask for, and names inside a file that do not change.
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "retrace"}):
        figure.savefig(drawn, format=form, dpi=DPI.get(form, "figure"), metadata=UNDATED.get(form))
    with written_whole(file) as opened:
        opened.write(drawn.getvalue())


def check_formats(formats: Sequence[str]) -> None:
    """Refuse formats that plots are not written in."""
    for form in formats:
        if form not in FORMATS:
            raise RetraceError(f"Plots are not written as {form!r}: choose {', '.join(FORMATS)}.")


def remove_picture(folder: Path, name: str, formats: Sequence[str] = FORMATS) -> None:
    """Remove the files of the pictures of a name, in which `*` stands for anything, and nothing
    else that may lie in the folder."""
    for form in formats:
        for file in folder.glob(f"{name}.{form}"):
            if not file.is_dir():
                file.unlink()
