"""What all commands share: their options, and errors as messages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..errors import MixedPrecisionError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AllowDifferentBase = Annotated[
    bool, typer.Option("--allow-different-base", help="Mix sources although their 16-bit weights differ.")
]


@contextmanager
def reported() -> Iterator[None]:
    """An error of ours is one message on stderr and exit status 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except MixedPrecisionError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
