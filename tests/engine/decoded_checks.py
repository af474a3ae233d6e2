"""What `test_gpu_decoded.py` runs in a process where Triton interprets: layers of ours on their real Triton kernels.

In float32, whose products the interpreter computes exactly: what is wrong by little shows. SGLang's own kernels, of the
other experts of a layer, are stand-ins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from sglang_mixed.engine.layers import decoded
from sglang_mixed.engine.layers.grouped_moe import MixedMoE
from sglang_mixed.engine.layers.plain_linear import PlainLinear
from sglang_mixed.engine.layers.split_linear import SplitLinear
from sglang_mixed.engine.layers.stock_methods import StockMethods
from sglang_mixed.engine.names import expert_modules
from sglang_mixed.plan import Plan, Rank, RankPlan, make_plan

from .layers import fill
from .stand_ins import replace_expert_kernels

replace_expert_kernels(setattr)
TOKENS, TOP_K = 7, 2
EXPERTS_NAME = "model.layers.0.mlp.experts"


def experts(path: Path, tp: int = 1, ep: int = 1, **config: Any) -> dict[str, Any]:
    """The squared error of a map's first MoE layer, added up over ranks, what ran it, and its bytes on every rank."""
    plan, dtype = make_plan(path), torch.float32
    number = sum(name.startswith(EXPERTS_NAME) and name.endswith(".down_proj") for name in plan.modules)
    hidden = plan.modules[f"{EXPERTS_NAME}.0.down_proj"].format.shape[0]
    x, weights, ids = inputs(hidden, number)
    total, ranks = torch.zeros(TOKENS, hidden, dtype=torch.float64), []
    for rank in (plan.rank(Rank(tp, ep, one)) for one in range(tp)):
        method, layer = fill(rank, lambda rank=rank: build(rank, number, dtype, config))
        read = bytes_of(layer) - sum(group.padding for group in method.groups)
        method.process_weights_after_loading(layer)
        held = bytes_of(layer) - sum(group.padding for group in method.groups)
        first, local = rank.rank.number // rank.rank.expert_tp * (number // ep), number // ep
        own = torch.where((ids >= first) & (ids < first + local), ids - first, -1).to(torch.int32)
        topk = StandardTopKOutput(weights, own, torch.zeros(TOKENS, number))
        total += method.apply(layer, StandardDispatchOutput(x, None, topk)).hidden_states
        planned = sum(rank.module_bytes(name) for name in rank.parts if name.startswith(EXPERTS_NAME))
        kinds = [type(group).__name__ for group in method.groups]
        ranks.append({"kinds": kinds, "read": read, "held": held, "planned": planned})
    expected = reference(plan, x, weights, ids, config)
    error = (total - expected).square().sum(0) / expected.square().sum(0)
    return {"error": float(error.max()), "ranks": ranks}


def bytes_of(layer: torch.nn.Module) -> int:
    return sum(one.nbytes for one in layer.parameters())


def build(rank: RankPlan, number: int, dtype: torch.dtype, config: Any) -> tuple[MixedMoE, torch.nn.Module]:
    modules, layer = rank.plan.modules, torch.nn.Module()
    names = [expert_modules(EXPERTS_NAME, one, modules) for one in range(number)]
    local = [tuple(modules[name] for name in three) for three in names if three[0] in rank.parts]
    method: Any = StockMethods(rank).experts(EXPERTS_NAME, local)  # type: ignore[arg-type]
    columns = rank.parts[local[0][2].name].wanted.columns
    hidden = local[0][2].format.shape[0]
    with_bias = local[0][0].bias is not None
    method.create_weights(layer, len(local), hidden, columns[1] - columns[0], dtype, with_bias=with_bias)
    runner = {"num_experts": number, "num_local_experts": len(local), "activation": "silu", **config}
    method.create_moe_runner(layer, MoeRunnerConfig(**runner))
    return method, layer


