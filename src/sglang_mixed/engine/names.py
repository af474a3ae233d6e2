"""From SGLang's layer names to the checkpoint modules that fill them."""

from __future__ import annotations

from collections.abc import Mapping

from ..plan import families

Shard = str | int | None

#: SGLang's fused layer -> (shard id, last name part) of its parts: letters for q, k and v, else numbers.
FUSED: dict[str, tuple[tuple[Shard, str], ...]] = {
    matrix: tuple((part[0] if matrix == "qkv_proj" else number, part) for number, part in enumerate(parts))
    for matrix, parts in families.FUSED.items()
}


def fused_parts(prefix: str, modules: Mapping[str, object]) -> list[tuple[Shard, str]]:
    """(shard id, module name) of a linear layer's parts; one part without a shard where nothing is fused."""
    parent, _, last = prefix.rpartition(".")
    if prefix in modules or last not in FUSED:
        return [(None, prefix)]
    return [(shard, f"{parent}.{part}") for shard, part in FUSED[last]]


def expert_modules(prefix: str, expert: int, modules: Mapping[str, object]) -> tuple[str, str, str]:
    """Names of one expert's gate, up and down projection."""
    spellings = [tuple(f"{prefix}.{expert}.{part}" for part in parts) for parts in families.EXPERTS]
    gate, up, down = next((names for names in spellings if names[0] in modules), spellings[0])
    return gate, up, down
