"""Models whose tensors lie on several devices: finding and gathering them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..errors import UnsupportedError


class _Found(NamedTuple):
    name: str
    kind: str
    owner: torch.nn.Module
    tensor: torch.Tensor


def validate_model_device_consistency(model: torch.nn.Module, device: torch.device | str) -> dict[str, Any]:
    """`is_consistent`, `issues` (a sentence per tensor elsewhere), `devices` (device -> tensors), `expected_device`.

    Looks at parameters, buffers, and tensors that are plain attributes of modules, which `model.to` forgets.
    """
    expected = torch.device(device)
    found = list(_tensors(model))
    issues = [
        f"{one.kind} {one.name} is on {one.tensor.device}, not on {expected}"
        for one in found
        if not _is_on(one.tensor, expected)
    ]
    return {
        "is_consistent": not issues,
        "issues": issues,
        "devices": dict(Counter(str(one.tensor.device) for one in found)),
        "expected_device": str(expected),
    }


def fix_moe_device_issues(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """Take everything to one device, routers, experts and tensors that are plain attributes included; the same model.

    Raises UnsupportedError for tensors on the `meta` device, which have no values to move.
    """
    expected = torch.device(device)
    if unloaded := [one.name for one in _tensors(model) if one.tensor.is_meta and expected.type != "meta"]:
        raise UnsupportedError(
            f"{len(unloaded)} tensors are on the meta device",
            tensor=unloaded[0],
            rule="a tensor there has no values",
            remedy="load the weights first",
        )
    model.to(expected)
    for _, kind, owner, tensor in list(_tensors(model)):
        if kind == "attribute":
            for name, value in vars(owner).items():
                if value is tensor:
                    setattr(owner, name, tensor.to(expected))
    return model


def comprehensive_device_fix(model: torch.nn.Module, tokenizer: Any, device: torch.device | str) -> dict[str, Any]:
    """`fix_moe_device_issues`; and a tokenizer without a padding token pads with its end of sequence.

    Returns `model_fixed` and `tokenizer_fixed` (whether there was something to fix), the `issues_found` before, and the
    `validation` after (as `validate_model_device_consistency`).
    """
    found = validate_model_device_consistency(model, device)
    pads_not = tokenizer is not None and getattr(tokenizer, "pad_token_id", None) is None
    if pads_not:
        tokenizer.pad_token = tokenizer.eos_token
    fix_moe_device_issues(model, device)
    return {
        "model_fixed": not found["is_consistent"],
        "tokenizer_fixed": pads_not,
        "issues_found": found["issues"],
        "validation": validate_model_device_consistency(model, device),
    }


def _tensors(model: torch.nn.Module) -> Iterator[_Found]:
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            yield _Found(dot + name, "parameter", module, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            yield _Found(dot + name, "buffer", module, buffer)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield _Found(dot + name, "attribute", module, value)


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """`cuda` means any of them, as one process has one current device."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)
