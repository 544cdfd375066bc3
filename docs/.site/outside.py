"""What pages of the site share with the files beside `docs/`.

Pages read the same on a Git host and on the site. A link that leads out of `docs/` becomes the path
of that file, and a page that consists of another file, such as the changelog, is that file.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WHOLE = re.compile(r"\A<!-- the file (\S+) -->\n\Z")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")


def on_page_markdown(markdown: str, **page: Any) -> str:
    """The text that the site shows of a page.

    >>> on_page_markdown("see [the script](../examples/evidence.py)")
    'see the script (`examples/evidence.py`)'
    """
    if (whole := WHOLE.match(markdown)) is not None:
        markdown = (ROOT / whole[1]).read_text(encoding="utf-8").replace("](docs/", "](")
    return OUTSIDE.sub(r"\1 (`\2`)", markdown)
