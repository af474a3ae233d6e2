#!/usr/bin/env bash
# Makes the tiny checkpoints of examples/tiny again: trains the BF16 base, then quantizes it with the real tools,
# each in an environment of its own (.venv-TOOL). About 20 minutes on two idle cores. Needs only Python 3.11 and PyPI.
set -euo pipefail
cd "$(dirname "$0")/../.."

environment() { # NAME PACKAGE...
    local python=".venv-$1/bin/python"
    [ -e ".venv-$1/ready" ] && return
    python3 -m venv ".venv-$1"
    "$python" -m pip install -q torch==2.13.0 setuptools wheel packaging numpy ninja
    "$python" -m pip install -q --no-build-isolation torch==2.13.0 "${@:2}"
    touch ".venv-$1/ready"
}

environment train transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0
environment autoround auto-round==0.15.1 transformers==5.23.0 compressed-tensors==0.19.0
environment llmcompressor llmcompressor==0.14.0.1 compressed-tensors==0.19.0
environment compressedtensors compressed-tensors==0.18.0 transformers==5.23.0 # the last release that knows weight_g_idx
environment modelopt nvidia-modelopt==0.47.0 transformers==5.23.0 accelerate requests datasets
environment gptqmodel gptqmodel==7.6.0 transformers==5.23.0

export OMP_WAIT_POLICY=passive # threads that sleep while they wait: far faster on a machine that others use too
[ "${1:-}" = environments ] && exit
.venv-train/bin/python scripts/checkpoints/train.py
.venv-train/bin/python scripts/checkpoints/variants.py siblings
