"""`torch_cpu`: the out-of-tree platform that runs SGLang in plain PyTorch where there is no accelerator."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

#: Environment that SGLang reads, where the operator has not set it.
ENVIRONMENT = {
    # All ranks of a host measure one memory, each at its own time: SGLang takes the difference for an imbalance.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    # A server that fails would wait a minute for a GPU's core dumps.
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
}


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: the platform's class, or None where there is an accelerator."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or torch.accelerator.is_available():
        return None
    return f"{__name__}.TorchCPUPlatform"


def runs_on_torch_cpu() -> bool:
    """Whether this process computes on `torch_cpu`."""
    # SGLang resolves the platform on first access, for which it imports this very module.
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, TorchCPUPlatform)


class TorchCPUPlatform(SRTPlatform):
    """SGLang's own scheduler, radix cache and HTTP server, computing in plain torch."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_device(self, device_id: int = 0) -> str:
        """Every rank shares the one CPU device."""
        return "cpu"

    def set_device(self, device: torch.device) -> None:
        """There is nothing to select."""

    def get_device_name(self, device_id: int = 0) -> str:
        """Name shown in logs."""
        return self.device_name

    def get_device_total_memory(self, device_id: int = 0) -> int:
        """Host memory in bytes."""
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        """Host memory in use, in bytes, so that total - used is what can still be had."""
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        """(free, total) host memory in bytes."""
        memory = psutil.virtual_memory()
        return int(memory.available), int(memory.total)

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Backends that need no compiled kernels, and no GPU's diagnostics; what the operator set stays."""
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        server_args.disable_overlap_schedule = True
        if server_args.moe_runner_backend == "auto":
            # SGLang's plain-torch loop reads expert weights as this one lays them out.
            server_args.moe_runner_backend = "triton"
        # Sliding windows are masked here; a pool of its own for them is nothing SGLang builds on other platforms.
        server_args.disable_hybrid_swa_memory = True
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)

    def get_default_attention_backend(self) -> str:
        """The attention backend that is plain torch."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool for multi-head attention."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        """SGLang's own pool for multi-head latent attention."""
        from .attention import LatentKVPool

        return LatentKVPool

    def get_paged_allocator_cls(self) -> type:
        """SGLang's own paged allocator."""
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        return PagedTokenToKVPoolAllocator
