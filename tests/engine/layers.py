"""Single layers of a plan, outside of an engine: small checkpoints in any format, and what fills our GPU methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sglang_mixed.engine import state
from sglang_mixed.engine.loading.ledger import Ledger
from sglang_mixed.engine.loading.transfer import Transfer
from sglang_mixed.plan import RankPlan
from sglang_mixed.stream import ReadLog

from .. import models
from ..formats import packers

T = TypeVar("T")
#: Hidden states, top-k weights and ids -> weighted sums.
ExpertsRun = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: How bytes get into parameters; `gpu_model.replace_device` has another.
transfer: Callable[[], Transfer] = Transfer
HIDDEN = 128
PREFIX = "model.layers.0.mlp.experts"
#: name -> a module's tensors of [out, in] as some quantizer writes them.
WRITERS: dict[str, Callable[[np.random.Generator, int, int], packers.Packed]] = {
    "gptq": lambda rng, out, columns: packers.gptq(rng, out, columns, group=64),
    "gptq-channel": lambda rng, out, columns: packers.gptq(rng, out, columns, group=-1, order="none"),
    "gptq-8-bit": lambda rng, out, columns: packers.gptq(rng, out, columns, group=32, bits=8, version=2),
    "gptq-asymmetric": lambda rng, out, columns: packers.gptq(rng, out, columns, group=64, sym=False, version=2),
    "gptq-act-order": lambda rng, out, columns: packers.gptq(
        np.random.default_rng(columns), out, columns, order="act", scale_dtype=torch.bfloat16
    ),
    "awq": lambda rng, out, columns: packers.awq(rng, out, columns, group=64),
    "packed": lambda rng, out, columns: packers.packed(rng, out, columns, group=64),
    "packed-asymmetric": lambda rng, out, columns: packers.packed(rng, out, columns, group=64, sym=False),
    "packed-8-bit": lambda rng, out, columns: packers.packed(rng, out, columns, strategy="channel", bits=8),
    "fp8-block": lambda rng, out, columns: packers.eight_bit(
        rng,
        (out, columns),
        (64, 64),
        (-(-out // 64), -(-columns // 64)),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]},
        name="weight_scale_inv",
    ),
    "fp8-wide": lambda rng, out, columns: packers.eight_bit(
        rng,
        (out, columns),
        (128, 128),
        (-(-out // 128), -(-columns // 128)),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        name="weight_scale_inv",
        scale_dtype=torch.bfloat16,
    ),
    "fp8-inverse": lambda rng, out, columns: packers.eight_bit(
        rng,
        (out, columns),
        (64, 64),
        (-(-out // 64), -(-columns // 64)),
        {"quant_method": "fp8", "weight_block_size": [64, 64], "weight_scale_semantics": "inverse"},
        name="weight_scale_inv",
        inverse=True,
    ),
    "fp8-channel": lambda rng, out, columns: packers.eight_bit(
        rng, (out, columns), (1, columns), (out, 1), {"quant_method": "fbgemm_fp8"}, scale_dtype=torch.bfloat16
    ),
    "fp8-tensor": lambda rng, out, columns: packers.eight_bit(
        rng,
        (out, columns),
        (out, columns),
        (),
        {"quant_method": "fp8", "activation_scheme": "static"},
        static=True,
    ),
    "int8": lambda rng, out, columns: packers.eight_bit(
        rng, (out, columns), (1, columns), (out, 1), {"quant_method": "w8a8_int8"}, integer=True
    ),
}

#: Formats that no kernel of SGLang runs, in experts at least; the last one ours does not run either.
UNSUPPORTED: dict[str, Callable[[np.random.Generator, int, int], packers.Packed]] = {
    "gptq-3-bit": lambda rng, out, columns: packers.gptq(rng, out, columns, bits=3),
    "awq-32": lambda rng, out, columns: packers.awq(rng, out, columns, group=32),
    "gptq-asymmetric-act-order": lambda rng, out, columns: packers.gptq(rng, out, columns, order="act", sym=False),
    "int8-weight-only": lambda rng, out, columns: packers.eight_bit(
        rng, (out, columns), (1, columns), (out, 1), weight_only("int"), integer=True
    ),
    "packed-24": lambda rng, out, columns: packers.packed(rng, out, columns, group=24),
}


def weight_only(kind: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": []}


def write_experts(folder: Path, writer: str, *, intermediate: int, experts: int = 4, seed: int = 1) -> Path:
    """One layer of a Qwen3-MoE whose experts and attention are in this writer's format, "bf16" for plain ones."""
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": intermediate, "head_dim": 64, "num_key_value_heads": 4}
    described = models.config(layers=1, experts=experts, **sizes)
    found = _plain_tensors(experts, intermediate)
    if writer != "bf16":
        rng = np.random.default_rng(seed)
        for name in [name for name in found if name.endswith("_proj.weight")]:
            rows, columns = found.pop(name).shape
            packed = {**WRITERS, **UNSUPPORTED}[writer](rng, rows, columns)
            described["quantization_config"] = packed.config
            found |= {name.removesuffix("weight") + local: tensor for local, tensor in _of_one_size(packed).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    models.save(folder, found)
    return folder


def _of_one_size(packed: packers.Packed) -> models.Tensors:
    """The tensors with scales that give weights a standard deviation of 0.1: one format must not hide another."""
    factor = 0.1 / packed.reference.std()
    if "weight_scale_semantics" in packed.config:  # its scales divide
        factor = 1 / factor
    return {
        local: tensor * factor if local in ("scales", "weight_scale", "weight_scale_inv") else tensor
        for local, tensor in packed.tensors.items()
    }


def _plain_tensors(experts: int, intermediate: int) -> models.Tensors:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.1 * torch.randn(*shape, generator=generator)).to(torch.bfloat16)

    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (models.VOCABULARY, HIDDEN),
        "lm_head": (models.VOCABULARY, HIDDEN),
        "model.norm": (HIDDEN,),
        f"{layer}.input_layernorm": (HIDDEN,),
        f"{layer}.post_attention_layernorm": (HIDDEN,),
        f"{layer}.self_attn.q_norm": (64,),
        f"{layer}.self_attn.k_norm": (64,),
        f"{layer}.mlp.gate": (experts, HIDDEN),
        **{f"{layer}.self_attn.{name}_proj": (256, HIDDEN) for name in "qkv"},
        f"{layer}.self_attn.o_proj": (HIDDEN, 256),
    }
    for expert in range(experts):
        shapes |= {f"{PREFIX}.{expert}.{name}_proj": (intermediate, HIDDEN) for name in ("gate", "up")}
        shapes[f"{PREFIX}.{expert}.down_proj"] = (HIDDEN, intermediate)
    return {f"{name}.weight": random(*shape) for name, shape in shapes.items()}


