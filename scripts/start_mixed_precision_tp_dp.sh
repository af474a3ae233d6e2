#!/usr/bin/env bash
# SGLang with a map over 4 tensor-parallel ranks and 2 copies of the model, unless -t and -d say otherwise:
# -m MODEL -c|--config MAP [-t TP] [-d DP] [--test] [any flag of SGLang's]
# On several nodes: -a|--dist-addr HOST:PORT (where they meet) --rank R (the node's first rank) [--ranks-per-node N]
PATH="$PATH:$(dirname "$0")/../.venv/bin"
arguments=()
for one in "$@"; do
  case $one in
    -a | --dist-addr) one=--dist-init-addr ;;
    --config) one=-c ;;
  esac
  arguments+=("$one")
done
exec sglang-mixed serve -t 4 -d 2 "${arguments[@]}"
