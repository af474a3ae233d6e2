"""The weights that kernels are tested on: every format, of shapes that do not fit."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sglang_mixed.formats import ModuleFormat, detect

sys.path.append(str(Path(__file__).parents[1] / "formats"))
import packers

Build = Callable[[np.random.Generator], packers.Packed]
CASES: dict[str, tuple[str, Build]] = {}

BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP8 = {**BLOCK, "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
INVERSE = {
    "quant_method": "fp8",
    "weight_scale_method": "row",
    "weight_scale_semantics": "inverse",
    "format": "float8_e4m3fn",
}


def compressed(kind: str, strategy: str) -> dict:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    inputs = {"num_bits": 8, "type": kind, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": []}


def gptq_cases() -> None:
    for out, columns in ((64, 128), (48, 256), (176, 512)):
        for group in (32, 64, 128, 256):
            if columns % group:
                continue
            for sym, version, order, dtype in (
                (True, 1, "g_idx", torch.float16),
                (True, 2, "none", torch.bfloat16),
                (True, 1, "act", torch.float32),
                (False, 1, "g_idx", torch.float16),
                (False, 2, "act", torch.bfloat16),
            ):
                CASES[f"gptq4 {out}x{columns} g{group} {sym} v{version} {order}"] = (
                    "int4",
                    lambda rng, a=(out, columns), g=group, s=sym, v=version, k=order, d=dtype: packers.gptq(
                        rng, *a, group=g, sym=s, version=v, order=k, scale_dtype=d
                    ),
                )
    for bits, out, columns, group in (
        (4, 40, 96, 32),
        (2, 48, 64, 32),
        (3, 96, 160, 32),
        (8, 36, 64, 64),
        (8, 132, 320, 128),
        (8, 64, 512, 32),
    ):
        for sym, order in ((True, "none"), (True, "act"), (False, "act")):
            is_ragged = order == "act" and columns % group
            CASES[f"gptq{bits} {out}x{columns} g{group} {sym} {order}"] = (
                "int8_words" if bits == 8 and sym and not is_ragged else "chunked",
                lambda rng, a=(out, columns), b=bits, g=group, s=sym, k=order: packers.gptq(
                    rng, *a, bits=b, group=g, sym=s, order=k
                ),
            )


def other_four_bit_cases() -> None:
    for out, columns, group in ((64, 128, 128), (48, 256, 32), (176, 512, 64), (80, 192, 192), (64, 96, -1)):
        size = columns if group == -1 else group
        CASES[f"gptq4 {out}x{columns} g{group} False v1 none"] = (
            "int4",
            lambda rng, a=(out, columns), g=group: packers.gptq(rng, *a, group=g, sym=False, order="none"),
        )
        for dtype in (torch.float16, torch.bfloat16):
            CASES[f"awq {out}x{columns} g{group} {dtype}"] = (
                "int4",
                lambda rng, a=(out, columns), g=group, d=dtype: packers.awq(rng, *a, group=g, scale_dtype=d),
            )
        for sym, order in ((True, False), (False, False), (True, True), (False, True)):
            CASES[f"packed4 {out}x{columns} g{group} {sym} {'act' if order else 'none'}"] = (
                "int4",
                lambda rng, a=(out, columns), g=size, s=sym, k=order: packers.packed(
                    rng, *a, group=g, sym=s, act_order=k and g < a[1]
                ),
            )
        for sym in (True, False):
            CASES[f"packed4 {out}x{columns} channel {sym}"] = (
                "int4",
                lambda rng, a=(out, columns), s=sym: packers.packed(rng, *a, strategy="channel", sym=s),
            )


def packed_fallback_cases() -> None:
    for name, options in (
        ("packed4 tensor", {"strategy": "tensor"}),
        ("packed4 g16", {"group": 16}),
        ("packed3 g32", {"bits": 3}),
        ("packed8 g32 asym", {"bits": 8, "sym": False}),
    ):
        CASES[name] = "chunked", lambda rng, x=options: packers.packed(rng, 48, 64, **x)


def eight_bit_cases() -> None:
    for out, columns in ((128, 256), (130, 36), (17, 1000)):
        for strategy, group in (("channel", None), ("tensor", None), ("group", 32), ("group", 128)):
            for order in (False, True) if strategy == "group" and columns % (group or 1) == 0 else (False,):
                CASES[f"packed8 {out}x{columns} {strategy} {group}{' act' if order else ''}"] = (
                    "int8_words",
                    lambda rng, a=(out, columns), s=strategy, g=group, k=order: packers.packed(
                        rng, *a, bits=8, strategy=s, group=g, act_order=k
                    ),
                )
    for o, c in ((128, 256), (130, 33), (830, 545), (16, 1000)):
        grid = (-(-o // 128), -(-c // 128))
        for kind in ("float", "int"):
            for strategy, block, scale in (("channel", (1, c), (o, 1)), ("tensor", (o, c), (1,))):
                name, config = f"{kind} {strategy} {o}x{c}", compressed(kind, strategy)
                options = {"integer": kind == "int", "scale_dtype": torch.bfloat16}
                CASES[name] = (
                    "int8" if kind == "int" else "fp8",
                    lambda rng, a=((o, c), block, scale, config), x=options: packers.eight_bit(rng, *a, **x),
                )
        for name, kernel, block, scale, config, options in (
            ("fp8 inverse", "fp8", (1, c), (o,), INVERSE, {"inverse": True}),
            ("fp8 128x128", "fp8", (128, 128), grid, BLOCK, {}),
            ("fp8 128x128 bf16", "fp8", (128, 128), grid, BLOCK, {"scale_dtype": torch.bfloat16}),
            ("fp8 128x128 e8m0", "fp8", (128, 128), grid, BLOCK, {"scale_dtype": torch.float8_e8m0fnu}),
            ("mxfp8", "fp8", (1, 32), (o, -(-c // 32)), MXFP8, {"scale_dtype": torch.float8_e8m0fnu}),
            ("fp8 64x32", "fp8", (64, 32), (-(-o // 64), -(-c // 32)), {**BLOCK, "weight_block_size": [64, 32]}, {}),
            ("fp8 1x128", "fp8", (1, 128), (o, grid[1]), {**BLOCK, "weight_block_size": [1, 128]}, {}),
        ):
            CASES[f"{name} {o}x{c}"] = (
                kernel,
                lambda rng, a=((o, c), block, scale, config), x={"name": "weight_scale_inv", **options}: (
                    packers.eight_bit(rng, *a, **x)
                ),
            )


gptq_cases()
other_four_bit_cases()
packed_fallback_cases()
eight_bit_cases()
for plain_dtype in (torch.bfloat16, torch.float16, torch.float32):
    CASES[f"plain {plain_dtype}"] = "plain", lambda rng, d=plain_dtype: packers.plain(rng, (70, 130), d)


def built(name: str) -> tuple[packers.Packed, ModuleFormat, torch.Generator]:
    seed = zlib.crc32(name.encode())
    module = CASES[name][1](np.random.default_rng(seed))
    return module, detect("m", module.infos, module.config), torch.Generator().manual_seed(seed)
