"""The whole export: a temporary folder beside the target, filled file after file, and renamed when it is complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.folder import INDEX
from ..errors import ExportError
from ..plan import Plan
from .description import exported_config, model_card
from .shards import ShardFile, lay_out
from .writing import PARTIAL, Advance, is_written, write_file, write_shard

#: SHA-256 of every file of weights, as `sha256sum -c` reads it; written anew after each.
SUMS = "SHA256SUMS"
#: What a base holds besides weights is copied, but for what describes its own weights.
_OWN = (INDEX, "config.json", "README.md", SUMS)
_OWN_QUANTIZATION = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5", ".onnx", ".npz", ".tflite"),
    *(".safetensors.index.json", ".bin.index.json", ".onnx_data"),
)
#: Subfolders that belong to a tokenizer; others hold weights of other formats.
_FOLDERS = ("additional_chat_templates",)


def export(plan: Plan, folder: Path, max_shard_bytes: int, advance: Advance = lambda nbytes: None) -> None:
    """Write the plan's model to `folder`, every tensor's bytes unchanged; `advance` is told of each byte.

    An interrupted export leaves `folder` + ".partial" and goes on from there: finished files are hashed, not written
    again. Raises ExportError where the folder exists, another export writes it, or the disk is full.
    """
    _refuse_existing(folder)
    partial = folder.with_name(folder.name + PARTIAL)
    shards = lay_out(plan, max_shard_bytes)
    try:
        with _locked(partial):
            _write_shards(partial, shards, advance)
            _write_rest(partial, plan, shards, folder.name)
            partial.rename(folder)
    except OSError as error:
        raise ExportError(
            f"cannot write the export: {error.strerror or error}",
            file=error.filename or partial,
            rule="the target is a new folder, its disk has room for the whole model",
            remedy=f"make room, then run the same command again: finished files in {partial} are kept",
        ) from error


def _refuse_existing(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExportError(
            "the target exists",
            file=folder,
            rule="an export is written to a new folder",
            remedy="name another folder, or remove this one",
        )


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """The temporary folder, made if need be, for this process alone."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (partial / SUMS).is_file() and any(path.name != SUMS + PARTIAL for path in partial.iterdir()):
            raise ExportError(
                "the temporary folder holds something else",
                file=partial,
                rule=f"an export that was interrupted left its {SUMS}",
                remedy="remove the folder, or name another target",
            )
        yield
    except BlockingIOError:
        raise ExportError(
            "another process is writing this export", file=partial, remedy="wait for it, or end it"
        ) from None
    finally:
        os.close(descriptor)


def _write_shards(partial: Path, shards: list[ShardFile], advance: Advance) -> None:
    known = _read_sums(partial / SUMS)
    sums = {
        shard.name: known[shard.name] for shard in shards if is_written(partial, shard, known.get(shard.name), advance)
    }
    _write_sums(partial, sums)
    for path in partial.iterdir():
        if path.name not in (SUMS, *sums):  # half written, of another plan or of another size of shards
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _require_room(partial, [shard for shard in shards if shard.name not in sums])
    for shard in shards:
        if shard.name not in sums:
            sums[shard.name] = write_shard(partial, shard, advance)
            _write_sums(partial, sums)


def _require_room(partial: Path, missing: list[ShardFile]) -> None:
    needed, free = sum(shard.nbytes for shard in missing), shutil.disk_usage(partial).free
    if needed > free:
        raise ExportError(
            f"the export needs {needed:,} more bytes, the disk has {free:,}",
            file=partial,
            rule="the disk has room for the whole model",
            remedy=f"free {needed - free:,} bytes, or export to another disk",
        )


def _write_rest(partial: Path, plan: Plan, shards: list[ShardFile], title: str) -> None:
    """All but the weights: what the base holds besides them, the index, the config and the card."""
    base = plan.checkpoints[plan.base].path
    for companion in _companions(base):
        (partial / companion).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / companion, partial / companion)
    weight_map = {read.name: shard.name for shard in shards for _, read in shard.pieces}
    total = sum(read.nbytes for shard in shards for _, read in shard.pieces)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    config = exported_config(plan)
    texts = {
        INDEX: json.dumps(index, indent=2) + "\n",
        "README.md": model_card(plan, title, config),
        "config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        write_file(partial / name, iter([text.encode()]))


def _companions(base: Path) -> list[Path]:
    """Tokenizer, generation config, chat templates, remote code, licence: relative to the base's folder."""
    found = [path for path in base.iterdir() if path.is_file()]
    found += [path for name in _FOLDERS if (base / name).is_dir() for path in (base / name).iterdir() if path.is_file()]
    code = [path for path in base.glob("*/*.py") if path.is_file()]
    names = [path.relative_to(base) for path in dict.fromkeys([*found, *code])]
    dropped = {*_OWN, *_OWN_QUANTIZATION}
    return sorted(
        name for name in names if name.name not in dropped and name.name[0] != "." and not name.name.endswith(_WEIGHTS)
    )


def _read_sums(file: Path) -> dict[str, str]:
    """File name -> SHA-256."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _write_sums(folder: Path, sums: dict[str, str]) -> None:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    write_file(folder / SUMS, iter([lines.encode()]))