def inputs(hidden: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(TOKENS, number, generator=generator).topk(TOP_K).indices
    ids[2, 0] = -1
    return torch.randn(TOKENS, hidden, generator=generator), torch.rand(TOKENS, TOP_K, generator=generator), ids


def reference(plan: Plan, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, config: Any) -> torch.Tensor:
    output = torch.zeros(x.shape, dtype=torch.float64)
    for expert in sorted({int(one) for one in ids.flatten() if one >= 0}):
        (gate, first), (up, second), (down, third) = (
            matrix(plan, name) for name in expert_modules(EXPERTS_NAME, expert, plan.modules)
        )
        one, other = x.double() @ gate.T + first, x.double() @ up.T + second
        if alpha := config.get("gemm1_alpha"):
            limit = config["gemm1_clamp_limit"]
            one = one.clamp(max=limit)
            hidden = one * torch.sigmoid(alpha * one) * (other.clamp(-limit, limit) + 1)
        else:
            hidden = torch.nn.functional.silu(one) * other
        output += (hidden @ down.T + third) * (weights.double() * (ids == expert)).sum(1, keepdim=True)
    return output * config.get("routed_scaling_factor", 1)


def matrix(plan: Plan, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 weight and bias."""
    module = plan.modules[name]
    checkpoint = plan.checkpoints[module.source]
    weight = checkpoint.dequantize(name).double()
    return weight, checkpoint.read(name)["bias"].double() if module.bias else torch.zeros(len(weight)).double()


def linear(path: Path, prefix: str, names: tuple[str, ...], tp: int = 1, number: int = 0) -> dict[str, Any]:
    """The squared error of a linear layer's product on one rank, what ran it, and its bytes."""
    plan = make_plan(path)
    rank, modules = plan.rank(Rank(tp, 1, number)), [plan.modules[f"{prefix}.{name}"] for name in names]
    regions = [rank.parts[module.name].wanted for module in modules]
    rows = [end - begin for (begin, end), _ in regions]
    first, last = regions[0].columns
    method, layer = SplitLinear(modules), torch.nn.Module()
    whole = [module.format.shape for module in modules]
    size = last - first, rows, whole[0][1], sum(shape[0] for shape in whole)
    fill(rank, lambda: method.create_weights(layer, *size, torch.float32))
    method.process_weights_after_loading(layer)
    x, bias = torch.randn(3, 2, last - first), torch.randn(sum(rows))
    cut = [
        matrix(plan, module.name)[0][slice(*region.rows), slice(*region.columns)]
        for module, region in zip(modules, regions, strict=True)
    ]
    expected = x.double() @ torch.cat(cut).T + bias.double()
    found = method.apply(layer, x, bias)
    return {
        "error": float((found - expected).square().sum() / expected.square().sum()),
        "kinds": [type(run).__name__ for run in method.runs],
        "held": bytes_of(layer) - sum(run.padding for run in method.runs),
        "planned": sum(rank.module_bytes(module.name) for module in modules),
    }


def plain(outputs: int, columns: int, rows: int, dtype: torch.dtype, is_measured: bool = True) -> dict[str, Any]:
    """The squared error of a plain linear layer's product, and whether SGLang's method computed it."""
    method, layer = PlainLinear(), torch.nn.Module()
    method.create_weights(layer, columns, [outputs], columns, outputs, dtype)
    layer.weight.data.normal_()
    with mock.patch.object(decoded, "is_measured_gpu", lambda: is_measured):
        method.process_weights_after_loading(layer)
    x, bias = torch.randn(rows, columns, dtype=dtype), torch.randn(outputs, dtype=dtype)
    with mock.patch.object(
        UnquantizedLinearMethod, "apply", autospec=True, side_effect=UnquantizedLinearMethod.apply
    ) as stock:
        found = method.apply(layer, x, bias)
    expected = x.double() @ layer.weight.double().T + bias.double()
    return {"error": float((found - expected).square().sum() / expected.square().sum()), "is_stock": stock.called}
