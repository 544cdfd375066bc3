"""Pictures as files."""

from io import BytesIO
from pathlib import Path
from typing import Any

from retrace.traces.storage.durable import written_whole


def save_picture(figure: Any, file: Path, dpi: int) -> None:
    """Write a Matplotlib figure as PNG, whole; never through a link that lies in its place."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with written_whole(file) as opened:
        opened.write(drawn.getvalue())
