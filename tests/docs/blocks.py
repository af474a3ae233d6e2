"""The pages, and the code blocks in them with the comment above each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").glob("*/README.md"),
    )
)
BLOCK = re.compile(r"(?:^<!-- ([^>]*) -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of code. `comment` says which test runs it, or why none can; empty: it is run here."""

    comment: str
    language: str
    code: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, each with those that continue it, without comments."""
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in self.code.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line]


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    found = [Block(*groups) for groups in BLOCK.findall((ROOT / page).read_text())]
    return [block for block in found if block.language in languages]
