"""A mixture of experts of several formats against a plain loop in float64."""

from __future__ import annotations

import pytest
import torch
from cases import built

from sglang_mixed.kernels import pack
from sglang_mixed.kernels.experts import ACTIVATIONS, Biases, Expert, Linear, clamped_swiglu, moe

HIDDEN, INTERMEDIATE, TOP_K = 128, 64, 2
SQUARE = ("gptq4 64x128 g32 True v1 g_idx", "gptq4 64x128 g64 False v2 act")


def linear(name: str) -> tuple[Linear, torch.Tensor]:
    module, format, _ = built(name)
    kernel, resident = pack(module.tensors, format)
    return lambda x: kernel.linear(x, resident, format), torch.from_numpy(module.reference).double()


def random_linear(out: int, columns: int, dtype: torch.dtype, seed: int) -> tuple[Linear, torch.Tensor]:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)).to(dtype) / columns**0.5
    return lambda x: (x.float() @ weight.float().t()).to(x.dtype), weight.double()


def experts() -> tuple[list[Expert], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Gate and up apart and compressed, or stacked and plain."""
    made, references = [], []
    for seed, name in enumerate((*SQUARE, None, None)):
        down, down_reference = random_linear(HIDDEN, INTERMEDIATE, torch.bfloat16, seed)
        if name:
            (gate, gate_reference), (up, up_reference) = linear(name), linear(SQUARE[0])
            gate_up, reference = [gate, up], torch.cat([gate_reference, up_reference])
        else:
            stacked, reference = random_linear(2 * INTERMEDIATE, HIDDEN, torch.float16, 10 + seed)
            gate_up = [stacked]
        made.append(Expert(gate_up, down))
        references.append((reference, down_reference))
    return made, references


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("rows", [0, 1, 3, 64])
def test_moe_is_the_plain_loop(rows: int, activation: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    made, references = experts()
    x = torch.randn(rows, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(4, generator=generator)[:TOP_K] for _ in range(rows)] or [torch.empty(2)])[:rows]
    ids = ids.to(torch.int32)
    ids[::3, 1] = -1
    weights = torch.rand(rows, TOP_K, generator=generator)
    y = moe(x, ids, weights, made, ACTIVATIONS[activation])
    expected = torch.zeros(rows, HIDDEN, dtype=torch.float64)
    for row in range(rows):
        for index, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
            if index >= 0:
                gate_up, down = references[index]
                gate, up = (gate_up @ x[row].double()).chunk(2)
                expected[row] += weight * (down @ (getattr(torch.nn.functional, activation)(gate) * up))
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    # Small weights are rounded to BF16, as in the dequantized model: three roundings in a row.
    assert (y.double() - expected).square().sum() <= 5e-5 * expected.square().sum()


def test_only_chosen_experts_run() -> None:
    def forbidden(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"an expert nobody chose got {len(x)} rows")

    made, _ = experts()
    made[2:] = [Expert([forbidden], forbidden)] * 2
    ids = torch.tensor([[0, 1], [-1, 0]])
    y = moe(torch.ones(2, HIDDEN).bfloat16(), ids, torch.ones(2, TOP_K), made)
    assert y.isfinite().all()


def test_clamped_experts_with_biases_are_what_sglang_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    (gate, gate_weight), (up, up_weight), (down, down_weight) = (
        random_linear(*shape, torch.bfloat16, seed)
        for seed, shape in enumerate([(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)])
    )
    biases = Biases(*(torch.randn(size, generator=generator).bfloat16() for size in (INTERMEDIATE, INTERMEDIATE, 128)))
    x = 4 * torch.randn(16, HIDDEN, generator=generator).bfloat16()
    alpha, limit = 1.702, 3.0
    expert = Expert([gate, up], down, biases)
    y = moe(x, torch.zeros(16, 1, dtype=torch.int32), torch.ones(16, 1), [expert], clamped_swiglu(alpha, limit))
    assert biases.gate is not None and biases.up is not None and biases.down is not None
    gates = x.double() @ gate_weight.T + biases.gate.double()
    ups = x.double() @ up_weight.T + biases.up.double()
    assert (gates > limit).any() and (ups.abs() > limit).any()
    gates, ups = gates.clamp(max=limit), ups.clamp(-limit, limit)
    expected = (gates * torch.sigmoid(alpha * gates) * (ups + 1)) @ down_weight.T + biases.down.double()
    assert (y.double() - expected).square().sum() <= 5e-5 * expected.square().sum()
