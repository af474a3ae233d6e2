"""Whether the base holds all layers and experts that its own config counts: no other source tells what a model has."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..errors import CoverageError, HeaderError
from ..patterns import MAX_LENGTH, NameTree
from .families import LAYERS, num_experts, text_config


def check_complete(tree: NameTree, base: Checkpoint) -> None:
    """Raise CoverageError where a layer, or an expert of a layer that has any, is missing. `tree`: the base's names.

    Raises HeaderError for a name that no pattern could write.
    """
    if len(tree.longest) > MAX_LENGTH:
        raise HeaderError(
            f"a tensor's name has more than {len(tree.longest)} characters",
            file=base.path,
            tensor=f"{tree.longest[:60]}...",
            rule=f"at most {MAX_LENGTH}, as for the patterns that name it",
            remedy="do not use this checkpoint",
        )
    config = base.config
    count, experts = int(text_config(config).get("num_hidden_layers") or 0), num_experts(config)
    for layers in LAYERS:
        found = tree.below(layers)
        for number in range(count) if found else ():
            if str(number) not in found:
                raise _missing(f"{layers}.{number}", f"num_hidden_layers is {count}", base)
            for owner in tree.below(f"{layers}.{number}"):
                held = tree.below(f"{layers}.{number}.{owner}.experts")
                if not held or len(held) == experts:
                    continue
                absent = next((str(expert) for expert in range(experts) if str(expert) not in held), None)
                if absent is not None:
                    raise _missing(f"{layers}.{number}.{owner}.experts.{absent}", f"it counts {experts} experts", base)


def _missing(name: str, said: str, base: Checkpoint) -> CoverageError:
    base.check_index()
    return CoverageError(
        "the base has no tensor of this part of the model",
        file=base.path,
        tensor=name,
        rule=f"the base holds all that its config.json counts: {said}",
        remedy="complete the download, or restore the config.json that belongs to these files",
    )
