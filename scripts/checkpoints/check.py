"""Holds folders that `variants.py others OUT` made against what their tools decode: `check.py OUT [NAME ...]`.

Every module is recognised and counted to the byte; those of `reference.safetensors` decode to the tool's own values, to
the last bit but for NVFP4, whose tools round twice. Fails where one does not, unless the tool misreads its own file.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from common import BASE
from safetensors.torch import load_file

from sglang_mixed.checkpoint import Checkpoint, open_checkpoint
from sglang_mixed.formats import get_format, nbytes
from sglang_mixed.formats.base import CACHE_SCALES, tensor_bytes, weight_tensors
from sglang_mixed.formats.gptq import zero_offset_from

ULPS = 2.0**-22  # two units in the last place of float32


def decode(checkpoint: Checkpoint, module: str, base: torch.Tensor) -> torch.Tensor:
    """The weight in float32; the base decides where the file does not tell how zero points are stored."""
    found, tensors = checkpoint.format(module), checkpoint.read(module)
    parameters = found.parameters
    if not getattr(parameters, "zero_offset_known", True):
        offset = zero_offset_from(base, tensors, parameters)
        parameters = replace(parameters, zero_offset=offset, zero_offset_known=True)
    return get_format(found.name).dequantize(tensors, parameters, torch.float32)


def check(folder: Path, base: Checkpoint) -> bool:
    checkpoint = open_checkpoint(folder)
    tool = load_file(folder / "reference.safetensors")
    labels: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    worst = 0.0
    for module, tensors in checkpoint.modules.items():
        if tensors.keys() <= CACHE_SCALES:
            continue
        found = checkpoint.format(module)
        labels[get_format(found.name).label(found.parameters)] += 1
        stored = sum(tensor_bytes(info) for info in weight_tensors(tensors).values())
        verdicts["bytes differ"] += nbytes(found) != stored
        original = base.dequantize(module)
        weight = decode(checkpoint, module, original)
        error = float((weight - original).norm() / original.norm())
        worst = max(worst, error)
        if (said := tool.get(f"{module}.weight")) is None:
            continue
        if torch.equal(weight, said):
            verdicts["equal"] += 1
        elif found.name == "nvfp4" and torch.allclose(weight, said, rtol=ULPS, atol=0):
            verdicts["equal but for rounding"] += 1
        else:
            misread = float((said - original).norm() / original.norm()) > 2 * error
            verdicts["misread by the tool" if misread else "differ"] += 1
    print(f"{folder.name}: {dict(labels)}, at most {worst:.4f} from the base; {dict(+verdicts)}")
    return not verdicts["differ"] and not verdicts["bytes differ"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    names = args.names or sorted(path.parent.name for path in args.out.glob("*/reference.safetensors"))
    base = open_checkpoint(BASE)
    right = [check(args.out / name, base) for name in names]
    raise SystemExit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
