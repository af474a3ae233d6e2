"""Every format, variant and odd shape: packed by an independent packer, detected, checked, decoded exactly."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable

import numpy as np
import packers
import pytest
import torch

from sglang_mixed.formats import ModuleFormat, detect, from_json, get_format, nbytes, to_json
from sglang_mixed.formats.base import TensorSpec

SHAPES = [(64, 128), (33, 128), (830, 544)]
ODD = [(128, 33), (830, 545), (256, 384)]

FP8 = {"quant_method": "fp8"}
BLOCK = {**FP8, "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
INVERSE = {**FP8, "weight_scale_method": "row", "weight_scale_semantics": "inverse", "format": "float8_e4m3fn"}


def compressed(kind: str, strategy: str, block: list[int] | None = None, dynamic: bool | None = True) -> dict:
    size = 32 if strategy == "group" else None
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "block_structure": block, "group_size": size}
    inputs = None if dynamic is None else {"num_bits": 8, "type": kind, "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


Build = Callable[[np.random.Generator], packers.Packed]
CASES: dict[str, tuple[Build, str]] = {}


def case(label: str, build: Build, name: str) -> None:
    CASES[f"{label} {name}"] = build, label


for bits in (2, 3, 4, 8):
    for (out, columns), sym, version, order, group in itertools.product(
        SHAPES, (True, False), (1, 2), ("none", "g_idx", "act"), (32, 128, -1)
    ):
        if out == 830 and (group == 32 or order == "g_idx"):
            continue
        size = columns if group == -1 else group
        notes = ("" if sym else " asym") + (" act-order" if order == "act" and size < columns else "")
        case(
            f"GPTQ int{bits} g{size}{notes}",
            lambda rng, o=out, c=columns, b=bits, g=group, s=sym, v=version, k=order: packers.gptq(
                rng, o, c, bits=b, group=g, sym=s, version=v, order=k
            ),
            f"{out}x{columns} v{version} {order} {group}",
        )

for (o, c), group in itertools.product([(64, 128), (24, 33), (832, 544)], (32, 128, -1)):
    case(
        f"AWQ int4 g{c if group == -1 else min(group, c)}",
        lambda rng, o=o, c=c, g=group: packers.awq(rng, o, c, group=g),
        f"{o}x{c} {group}",
    )

for bits, (o, c), sym in itertools.product((1, 2, 3, 4, 5, 6, 7, 8), SHAPES, (True, False)):
    for strategy, act_order in (("group", False), ("group", True), ("channel", False), ("tensor", False)):
        if (strategy == "tensor" and not sym) or (o == 830 and bits in (1, 2, 5, 7)):
            continue
        if not sym and o % 32 and 32 % bits:  # a unit of zero points that straddle words may not be cut short
            continue
        size = "g32" if strategy == "group" else strategy
        notes = ("" if sym else " asym") + (" act-order" if act_order else "")
        case(
            f"CT int{bits} {size}{notes}",
            lambda rng, o=o, c=c, b=bits, s=sym, t=strategy, a=act_order: packers.packed(
                rng, o, c, bits=b, sym=s, strategy=t, act_order=a
            ),
            f"{o}x{c}",
        )
case("CT int4 tensor asym", lambda rng: packers.packed(rng, 33, 128, strategy="tensor", sym=False), "33x128")
case("CT int4 g128", lambda rng: packers.packed(rng, 33, 128, group=256, shape_dtype=torch.int32), "group past the end")

for o, c in [(33, 128), (830, 544), (16, 40)]:
    for static in (False, True):
        case("NVFP4", lambda rng, o=o, c=c, s=static: packers.nvfp4(rng, o, c, static=s), f"{o}x{c} {static}")
        case(
            "NVFP4",
            lambda rng, o=o, c=c, s=static: packers.nvfp4(rng, o, c, static=s, modelopt=True),
            f"{o}x{c} {static} ModelOpt",
        )
    for writer in ("compressed-tensors", "quark", "deepseek"):
        case("MXFP4", lambda rng, o=o, c=c, w=writer: packers.mxfp4(rng, o, c, writer=w), f"{o}x{c} {writer}")
    for config, dtype in (
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, torch.uint8),
        ({**compressed("float", "group"), "format": "mxfp8-quantized"}, torch.uint8),
        ({**FP8, "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}, torch.float8_e8m0fnu),
    ):
        case(
            "FP8 1x32",
            lambda rng, s=(o, c), k=config, d=dtype: packers.mxfp8(rng, s, k, d),
            f"{o}x{c} {config['quant_method']}",
        )

case(
    "FP8 128x128",
    lambda rng: packers.mxfp8(rng, (830, 545), BLOCK, torch.float8_e8m0fnu, (128, 128)),
    "830x545 e8m0",
)

for o, c in ODD:
    for b, config, name, dtype in (
        ((128, 128), BLOCK, "weight_scale_inv", torch.float32),
        ((128, 128), BLOCK, "weight_scale_inv", torch.bfloat16),
        ((64, 32), {**BLOCK, "weight_block_size": [64, 32]}, "weight_scale_inv", torch.float32),
        ((128, 128), compressed("float", "block", [128, 128]), "weight_scale", torch.bfloat16),
    ):
        grid = (-(-o // b[0]), -(-c // b[1]))
        case(
            f"FP8 {b[0]}x{b[1]}",
            lambda rng, s=(o, c), b=b, g=grid, k=config, n=name, d=dtype: packers.eight_bit(
                rng, s, b, g, k, name=n, scale_dtype=d
            ),
            f"{o}x{c} {name} {dtype} {config['quant_method']}",
        )
    for label, b, scale_shape, config, options in (
        (
            "FP8 128x128",
            (128, 128),
            (-(-o // 128), 1, -(-c // 128), 1),
            {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"},
            {},
        ),
        ("FP8 channel", (1, c), (o, 1), compressed("float", "channel"), {}),
        ("FP8 channel", (1, c), (o,), FP8, {"scale_dtype": torch.bfloat16}),
        ("FP8 channel", (1, c), (o,), {}, {"scale_dtype": torch.float16}),
        ("FP8 channel", (1, c), (o,), INVERSE, {"name": "weight_scale_inv", "inverse": True}),
        ("FP8 tensor", (o, c), (1,), compressed("float", "tensor"), {}),
        ("FP8 tensor", (o, c), (), FP8, {}),
        ("FP8 tensor static", (o, c), (), {"quant_method": "modelopt", "quant_algo": "FP8"}, {"static": True}),
        ("FP8 tensor static", (o, c), (1,), compressed("float", "tensor", dynamic=False), {"static": True}),
        ("FP8 1x128", (1, 128), (o, -(-c // 128)), {**BLOCK, "weight_block_size": [1, 128]}, {}),
        ("INT8 channel", (1, c), (o, 1), compressed("int", "channel"), {"integer": True}),
        ("INT8 channel", (1, c), (o,), {}, {"integer": True, "scale_dtype": torch.float16}),
        ("INT8 channel", (1, c), (o, 1), compressed("int", "channel", dynamic=None), {"integer": True}),
        ("INT8 tensor", (o, c), (1,), compressed("int", "tensor"), {"integer": True}),
        ("INT8 tensor static", (o, c), (), compressed("int", "tensor", None, False), {"integer": True, "static": True}),
    ):
        case(
            label,
            lambda rng, s=(o, c), b=b, g=scale_shape, k=config, x=options: packers.eight_bit(rng, s, b, g, k, **x),
            f"{o}x{c} {list(scale_shape)} {config.get('quant_method')} {options}",
        )

for dtype, label in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
    for shape in ((33, 17), (5,), (4, 3, 2, 2), ()):
        case(label, lambda rng, s=shape, d=dtype: packers.plain(rng, s, d), f"{list(shape)}")


@pytest.mark.parametrize("name", CASES)
def test_decodes_exactly(name: str) -> None:
    build, label = CASES[name]
    module = build(np.random.default_rng(zlib.crc32(name.encode())))
    found = detect("model.layers.0.mlp", module.infos, module.config)
    weights = get_format(found.name)
    assert weights.label(found.parameters) == label
    assert found.shape == module.reference.shape
    assert nbytes(found) == sum(one.nbytes for one in module.tensors.values())
    assert from_json(json.loads(json.dumps(to_json(found)))) == found

    decoded = weights.dequantize(module.tensors, found.parameters, torch.float32)
    np.testing.assert_array_equal(decoded.numpy(), module.reference.astype(np.float32))
    half = weights.dequantize(module.tensors, found.parameters, torch.bfloat16)
    assert torch.equal(half, decoded.to(torch.bfloat16))
    check_axes(module, found)


def check_axes(module: packers.Packed, found: ModuleFormat) -> None:
    """The axes count right, and every tensor cut along its axis of one role decodes to the cut weight."""
    weights = get_format(found.name)
    specs = weights.tensors(found.parameters, found.shape)
    assert {local for local, spec in specs.items() if not spec.optional} == module.tensors.keys()
    for spec in specs.values():
        for axis, size in zip(spec.axes, spec.shape, strict=True):
            assert axis.role is None or axis.length(found.shape[axis.role == "in"]) == size
    # g_idx counts groups from the weight's first column, so a cut along `in` has to rebase it.
    # weight_shape says of how many columns.
    roles = ("out",) if {"g_idx", "weight_shape"} & module.tensors.keys() else ("out", "in")
    for dim, role in enumerate(roles[: len(found.shape) if len(found.shape) < 3 else 0]):
        units = [axis.values for spec in specs.values() for axis in spec.axes if axis.role == role]
        begin = found.shape[dim] // 2 // max(units) * max(units)
        cut = {local: cut_from(tensor, specs[local], role, begin) for local, tensor in module.tensors.items()}
        decoded = weights.dequantize(cut, found.parameters, torch.float32)
        expected = module.reference.take(range(begin, found.shape[dim]), dim)
        np.testing.assert_array_equal(decoded.numpy(), expected.astype(np.float32))


def cut_from(tensor: torch.Tensor, spec: TensorSpec, role: str, begin: int) -> torch.Tensor:
    for dim, axis in enumerate(spec.axes):
        if axis.role == role:
            tensor = tensor.narrow(dim, axis.length(begin), tensor.shape[dim] - axis.length(begin))
    return tensor
