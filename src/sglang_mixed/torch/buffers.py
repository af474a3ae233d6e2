"""Buffers that no checkpoint holds, such as rotary tables: those of a model that was built on the `meta` device."""

from __future__ import annotations

import torch

from ..errors import CoverageError


def compute_buffers(model: torch.nn.Module) -> None:
    """Compute what is on `meta` and in no `state_dict`, as transformers' models do when they are initialized.

    Raises CoverageError where nothing tells the values.
    """
    initialize = getattr(model, "_init_weights", None)
    for name, module in model.named_modules():
        names = module._non_persistent_buffers_set
        left = {local: one for local, one in module.named_buffers(recurse=False) if local in names and one.is_meta}
        if not left:
            continue
        for local, buffer in left.items():
            module._buffers[local] = _unset(buffer)
        if initialize is not None and next(module.parameters(recurse=False), None) is None:
            with torch.no_grad():
                initialize(module)
        for local in left:
            if _is_unset(module._buffers[local]):
                raise CoverageError(
                    "nothing tells the values of a buffer",
                    tensor=f"{name}.{local}" if name else local,
                    rule="a model on the meta device is filled from the checkpoints, and by transformers' own rules",
                    remedy="build the model on the CPU, where its constructor computes such buffers",
                )


def _unset(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer on the CPU, with values that no initialization leaves."""
    if buffer.is_floating_point():
        return torch.full(buffer.shape, torch.nan, dtype=buffer.dtype)
    return torch.full(buffer.shape, 0 if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).min).to(buffer.dtype)


def _is_unset(buffer: torch.Tensor | None) -> bool:
    if buffer is None or not buffer.numel():
        return False
    return bool(buffer.isnan().any()) if buffer.is_floating_point() else torch.equal(buffer, _unset(buffer))
