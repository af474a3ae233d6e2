"""SGLang's Marlin kernels, compiled side by side while weights are read.

SGLang compiles each at its first call, one after another and without a word: for minutes, once per host.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: Where SGLang keeps its builders: since 0.5.21 (of products), since 0.5.17, and before.
PACKAGES = *(f"sglang.kernels.ops.{room}" for room in ("gemm", "quantization", "moe")), "sglang.jit_kernel"
#: What `load_jit` tells the compiler its target by, on and off in every call.
TARGET = "TVM_FFI_CUDA_ARCH_LIST"
#: Seconds until the first line of progress (what is cached loads in less), and between two.
PATIENCE, INTERVAL = 5.0, 15.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """A module that SGLang compiles by itself, and the arguments that make it one of its own."""

    module: str
    label: str
    dtype: torch.dtype | None = None
    is_ep: bool = False
    has_bias: bool = False

    def __str__(self) -> str:
        return self.label if self.dtype is None else f"{self.label}, {str(self.dtype).removeprefix('torch.')}"

    def build(self) -> None:
        """Have SGLang compile it, or load it from its cache, and keep it for this process."""
        builder = _builder(self.module)
        # SGLang remembers a module by its positional arguments; 0.5.15 has fewer.
        builder(*(getattr(self, name) for name in inspect.signature(builder).parameters))


def repacking(has_zero_points: bool) -> Kernel:
    """What brings weights into Marlin's layout."""
    name = "awq" if has_zero_points else "gptq"
    return Kernel(f"{name}_marlin_repack", f"repacking from {name.upper()}")


def linear(dtype: torch.dtype) -> Kernel:
    """The product of a linear layer."""
    return Kernel("gptq_marlin", "linear", dtype)


def experts(dtype: torch.dtype, has_others: bool) -> Kernel:
    """The products of a group of experts; with others than its own it is given an expert map."""
    return Kernel("moe_wna16_marlin", f"MoE{' with expert map' if has_others else ''}", dtype, is_ep=has_others)


class KernelBuilds:
    """Kernels that are being compiled, each in a thread of its own, which waits for a compiler's process.

    Ranks of one host wait for each other, SGLang locks the folder of each kernel; one of them `speaks` of progress. A
    failure is a warning here: SGLang tries again at the first call, and says itself what is wrong.
    """

    def __init__(
        self, kernels: Iterable[Kernel], speaks: bool = True, build: Callable[[Kernel], None] = Kernel.build
    ) -> None:
        self._kernels, self._speaks, self._build = sorted(kernels, key=str), speaks, build
        self._ready: set[Kernel] = set()
        self._started = time.monotonic()
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._slots = threading.Semaphore(int(os.environ.get("MAX_JOBS") or len(self._kernels) or 1))
        # Daemons: a load that fails must end its process, whatever still compiles.
        self._overseer = threading.Thread(target=self._oversee, name="kernel-builds", daemon=True)
        if self._kernels:
            self._overseer.start()

    def wait(self) -> None:
        """Return when none is being compiled any more."""
        if self._kernels:
            self._overseer.join()

    def _oversee(self) -> None:
        threads = [
            threading.Thread(target=self._try, args=(kernel,), name="kernel-build", daemon=True)
            for kernel in self._kernels
        ]
        said, due = False, self._started + PATIENCE
        with _steady_target():
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(max(0.0, due - time.monotonic()))
                    if thread.is_alive() and time.monotonic() >= due:
                        said, due = True, time.monotonic() + INTERVAL
                        self._say("compiling")
        if said:
            self._say("compiled")

    def _try(self, kernel: Kernel) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # SGLang compiles for the thread's GPU
        try:
            with self._slots:
                self._build(kernel)
            self._ready.add(kernel)
        except Exception as error:
            logger.warning(
                "mixed precision: Marlin kernel %s was not compiled ahead of its first call, which tries again: %s: %s",
                kernel,
                type(error).__name__,
                str(error).partition("\n")[0],
            )

    def _say(self, what: str) -> None:
        left = "; ".join(str(kernel) for kernel in self._kernels if kernel not in self._ready)
        logger.log(
            logging.INFO if self._speaks else logging.DEBUG,
            "mixed precision: %s Marlin kernels: %d of %d ready after %.0f s%s; cached in %s",
            what,
            len(self._ready),
            len(self._kernels),
            time.monotonic() - self._started,
            f" (left: {left})" if left else "",
            cache_folder(),
        )


def cache_folder() -> Path:
    """Where SGLang keeps what it has compiled."""
    try:
        from sglang.kernels.jit.utils.compile.cache import cache_root
    except ImportError:  # before 0.5.20
        return Path(os.environ.get("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi")).expanduser()
    folder: Path = cache_root()
    return folder


def _builder(module: str) -> Callable[..., Any]:
    for package in PACKAGES:
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(f"{package}.{module}"), f"_jit_{module}_module")
        except ModuleNotFoundError:
            continue
        return found
    raise ModuleNotFoundError(f"this SGLang keeps {module} elsewhere")


@contextmanager
def _steady_target() -> Iterator[None]:
    """Set for all threads what SGLang's `load_jit` sets and resets, until 0.5.17, in each.

    A thread that waits for another rank would find it reset by its neighbour, and compile for another target.
    """
    before = os.environ.get(TARGET)
    if (target := _target()) is not None:
        os.environ[TARGET] = target
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TARGET, None)
        else:
            os.environ[TARGET] = before


def _target() -> str | None:
    try:
        from sglang.kernels.jit.utils import get_jit_cuda_arch
    except ImportError:  # before 0.5.17
        try:
            from sglang.jit_kernel.utils import get_jit_cuda_arch
        except ImportError:
            return None
    target: str = get_jit_cuda_arch().target_name
    return target
