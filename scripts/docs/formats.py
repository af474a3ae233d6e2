"""docs/formats.md: every registered format, from its module's words and from what kernels say that they take."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from sglang_mixed.engine.layers.decoded import is_like_those_measured
from sglang_mixed.engine.layers.linear_methods import why_not as why_not_stock
from sglang_mixed.formats import FORMATS, ModuleFormat, get_format, nbytes, tensor_specs
from sglang_mixed.formats.awq import AWQParameters
from sglang_mixed.formats.fp8 import FP8Parameters
from sglang_mixed.formats.gptq import GPTQParameters
from sglang_mixed.formats.int8 import Int8Parameters
from sglang_mixed.formats.mxfp4 import MXFP4Parameters
from sglang_mixed.formats.nvfp4 import NVFP4Parameters
from sglang_mixed.formats.packed import PackedParameters
from sglang_mixed.formats.plain import PlainParameters
from sglang_mixed.kernels import KERNELS, get_kernel
from sglang_mixed.kernels.grouped.codec import why_not as why_not_ours

SHAPE = (4096, 4096)
HEAD = """\
# Formats

<!-- Written by scripts/docs/write.py from the registry of formats and the kernels. -->

A source's format is detected module by module from its config and tensors, never from the source's name. What is stored
in a way that no format explains is refused by name (GGUF, bitsandbytes, EXL2 and others are known by sight).

"Fast" on a CPU is a kernel of torch or of our own in C that computes from the compressed weight; INT8 is fast where
the processor adds int8 products exactly (VNNI or AMX). "Reference" is the format's exact decoder, a few rows at a time:
slow. Small matrices, and shapes that no fast kernel takes, use it too. Activations stay in 16 bits on a CPU. On a GPU
"SGLang" names its own method, which quantizes activations for FP8 and INT8; "our Triton kernel" decodes into tensor
cores and leaves activations in 16 bits. The experts of a layer that mixes formats run on it together, whatever the
lines below say: one launch was faster than one a format in every size measured. "Hopper" is what it was measured on;
there 16-bit routers run on it too, for up to 64 tokens.
`SGLANG_MIXED_TRITON=mixed` leaves weights of uniform layers to SGLang where it has kernels, `needed` those of layers
that mix as well; `all` takes everything but 16-bit layers. The lines about GPUs are what the code chooses;
[what ran](performance.md) is another matter.

