"""Triton kernels that read each weight in its own format: MoE layers of mixed experts, and formats without a kernel.

`codec` says how a weight is read, `arrange` brings it there, `table` tells the kernels where it lies. `decode`,
`product`, `activation`, `passes` and `parts` are the kernels, `experts` and `linear` the layers that launch them; only
these import Triton.
"""