@contextmanager
def loading(plan: RankPlan) -> Iterator[state.Loading]:
    """A load in progress, as the loader makes one."""
    proof: Any = None
    state.loading = state.Loading(plan, Ledger(), proof, transfer=transfer())
    try:
        yield state.loading
    finally:
        state.loading = None


def fill(plan: RankPlan, build: Callable[[], T]) -> T:
    """Build layers of ours and deliver everything they wait for, as the loader does."""
    with loading(plan) as current:
        built = build()
        for _ in current.transfer.stream(list(plan.reads()), ReadLog(), current):
            pass
        current.ledger.close()
        current.transfer.hashes([])
    return built


def experts(rank: RankPlan, device: str, dtype: torch.dtype = torch.bfloat16) -> ExpertsRun:
    """The first layer's experts as a served model runs them, on an accelerator."""
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from sglang_mixed.engine.layers.grouped_moe import MixedMoE
    from sglang_mixed.engine.names import expert_modules

    modules, layer = rank.plan.modules, torch.nn.Module()
    number = sum(name.startswith(PREFIX) and name.endswith(".down_proj") for name in modules)
    names = [expert_modules(PREFIX, expert, modules) for expert in range(number)]
    local = [tuple(modules[name] for name in three) for three in names if three[0] in rank.parts]
    method = MixedMoE(PREFIX, local)  # type: ignore[arg-type]
    hidden, columns = local[0][2].format.shape[0], rank.parts[local[0][2].name].wanted.columns

    def build() -> None:
        with torch.device(device):
            method.create_weights(layer, len(local), hidden, columns[1] - columns[0], dtype)
            method.create_moe_runner(layer, MoeRunnerConfig(num_experts=number, num_local_experts=len(local)))

    fill(rank, build)
    method.process_weights_after_loading(layer)

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        topk_output = StandardTopKOutput(weights, ids, torch.zeros(len(x), number, device=device))
        output: torch.Tensor = method.apply(layer, StandardDispatchOutput(x, None, topk_output)).hidden_states
        return output

    return run
