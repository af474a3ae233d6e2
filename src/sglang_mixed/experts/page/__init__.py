"""The page that people look at: its parts are files of their own, what a browser gets is one file."""

from __future__ import annotations

import functools
import re
from importlib.resources import files

_INCLUDE = re.compile(r"/\* include (\S+) \*/")


@functools.cache
def page_html() -> str:
    """The whole page as one HTML document that fetches nothing but the server's own reports."""
    folder = files(__name__)
    return _INCLUDE.sub(
        lambda found: (folder / found[1]).read_text(encoding="utf-8"),
        (folder / "page.html").read_text(encoding="utf-8"),
    )
