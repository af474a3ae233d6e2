"""What all commands share: their options, and errors as messages."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..errors import MixedPrecisionError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AllowDifferentBase = Annotated[
    bool, typer.Option("--allow-different-base", help="Mix sources although their 16-bit weights differ.")
]


def show(report: Any, as_json: bool, render: Callable[[Any], None]) -> None:
    """A command's report: JSON values printed as they are, or rendered."""
    print(json.dumps(report, indent=2)) if as_json else render(report)


@contextmanager
def reported() -> Iterator[None]:
    """An error of ours is one message on stderr and exit status 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except MixedPrecisionError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
