"""Plan the real-size Qwen3-235B-A22B from three checkpoints: time ÷ json.loads of the same headers, and peak memory.

The checkpoints are sparse files with true headers: 940 GB that take no disk. Both sides run interleaved.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import interleaved, report

from sglang_mixed.plan import make_plan

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 94, 128, 4096, 1536, 151936
QUERY, KEY, HEAD = 64 * 128, 4 * 128, 128
SHARD_BYTES = 4_000_000_000
ITEM_BYTES = {"BF16": 2, "F16": 2, "I32": 4, "F8_E4M3": 1}
RATIO_BAR, MEMORY_BAR_MIB = 2.0, 950

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": 12288,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": HEAD,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "vocab_size": VOCABULARY,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
QUANTIZATION = {
    "bf16": None,
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
}
MAP = """
mixed_precision:
  bf16_path: bf16
  fp8_path: fp8
  gptq_int4_path: gptq
  weight_mapping:
    "model.layers.*.self_attn.*_proj.weight": fp8
    "model.layers.*.mlp.experts.*.*.weight": gptq_int4
    "model.layers.{0..15}.mlp.experts.*.*.weight": fp8
"""

Tensor = tuple[str, str, list[int]]


def linear(kind: str, name: str, rows: int, columns: int) -> Iterator[Tensor]:
    if kind == "bf16":
        yield f"{name}.weight", "BF16", [rows, columns]
    elif kind == "fp8":
        yield f"{name}.weight", "F8_E4M3", [rows, columns]
        yield f"{name}.weight_scale_inv", "BF16", [math.ceil(rows / 128), math.ceil(columns / 128)]
    else:
        yield f"{name}.g_idx", "I32", [columns]
        yield f"{name}.qweight", "I32", [columns // 8, rows]
        yield f"{name}.qzeros", "I32", [columns // 128, rows // 8]
        yield f"{name}.scales", "F16", [columns // 128, rows]


def tensors(kind: str) -> Iterator[Tensor]:
    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, HIDDEN]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", "BF16", [HIDDEN]
        for expert in range(EXPERTS):
            yield from linear(kind, f"{prefix}.mlp.experts.{expert}.down_proj", HIDDEN, INTERMEDIATE)
            yield from linear(kind, f"{prefix}.mlp.experts.{expert}.gate_proj", INTERMEDIATE, HIDDEN)
            yield from linear(kind, f"{prefix}.mlp.experts.{expert}.up_proj", INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.gate.weight", "BF16", [EXPERTS, HIDDEN]
        yield f"{prefix}.post_attention_layernorm.weight", "BF16", [HIDDEN]
        yield f"{prefix}.self_attn.k_norm.weight", "BF16", [HEAD]
        yield from linear(kind, f"{prefix}.self_attn.k_proj", KEY, HIDDEN)
        yield from linear(kind, f"{prefix}.self_attn.o_proj", HIDDEN, QUERY)
        yield f"{prefix}.self_attn.q_norm.weight", "BF16", [HEAD]
        yield from linear(kind, f"{prefix}.self_attn.q_proj", QUERY, HIDDEN)
        yield from linear(kind, f"{prefix}.self_attn.v_proj", KEY, HIDDEN)
    yield "model.norm.weight", "BF16", [HIDDEN]
    yield "lm_head.weight", "BF16", [VOCABULARY, HIDDEN]


def headers(kind: str, library_order: bool) -> Iterator[tuple[dict[str, object], int]]:
    """Header and data bytes of each shard."""
    shard: list[Tensor] = []
    place = 0
    for tensor in tensors(kind):
        if place and place + nbytes(tensor) > SHARD_BYTES:
            yield header(shard, library_order)
            shard, place = [], 0
        shard.append(tensor)
        place += nbytes(tensor)
    yield header(shard, library_order)


def nbytes(tensor: Tensor) -> int:
    _, dtype, shape = tensor
    return math.prod(shape) * ITEM_BYTES[dtype]


def header(shard: list[Tensor], library_order: bool) -> tuple[dict[str, object], int]:
    """The library puts tensors of larger values first, so that a module's are no longer neighbours."""
    found: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in sorted(shard, key=lambda one: (-ITEM_BYTES[one[1]], one[1], one[0])) if library_order else shard:
        name, dtype, shape = tensor
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + nbytes(tensor)]}
        place += nbytes(tensor)
    return found, place


def write_checkpoint(folder: Path, kind: str, library_order: bool = False) -> int:
    """A sparse checkpoint; the number of its tensors."""
    folder.mkdir(parents=True)
    quantization = QUANTIZATION[kind]
    config = CONFIG if quantization is None else {**CONFIG, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    shards = list(headers(kind, library_order))
    weight_map = {}
    for number, (header, data_bytes) in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        file.write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(file, 8 + len(raw) + data_bytes)
        weight_map.update({name: file.name for name in header if name != "__metadata__"})
    index = {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return len(weight_map)


def parse_headers(folder: Path) -> None:
    """The baseline: read every header and json.loads it, keeping nothing."""
    for file in sorted(folder.glob("*/*.safetensors")):
        with file.open("rb") as stream:
            json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def main() -> int:
    return on_checkpoints(measure, __doc__)


def on_checkpoints(measure: Callable[[Path, int, int], int], description: str | None) -> int:
    """Write the checkpoints and the map to a folder, and measure there: (folder, number of tensors, repeats)."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--library-order", action="store_true", help="tensors by the size of their values, not name")
    given = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="real-size-"))
    try:
        count = sum(write_checkpoint(folder / kind, kind, given.library_order) for kind in QUANTIZATION)
        (folder / "map.yaml").write_text(MAP)
        return measure(folder, count, given.repeats)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, count: int, repeats: int) -> int:
    modules = len(make_plan(folder / "map.yaml").modules)
    # What the imports left would otherwise be searched for cycles in every round, mostly in the baseline's time.
    gc.collect()
    gc.freeze()
    runs = {"parse": lambda _: parse_headers(folder), "plan": lambda _: make_plan(folder / "map.yaml")}
    seconds = interleaved(runs, repeats, time.thread_time)
    parse, plan = seconds["parse"], seconds["plan"]
    what = f"json.loads of the headers of {count:,} tensors, {parse.minimum:.3f} s ({modules:,} modules planned)"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    verdicts = [
        report("planning_235b_ratio", plan.minimum / parse.minimum, "x", what, RATIO_BAR),
        report("planning_235b_ratio_median", plan.median / parse.median, "x", what, None),
        report("planning_235b_peak_memory", peak, "MiB", "whole process, torch included", MEMORY_BAR_MIB),
    ]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
