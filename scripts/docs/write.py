"""Write the pages of docs/ that are made from the code: `python -m scripts.docs.write`."""

from __future__ import annotations

from pathlib import Path

from . import commands, formats, messages

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"troubleshooting.md": messages.page, "formats.md": formats.page, "commands.md": commands.page}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())


if __name__ == "__main__":
    main()
