"""Quantizes a checkpoint with llm-compressor: `with_llmcompressor.py OUT '{"scheme": ...}'`.

Schemes that need no calibration go through its `model_free_ptq`, which works on the files and so keeps
their per-expert names; static activation scales need `oneshot`, which makes one linear layer per expert first.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from common import arguments, calibration_ids, finish, quantization_config, report, tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from datasets import Dataset
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORE = ["lm_head", "re:.*mlp.gate$"]


def quantize(source: Path, out: Path, scheme: str, calibrate: bool = False, **settings: Any) -> None:
    if not calibrate:
        # Working on files it cannot tell an embedding from a linear layer, so that is named too.
        model_free_ptq(source, out, scheme=scheme, ignore=[*IGNORE, "re:.*embed_tokens$"], device="cpu", **settings)
        return
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16))
    data = Dataset.from_dict({"input_ids": [ids.tolist() for ids in calibration_ids(tokenizer, count=32)]})
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        num_calibration_samples=len(data),
        max_seq_length=len(data[0]["input_ids"]),
        recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=IGNORE),
        output_dir=str(out),
        **settings,
    )


def dequantize(out: Path, module: str) -> torch.Tensor:
    """One module's weight as compressed-tensors decompresses it, in float32."""
    config = QuantizationConfig.model_validate(quantization_config(out))
    (scheme,) = config.config_groups.values()
    state = {n.rpartition(".")[2]: t for n, t in tensors(out).items() if n.startswith(module + ".")}
    state = {n: t.float() if "scale" in n else t for n, t in state.items()}
    return BaseCompressor.get_value_from_registry(config.format).decompress(state, scheme)["weight"].float()


def main() -> None:
    args = arguments(__doc__)
    shutil.rmtree(args.out, ignore_errors=True)
    quantize(args.source, args.out, **args.settings)
    finish(args.out)
    report(args.out, lambda module: dequantize(args.out, module), args.reference)


if __name__ == "__main__":
    main()