Bytes are those of a 4096 x 4096 weight, whose 16 bits are 33,554,432.
"""


@dataclass(frozen=True, slots=True)
class About:
    """What the code does not say: who writes it, where it is defined, and the variants to show."""

    title: str
    written_by: str
    defined_in: str
    variants: Sequence[Any]


def _gptq(bits: int, group: int = 128, symmetric: bool = True, act_order: bool = False) -> GPTQParameters:
    return GPTQParameters(bits, group, symmetric, act_order, act_order, 1, "F16")


def _fp8(granularity: str, block: tuple[int, int] | None, scales: tuple[int, ...], **more: Any) -> FP8Parameters:
    more = {"scale_name": "weight_scale", "scale_dtype": "F32", **more}
    return FP8Parameters(granularity, block, scale_shape=scales, **more)


def _packed(bits: int, strategy: str = "group", symmetric: bool = True) -> PackedParameters:
    return PackedParameters(bits, strategy, 128 if strategy == "group" else SHAPE[1], symmetric, False, "BF16")


GPTQMODEL = "[GPTQModel](https://github.com/ModelCloud/GPTQModel)"
AUTOROUND = "[AutoRound](https://github.com/intel/auto-round)"
LLMCOMPRESSOR = "[llm-compressor](https://github.com/vllm-project/llm-compressor)"
MODELOPT = "[ModelOpt](https://github.com/NVIDIA/Model-Optimizer)"
TENSORS = "[compressed-tensors](https://github.com/vllm-project/compressed-tensors)"
OCP = "[OCP Microscaling (MX) v1.0](https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf)"
OCP8 = "[OCP 8-bit floating point v1.0](https://www.opencompute.org/documents/ocp-8-bit-floating-point-specification-ofp8-revision-1-0-2023-12-01-pdf-1)"
DEEPSEEK = "[DeepSeek-V3's README](https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md)"

ABOUT = {
    "gptq": About(
        "GPTQ",
        f"AutoGPTQ, {GPTQMODEL}, {AUTOROUND} (`auto_gptq`, `auto_round`)",
        f"the writers' packing code; v1 stores a zero point less one, v2 as it is ({GPTQMODEL})",
        [_gptq(2), _gptq(3), _gptq(4), _gptq(8), _gptq(4, symmetric=False), _gptq(4, act_order=True), _gptq(4, 16)],
    ),
    "awq": About(
        "AWQ",
        f"AutoAWQ, {GPTQMODEL}, {AUTOROUND} (`auto_awq`)",
        "AutoAWQ's GEMM layout",
        [AWQParameters(4, 128, "F16")],
    ),
    "packed": About(
        "Packed integers",
        LLMCOMPRESSOR,
        f"{TENSORS}, `pack-quantized`",
        [
            _packed(2),
            _packed(3),
            _packed(4),
            _packed(8),
            _packed(4, symmetric=False),
            _packed(4, "channel"),
            _packed(4, "tensor"),
        ],
    ),
    "fp8": About(
        "FP8 and MXFP8",
        f"{LLMCOMPRESSOR}, {MODELOPT}, {GPTQMODEL}, and model makers (DeepSeek, Qwen)",
        f"{OCP8} for the values, {DEEPSEEK} for blocks, {OCP} for MXFP8",
        [
            _fp8("block", (128, 128), (32, 32), scale_name="weight_scale_inv"),
            _fp8("channel", None, (4096, 1)),
            _fp8("tensor", None, (1,)),
            _fp8("tensor", None, (), activations="static", input_scale=("F32", ())),
            _fp8("block", (1, 32), (4096, 128), scale_dtype="U8"),
        ],
    ),
    "int8": About(
        "INT8",
        f"{LLMCOMPRESSOR}, {AUTOROUND}",
        f"{TENSORS}, `int-quantized`",
        [
            Int8Parameters("channel", "weight_scale", "BF16", (4096, 1), "dynamic"),
            Int8Parameters("tensor", "weight_scale", "BF16", (1,), "dynamic"),
        ],
    ),
    "nvfp4": About(
        "NVFP4",
        f"{LLMCOMPRESSOR}, {MODELOPT}",
        f"{TENSORS}, `nvfp4-pack-quantized`; {MODELOPT}",
        [NVFP4Parameters("modelopt", ("F32", ()))],
    ),
    "mxfp4": About(
        "MXFP4",
        f"{LLMCOMPRESSOR}, {AUTOROUND}, [Quark](https://github.com/amd/Quark), and model makers (DeepSeek, GPT-OSS)",
        OCP,
        [MXFP4Parameters("weight_packed", "U8", "weight_scale", "U8")],
    ),
    "plain": About(
        "16 and 32 bits",
        "everybody",
        "[safetensors](https://github.com/huggingface/safetensors)",
        [PlainParameters("BF16", ("weight",)), PlainParameters("F32", ("weight",))],
    ),
}


def page() -> str:
    """The page in Markdown. Raises KeyError for a format that is registered and not described here."""
    return "\n".join([HEAD, *(line for name in FORMATS for line in _section(name, ABOUT[name]))])


def _section(name: str, about: About) -> list[str]:
    words = importlib.import_module(f"sglang_mixed.formats.{name}").__doc__ or ""
    # Products and indices are no emphasis and no links.
    words = words.strip().replace("*", "\\*").replace("[", "\\[")
    lines = [
        f"## {about.title}",
        "",
        words,
        "",
        f"Written by {about.written_by}. Defined in {about.defined_in}.",
    ]
    lines += [
        f"Read by `formats/{name}.py`.",
        "",
        "| variant | tensors | bytes | CPU | GPU |",
        "| --- | --- | --- | --- | --- |",
    ]
    for parameters in about.variants:
        module_format = ModuleFormat(name, parameters, SHAPE)
        tensors = ", ".join(f"`{local}`" for local, spec in tensor_specs(module_format).items() if not spec.optional)
        label = get_format(name).label(parameters)
        lines.append(
            f"| {label} | {tensors} | {nbytes(module_format):,} | {cpu(module_format)} | {gpu(module_format)} |"
        )
    return [*lines, ""]


def cpu(module_format: ModuleFormat) -> str:
    """Which kernel the CPU runs it on, where int8 products are exact."""
    exact = patch.multiple("sglang_mixed.kernels.int8", integers_are_exact=lambda: True)
    with exact, patch.multiple("sglang_mixed.kernels.int8_words", integers_are_exact=lambda: True):
        name = next(name for name in KERNELS if get_kernel(name).takes(module_format))
    return {"plain": "`F.linear`", "chunked": "reference"}.get(name, "fast")


def gpu(module_format: ModuleFormat) -> str:
    """Which kernel a GPU runs it on, or why none does."""
    reason = why_not_stock(module_format)
    if reason is None and is_like_those_measured(module_format):
        return "our Triton kernel on Hopper, else SGLang, Marlin"
    if reason is None:
        return {"plain": "SGLang, 16 bits", "fp8": "SGLang, FP8", "int8": "SGLang, INT8"}.get(
            module_format.name, "SGLang, Marlin"
        )
    ours = why_not_ours(module_format)
    return f"our Triton kernel: {reason}" if ours is None else f"refused: {reason}; {ours}"
