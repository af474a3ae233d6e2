#!/usr/bin/env bash
# SGLang with a map: -m MODEL -c MAP [-t TP] [-d DP] [-e EP] [-a HOST:PORT] [--test] [any flag of SGLang's]
PATH="$PATH:$(dirname "$0")/../.venv/bin"
exec sglang-mixed serve "$@"
