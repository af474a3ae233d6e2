"""From SGLang's layer names to the checkpoint modules that fill them."""

from __future__ import annotations

from collections.abc import Mapping

Shard = str | int | None

#: SGLang's fused layer -> (shard id, checkpoint module) of its parts.
FUSED: dict[str, tuple[tuple[Shard, str], ...]] = {
    "qkv_proj": (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")),
    "gate_up_proj": ((0, "gate_proj"), (1, "up_proj")),
    "fused_qkv_a_proj_with_mqa": ((0, "q_a_proj"), (1, "kv_a_proj_with_mqa")),
}
#: What checkpoints call an expert's gate, up and down projection.
EXPERTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def fused_parts(prefix: str, modules: Mapping[str, object]) -> list[tuple[Shard, str]]:
    """(shard id, module name) of a linear layer's parts; one part without a shard where nothing is fused."""
    parent, _, last = prefix.rpartition(".")
    if prefix in modules or last not in FUSED:
        return [(None, prefix)]
    return [(shard, f"{parent}.{part}") for shard, part in FUSED[last]]


def expert_modules(prefix: str, expert: int, modules: Mapping[str, object]) -> tuple[str, str, str]:
    """Names of one expert's gate, up and down projection."""
    spellings = [tuple(f"{prefix}.{expert}.{part}" for part in parts) for parts in EXPERTS]
    gate, up, down = next((names for names in spellings if names[0] in modules), spellings[0])
    return gate, up, down
