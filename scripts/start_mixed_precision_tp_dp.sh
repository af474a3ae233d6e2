#!/usr/bin/env bash
# The same with 4 tensor-parallel ranks and 2 copies of the model, unless -t and -d say otherwise.
# On several nodes: --rank R (the node's first rank) --ranks-per-node N --dist-init-addr HOST:PORT
PATH="$PATH:$(dirname "$0")/../.venv/bin"
exec sglang-mixed serve -t 4 -d 2 "$@"
