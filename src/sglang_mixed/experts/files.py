"""Exports as files: JSON both ways, CSV. A file appears whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from pathlib import Path

from ..errors import ExpertCountsError, ExpertExportError
from .export import ExpertExport

_COLUMNS = (
    "layer_id",
    "expert_id",
    "format",
    "activation_count",
    "total_tokens_processed",
    "prefill",
    "decode",
    "weight_sum",
    "last_activation_time",
)


def read_export(path: str | Path) -> ExpertExport:
    """An export, ours or an older one with the three known fields only. Raises ExpertExportError."""
    try:
        return ExpertExport.from_json(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise ExpertExportError(
            f"cannot be read: {error.strerror}",
            file=path,
            remedy="correct the path, or give a server's http:// address",
        ) from error
    except (ValueError, RecursionError) as error:
        raise ExpertExportError(
            f"not JSON: {error}", file=path, remedy="give a file that sglang-mixed experts --export has written"
        ) from error
    except ExpertCountsError as error:
        raise ExpertExportError(
            error.what,
            file=path,
            rule=error.rule,
            remedy=error.remedy or "give a file that sglang-mixed experts --export has written",
        ) from error


def write_export(path: str | Path, export: ExpertExport) -> None:
    """Write JSON. Raises ExpertExportError and leaves what was there if it cannot."""
    write_whole(path, json.dumps(export.to_json()).encode())


def write_csv(path: str | Path, export: ExpertExport) -> None:
    """Write one line per expert; what is not known is left empty. Raises ExpertExportError as `write_export`."""
    write_whole(path, to_csv(export).encode())


def to_csv(export: ExpertExport) -> str:
    """One line per expert under a heading."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    layers, _ = export.grid()
    rows = {layer: row for row, layer in enumerate(layers)}
    counts, formats = export.counts, export.formats
    for one in export.experts:
        place = rows[one.layer_id], one.expert_id
        phases = (counts.prefill[place], counts.decode[place]) if counts else ("", "")
        weight = float(counts.weights[place]) if counts else ""
        label = formats.label(*place) if formats else ""
        tokens = one.activation_count, one.total_tokens_processed
        writer.writerow([one.layer_id, one.expert_id, label, *tokens, *phases, weight, one.last_activation_time])
    return text.getvalue()


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a temporary sibling, bring it to the disk, rename it. Raises ExpertExportError; the old file then stays."""
    target = Path(path).resolve()
    sibling = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with sibling.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(target)
    except OSError as error:
        sibling.unlink(missing_ok=True)
        raise ExpertExportError(
            f"cannot be written: {error.strerror}", file=path, remedy="choose a folder with room that you may write to"
        ) from error
