"""What NVFP4 and MXFP4 share: 4-bit e2m1 values (OCP Microscaling), two to a byte, the even column in the low half."""

from __future__ import annotations

import torch

#: e2m1 code -> value; the upper bit is the sign.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack_values(octets: torch.Tensor) -> torch.Tensor:
    """uint8 or int8 [out, in/2] -> float32 [out, in]."""
    octets = octets.view(torch.uint8)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return torch.tensor(VALUES, device=octets.device)[codes.to(torch.int32)]


def scale_groups(values: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """[out, in] x [out, groups], each scale meeting its `group_size` columns."""
    return values * scale.repeat_interleave(group_size, 1)[:, : values.shape[1]]
