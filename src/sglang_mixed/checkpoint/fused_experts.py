"""Tensors that hold a matrix of every expert of a layer, one after the other, as what each expert has of them.

Read: 16-bit tensors of the families below, and GPT-OSS's MXFP4 ones (`NAME_blocks` [experts, out, in/32, 16] beside
`NAME_scales` [experts, out, in/32]). Each expert's part is one run of bytes, and becomes modules of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import InconsistentFormatError
from ..formats import TensorInfo
from ..formats.base import FLOAT_DTYPES, Shape
from .modules import Modules
from .shard import Entry, Part, Parts, Place, Shard, View

#: Local name of a fused tensor -> the projections whose rows it holds.
PROJECTIONS: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MX_GROUP = 32


class Layout(NamedTuple):
    """How a family's fused tensors lie: [experts, in, out] where `transposed`, else [experts, out, in].

    Rows of gate and up stand in turns where `interleaved`, else all of gate before all of up. `width` is the config's
    field of an expert's intermediate size.
    """

    width: str
    transposed: bool = False
    interleaved: bool = False


#: model_type -> its layout: the first two as on the hub, the others as transformers 5 holds them.
LAYOUTS: dict[str, Layout] = {
    "gpt_oss": Layout("intermediate_size", transposed=True, interleaved=True),
    "llama4_text": Layout("intermediate_size", transposed=True),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"), Layout("moe_intermediate_size")
    ),
}
#: The config's fields of the number of experts; transformers 5 renames them as it saves.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Stored(NamedTuple):
    """What a fused tensor is: its dtypes and shape, each expert's part as a matrix, and the local name of its parts."""

    dtypes: tuple[str, ...]
    shape: Shape
    matrix: Shape
    local: str
    transposed: bool = False


class Slice(NamedTuple):
    """One projection's part of one expert's matrix of a fused tensor: rows `first`, `first + step`, ..."""

    expert: int
    stored: Stored
    first: int
    step: int

    def entry(self, name: str, fused: Entry, shape: Shape) -> Entry:
        """The part's entry; `fused` is that of the tensor of this name."""
        size = (fused.end - fused.begin) // fused.shape[0]
        begin, transposed = fused.begin + self.expert * size, self.stored.transposed
        view = View(self._text(name, shape[0]), self.stored.matrix, transposed, self.first, self.step)
        return Entry(fused.file, fused.dtype, shape, begin, begin + size, view)

    def _text(self, name: str, rows: int) -> str:
        transposed = self.stored.transposed
        whole = rows == self.stored.matrix[1 if transposed else 0]
        wanted = f"{self.first}::{self.step}" if self.step > 1 else f"{self.first}:{self.first + rows}"
        index = "" if whole else f", :, {wanted}" if transposed else f", {wanted}"
        return f"{name}[{self.expert}{index}]" + (".T" if transposed else "")


@dataclass(frozen=True)
class SlicedShard(Shard):
    """One file's tensors, experts' parts in the place of fused ones.

    `origins` gives for each run the place in `stored` of its first tensor, and which slice of that one its only tensor
    is; None for a run that stands there alike.
    """

    stored: Shard
    origins: list[tuple[Place, Slice | None]]

    def entry(self, file: int, place: Place) -> Entry:
        """The entry of the tensor or part there; `file` is the shard's own index."""
        run, number = place
        origin, wanted = self.origins[run]
        if wanted is None:
            return self.stored.entry(file, (origin[0], number))
        return wanted.entry(self.stored.name(origin), self.stored.entry(file, origin), self.parts[run][0].info.shape)


def slice_experts(config: Mapping[str, Any], shards: Sequence[Shard], modules: Modules) -> list[Shard] | None:
    """The shards with every fused tensor as its experts' parts; None where there is nothing to slice.

    Raises InconsistentFormatError where a fused tensor is not what its family and config.json make it.
    """
    text = config.get("text_config")
    described = text if isinstance(text, Mapping) else config
    layout = LAYOUTS.get(str(described.get("model_type")))
    fused = {kind for kind, tensors in enumerate(modules.tensors_of_kinds) if not tensors.keys().isdisjoint(_NAMES)}
    if layout is None or not fused:
        return None
    stored = stored_tensors(layout, described)
    known = {kind for kind in fused if modules.tensors_of_kinds[kind].keys() <= stored.keys()}
    owners = {name for name, kind in modules.kinds.items() if kind in known and name.endswith(".experts")}
    alike: dict[Parts, Parts] = {}
    return [_slice(shard, owners, stored, layout.interleaved, alike) for shard in shards] if owners else None


