"""Makes quantized folders with the real tools: the committed siblings, or other settings for tests.

`variants.py siblings` writes beside the BF16 base; `variants.py others OUT [NAME ...]` writes OUT/NAME folders,
each with a `reference.safetensors` that holds the weights as the tool itself decodes them (`check.py` compares).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
Table = dict[str, tuple[str, dict[str, Any]]]


def autoround(bits: int, group_size: int, sym: bool = True, **more: Any) -> tuple[str, dict[str, Any]]:
    settings = {"bits": bits, "group_size": group_size, "sym": sym, "iters": 5, "format": "auto_gptq"}
    return "autoround", {"scheme": "W4A16", **settings, **more}


def llmcompressor(scheme: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "llmcompressor", {"scheme": scheme, **more}


def gptqmodel(bits: int = 4, group_size: int = 128, **more: Any) -> tuple[str, dict[str, Any]]:
    return "gptqmodel", {"bits": bits, "group_size": group_size, "desc_act": False, **more}


SIBLINGS: Table = {
    "gptq-int4": autoround(4, 128, iters=50),
    "fp8-block": ("llmcompressor", {"scheme": "FP8_BLOCK"}),
    "fp8-channel": ("llmcompressor", {"scheme": "FP8_DYNAMIC"}),
    "int8": ("llmcompressor", {"scheme": "W8A8"}),
}
VARIANTS: Table = {
    "gptqmodel-act-order": gptqmodel(desc_act=True),
    "gptqmodel-act-order-g32": gptqmodel(group_size=32, desc_act=True),
    "gptqmodel-act-order-static": gptqmodel(group_size=32, desc_act=True, static_groups=True),
    "gptqmodel-asym": gptqmodel(sym=False),
    "gptqmodel-v2": gptqmodel(format="gptq_v2"),
    "gptqmodel-v2-asym": gptqmodel(sym=False, format="gptq_v2"),
    "gptqmodel-8bit": gptqmodel(bits=8),
    "gptqmodel-3bit": gptqmodel(bits=3),
    "gptqmodel-2bit": gptqmodel(bits=2, group_size=32),
    "gptqmodel-sharded": gptqmodel(max_shard_size="1MB"),
    "gptqmodel-fp8-row": ("gptqmodel", {"kind": "fp8", "weight_scale_method": "row"}),
    "gptqmodel-fp8-tensor": ("gptqmodel", {"kind": "fp8", "weight_scale_method": "tensor"}),
    "gptqmodel-fp8-block": (
        "gptqmodel",
        {"kind": "fp8", "weight_scale_method": "block", "weight_block_size": [128, 128]},
    ),
    "autoround-asym": autoround(4, 128, sym=False),
    "autoround-g32": autoround(4, 32),
    "autoround-g64": autoround(4, 64),
    "autoround-channel": autoround(4, -1),
    "autoround-8bit": autoround(8, 128),
    "autoround-3bit": autoround(3, 128),
    "autoround-2bit": autoround(2, 32),
    "autoround-sharded": autoround(4, 128, max_shard_size="1MB"),
    "autoround-own-format": autoround(4, 128, format="auto_round"),
    "autoround-fp8-block": ("autoround", {"scheme": "FP8_BLOCK", "iters": 0, "format": "auto_round"}),
    "autoround-fp8-block-hub": ("autoround", {"scheme": "FP8_BLOCK", "iters": 0, "format": "fp8"}),
    "autoround-fp8-static": ("autoround", {"scheme": "FP8_STATIC", "iters": 0, "format": "llm_compressor"}),
    "autoround-int8": ("autoround", {"scheme": "INT8", "iters": 0, "format": "llm_compressor"}),
    "llmcompressor-fp8-static": llmcompressor("FP8", calibrate=True),
    "llmcompressor-fp8-dynamic-oneshot": llmcompressor("FP8_DYNAMIC", calibrate=True),
    "autoround-awq": autoround(4, 128, sym=False, format="auto_awq"),
    "autoround-awq-sym": autoround(4, 64, format="auto_awq"),
    "autoround-own-awq": autoround(4, 128, sym=False, format="auto_round:auto_awq"),
    "autoround-own-asym": autoround(4, 128, sym=False, format="auto_round"),
    "autoround-own-asym-2bit": autoround(2, 32, sym=False, format="auto_round"),
    "autoround-own-asym-gptq": autoround(4, 128, sym=False, format="auto_round:auto_gptq"),
    "autoround-own-asym-gptqmodel": autoround(4, 128, sym=False, format="auto_round:gptqmodel"),
    "autoround-model-free-asym": autoround(4, 128, sym=False, iters=0, disable_opt_rtn=True, format="auto_round"),
    "autoround-packed": autoround(4, 128, format="llm_compressor"),
    "autoround-nvfp4": ("autoround", {"scheme": "NVFP4", "iters": 0, "format": "llm_compressor"}),
    "autoround-own-nvfp4": ("autoround", {"scheme": "NVFP4", "iters": 0, "format": "auto_round"}),
    "autoround-mxfp4": ("autoround", {"scheme": "MXFP4", "iters": 0, "format": "llm_compressor"}),
    "autoround-own-mxfp4": ("autoround", {"scheme": "MXFP4", "iters": 0, "format": "auto_round"}),
    "llmcompressor-w4a16": llmcompressor("W4A16"),
    "llmcompressor-w4a16-asym": llmcompressor("W4A16_ASYM"),
    "llmcompressor-w4a16-channel": llmcompressor("W4A16", weights={"strategy": "channel", "group_size": None}),
    "llmcompressor-w4a16-tensor": llmcompressor("W4A16", weights={"strategy": "tensor", "group_size": None}),
    "llmcompressor-w4a16-gptq": llmcompressor("W4A16", calibrate=True, act_order="weight"),
    "compressedtensors-act-order": ("compressedtensors", {"num_bits": 4, "group_size": 32, "symmetric": True}),
    "compressedtensors-act-order-asym": ("compressedtensors", {"num_bits": 4, "group_size": 64, "symmetric": False}),
    "llmcompressor-w8a16": llmcompressor("W8A16"),
    "llmcompressor-w3a16": llmcompressor("W3A16"),
    "llmcompressor-w6a16": llmcompressor("W6A16"),
    "llmcompressor-nvfp4a16": llmcompressor("NVFP4A16"),
    "llmcompressor-mxfp4a16": llmcompressor("MXFP4A16"),
    "llmcompressor-mxfp8a16": llmcompressor("MXFP8A16"),
    "modelopt-fp8": ("modelopt", {"config": "FP8_DEFAULT_CFG"}),
    "modelopt-fp8-kv": ("modelopt", {"config": "FP8_DEFAULT_CFG", "kv_cache": "FP8_AFFINE_KV_CFG"}),
    "modelopt-fp8-channel": ("modelopt", {"config": "FP8_PER_CHANNEL_PER_TOKEN_CFG"}),
    "modelopt-fp8-block": ("modelopt", {"config": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"}),
    "modelopt-nvfp4": ("modelopt", {"config": "NVFP4_DEFAULT_CFG"}),
    "modelopt-nvfp4a16": ("modelopt", {"config": "W4A16_NVFP4_CFG"}),
    "modelopt-mxfp4": ("modelopt", {"config": "MXFP4_DEFAULT_CFG"}),
    "modelopt-mxfp8": ("modelopt", {"config": "MXFP8_DEFAULT_CFG"}),
    "llmcompressor-fp8-kv": llmcompressor("FP8", calibrate=True, kv_cache=True),
}


def make(name: str, tool: str, settings: dict[str, Any], out: Path, *flags: str) -> bool:
    """Runs one tool in its own environment; its log goes beside the folder when it fails."""
    script = Path(__file__).with_name(f"with_{tool}.py")
    command = [ROOT / f".venv-{tool}/bin/python", script, out / name, json.dumps(settings), *flags]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
    print(f"{name}: {'made' if done.returncode == 0 else 'FAILED'} in {time.time() - start:.0f} s", *lines, sep="\n  ")
    if done.returncode:
        (out / f"{name}.log").write_text(done.stdout + done.stderr)
        print(f"  see {name}.log: {(done.stderr.strip().splitlines() or ['no error text'])[-1]}")
    sys.stdout.flush()
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("siblings")
    others = commands.add_parser("others")
    others.add_argument("out", type=Path)
    others.add_argument("names", nargs="*", help=f"some of {', '.join(VARIANTS)}")
    args = parser.parse_args()
    if args.command == "siblings":
        made = [make(name, *SIBLINGS[name], ROOT / "examples" / "tiny") for name in SIBLINGS]
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        made = [make(name, *VARIANTS[name], args.out, "--reference") for name in args.names or VARIANTS]
    raise SystemExit(0 if all(made) else 1)


if __name__ == "__main__":
    main()
