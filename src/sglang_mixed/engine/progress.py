"""The progress bar of a load."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ..plan import Plan


def progress(tensors: Iterator[tuple[str, torch.Tensor]], plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors through while a bar on stderr shows bytes read of the planned ones."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("mixed precision: loading", total=plan.file_bytes)
        for name, tensor in tensors:
            size = tensor.nbytes
            yield name, tensor
            bar.advance(task, size)