def stored_tensors(layout: Layout, config: Mapping[str, Any]) -> dict[str, Stored]:
    """Local name below `….experts` -> what the tensor must be in a model of this layout and config."""
    num_experts = next((name for name in _NUM_EXPERTS if config.get(name)), _NUM_EXPERTS[0])
    experts, hidden, width = (int(config.get(key) or 0) for key in (num_experts, "hidden_size", layout.width))
    found = {}
    for name, parts in PROJECTIONS.items():
        out, columns = (len(parts) * width, hidden) if len(parts) > 1 else (hidden, width)
        matrix = (columns, out) if layout.transposed else (out, columns)
        groups = columns // _MX_GROUP
        found[name] = Stored(FLOAT_DTYPES, (experts, *matrix), matrix, "weight", layout.transposed)
        found[f"{name}_bias"] = Stored(FLOAT_DTYPES, (experts, out), (out,), "bias")
        blocks = (experts, out, groups, _MX_GROUP // 2)
        found[f"{name}_blocks"] = Stored(("U8",), blocks, (out, columns // 2), "weight")
        found[f"{name}_scales"] = Stored(("U8",), blocks[:3], (out, groups), "weight_scale")
    return found


_NAMES = frozenset(name + suffix for name in PROJECTIONS for suffix in ("", "_blocks"))


def _slice(
    shard: Shard, owners: set[str], stored: Mapping[str, Stored], interleaved: bool, alike: dict[Parts, Parts]
) -> Shard:
    runs: list[tuple[str, Parts, int]] = []
    origins: list[tuple[Place, Slice | None]] = []
    for run, (module, parts) in enumerate(zip(shard.modules, shard.parts, strict=True)):
        begin = shard.begins[run]
        if module not in owners:
            runs.append((module, parts, begin))
            origins.append(((run, 0), None))
            continue
        for number, part in enumerate(parts):
            tensor = stored[part.local]
            _check(shard, module, part, tensor)
            for projection, wanted, shape in _slices(part, tensor, interleaved):
                own = (Part.of(tensor.local, TensorInfo(part.info.dtype, shape)),)
                runs.append((f"{module}.{wanted.expert}.{projection}", alike.setdefault(own, own), begin))
                origins.append(((run, number), wanted))
    modules, parts_of_runs, begins = (list(column) for column in zip(*runs, strict=True)) if runs else ([], [], [])
    return SlicedShard(shard.path, modules, parts_of_runs, begins, shard.data_begin, shard.stamp, shard, origins)


def _slices(part: Part, tensor: Stored, interleaved: bool) -> Iterator[tuple[str, Slice, Shape]]:
    """(projection, slice, its shape) of every expert."""
    projections = PROJECTIONS[next(name for name in PROJECTIONS if part.local.startswith(name))]
    rows, *columns = reversed(tensor.matrix) if tensor.transposed else tensor.matrix
    share = rows // len(projections)
    step = len(projections) if interleaved else 1
    for expert in range(part.info.shape[0]):
        for number, projection in enumerate(projections):
            first = number if interleaved else number * share
            yield projection, Slice(expert, tensor, first, step), (share, *columns)


def _check(shard: Shard, module: str, part: Part, tensor: Stored) -> None:
    info: TensorInfo = part.info
    if info.shape == tensor.shape and info.dtype in tensor.dtypes and 0 not in info.shape:
        return
    raise InconsistentFormatError(
        f"{info.dtype} {list(info.shape)} is not what holds all experts of a layer of this model",
        file=shard.path,
        tensor=f"{module}.{part.local}",
        rule=f"by its config.json the tensor is {' or '.join(tensor.dtypes)} {list(tensor.shape)}",
        remedy="correct config.json (model_type, number of experts, hidden_size, the experts' width), or download "
        "the checkpoint again",
    )
