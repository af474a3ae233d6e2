"""The look of tables whose first column names something and whose others are numbers."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table


def number_table(title: str, name: str, *numbers: str) -> Table:
    """An empty table."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(name, overflow="fold")
    for head in numbers:
        table.add_column(head, justify="right", no_wrap=True)
    return table
