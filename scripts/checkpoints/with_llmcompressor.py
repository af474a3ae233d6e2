"""Quantizes a checkpoint with llm-compressor: `with_llmcompressor.py OUT '{"scheme": ...}'`.

Schemes that need no calibration go through its `model_free_ptq`, which works on the files and so keeps
their per-expert names; static activation scales need `oneshot`, which makes one linear layer per expert first.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import torch
from common import arguments, calibration_ids, decompress, finish, report
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORE = ["lm_head", "re:.*mlp.gate$"]


def quantize(
    source: Path,
    out: Path,
    scheme: str,
    weights: dict[str, Any] | None = None,
    calibrate: bool = False,
    act_order: str | None = None,
    kv_cache: bool = False,
    **settings: Any,
) -> None:
    """`weights` changes the scheme's arguments of weights; `act_order` makes it GPTQ instead of rounding."""
    chosen = changed(scheme, weights) if weights else scheme
    if not calibrate:
        # Working on files it cannot tell an embedding from a linear layer, so that is named too.
        model_free_ptq(source, out, scheme=chosen, ignore=[*IGNORE, "re:.*embed_tokens$"], device="cpu", **settings)
        return
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16))
    data = Dataset.from_dict({"input_ids": [ids.tolist() for ids in calibration_ids(tokenizer, count=32)]})
    modifier = functools.partial(GPTQModifier, actorder=act_order) if act_order else QuantizationModifier
    if kv_cache:
        modifier = functools.partial(modifier, kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"})
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        num_calibration_samples=len(data),
        max_seq_length=len(data[0]["input_ids"]),
        recipe=modifier(config_groups={"group_0": changed(scheme, weights or {})}, ignore=IGNORE),
        output_dir=str(out),
        **settings,
    )


def changed(name: str, weights: dict[str, Any]) -> QuantizationScheme:
    """A preset scheme with some arguments of its weights changed."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    return scheme.model_copy(
        update={"weights": QuantizationArgs.model_validate({**scheme.weights.model_dump(), **weights})}
    )


def main() -> None:
    args = arguments(__doc__)
    shutil.rmtree(args.out, ignore_errors=True)
    quantize(args.source, args.out, **args.settings)
    finish(args.out)
    report(args.out, lambda module: decompress(args.out, module), args.reference)


if __name__ == "__main__":
    main()
