"""The proof: what lies in memory, restored to the file's layout, has the SHA-256 of the bytes in the file."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import torch

from ..errors import ProofError
from ..formats import get_format
from ..kernels.compressed import CompressedWeight
from ..memory import ModuleBytes, memory_stats, module_kind
from ..plan import Plan, PlannedModule
from ..stream import ReadLog, sha256
from .intake import Intake, total_bytes
from .stock import StockParameters

logger = logging.getLogger(__name__)


class Proof:
    """The report of one rank's model: what came from where, what it weighs, and that memory equals the files."""

    def __init__(self, plan: Plan, stock: StockParameters, log: ReadLog) -> None:
        self._plan, self._stock, self._log = plan, stock, log
        self._weights: list[CompressedWeight] = []
        self._memory: dict[str, str] = {}
        self._casts: dict[str, str] = {}
        self._state = "running"
        self._parameter_bytes = 0
        self._seconds = self._verify_seconds = 0.0

    def complete(self, model: torch.nn.Module, seconds: float) -> None:
        """The model was ready after `seconds`: measure it, then verify in the background."""
        for module in model.modules():
            intake = getattr(getattr(module, "quant_method", None), "intake", None)
            self._weights += intake.weights if isinstance(intake, Intake) else []
        storages = [parameter.untyped_storage() for parameter in model.parameters()]
        self._parameter_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        self._seconds = seconds
        threading.Thread(target=self._verify_or_end, name="weight-proof", daemon=True).start()

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights occupy, measured on their storages, without padding."""
        return total_bytes(self._weights) + self._parameter_bytes - self._stock.padding

    def summary(self) -> str:
        """One line for the log."""
        mib = 2**20
        return (
            f"mixed precision: {self.weight_bytes / mib:.2f} MiB of weights in {len(self._plan.modules)} modules, "
            f"{self._plan.weight_bytes() / mib:.2f} MiB planned, {self._plan.bf16_bytes / mib:.2f} MiB in 16 bits; "
            f"{self._log.bytes_read / mib:.2f} MiB read in {self._seconds:.2f} s"
        )

    def report(self, modules: bool = True) -> dict[str, Any]:
        """The JSON of `GET /mixed_precision`."""
        plan = self._plan
        rows = [self._row(module) for module in plan.modules.values()]
        stats = memory_stats(
            ModuleBytes(row["format"], module_kind(row["module"]), row["bytes"], row["bf16_bytes"]) for row in rows
        )
        return {
            "base": plan.base,
            "sources": {name: str(path) for name, path in plan.sources.items()},
            "fingerprint": plan.fingerprint,
            **stats,
            "planned_bytes": plan.weight_bytes(),
            "weight_bytes": self.weight_bytes,
            "padding_bytes": self._stock.padding,
            "bytes_read": self._log.bytes_read,
            "load_seconds": self._seconds,
            "verification": {
                "state": self._state,
                "modules": len(rows),
                "verified": sum(row["verified"] for row in rows),
                "seconds": self._verify_seconds,
            },
            **({"modules": rows} if modules else {}),
        }

    def _row(self, module: PlannedModule) -> dict[str, Any]:
        checkpoint = self._plan.checkpoints[module.source]
        tensors = {}
        for local in module.tensors:
            name = f"{module.name}.{local}"
            entry = checkpoint.entries[name]
            tensors[local] = {
                "file": str(checkpoint.files[entry.file]),
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "sha256": self._log.sha256.get(name),
                "memory_sha256": self._memory.get(name),
                **({"held_as": self._casts[name]} if name in self._casts else {}),
            }
        return {
            "module": module.name,
            "source": module.source,
            "format": get_format(module.format.name).label(module.format.parameters),
            "shape": list(module.format.shape),
            "bytes": self._plan.module_bytes(module),
            "bf16_bytes": self._plan.module_bf16_bytes(module),
            "file": sorted({str(tensor["file"]) for tensor in tensors.values()}),
            "tensors": tensors,
            "verified": all(tensor["memory_sha256"] for tensor in tensors.values()),
        }

    def check_stock(self) -> None:
        """Compare what SGLang's own methods hold with the files; raises ProofError."""
        for name, tensor in self._stock.tensors.items():
            if name in self._memory:
                continue
            restored, expected = tensor.restore(), self._log.sha256[name]
            if tensor.is_cast:
                # The engine holds another dtype than the file (its own choice, e.g. an FP16 norm in BF16).
                self._casts[name] = str(restored.dtype).removeprefix("torch.")
                source = self._plan.checkpoints[self._plan.source_of(name)]
                expected = sha256(source.read_tensor(name).to(restored.dtype))
            self._compare(name, restored, expected)

    def _verify(self) -> None:
        self.check_stock()
        for weight in self._weights:
            for name, tensor in weight.restore().items():
                self._compare(name, tensor, self._log.sha256[name])
        if missing := set(self._log.sha256) - set(self._memory):
            raise ProofError(f"{len(missing)} tensors were read but are nowhere in memory: {sorted(missing)[:5]}")

    def _compare(self, name: str, tensor: torch.Tensor, expected: str) -> None:
        found = sha256(tensor)
        if found != expected:
            raise ProofError(
                "a weight in memory is not what its file holds",
                tensor=name,
                rule=f"SHA-256 in memory {found[:16]}..., in the file {expected[:16]}...",
                remedy="check this host's memory and disk, then restart",
            )
        self._memory[name] = found

    def _verify_or_end(self) -> None:
        started = time.perf_counter()
        try:
            self._verify()
            self._state = "verified"
        except Exception as error:
            self._state = "failed"
            logger.critical("mixed precision: proof failed, ending the server\n%s", error)
            # What SGLang's own schedulers do: the parent ends the whole process tree on SIGQUIT.
            os.kill(os.getppid(), signal.SIGQUIT)
        self._verify_seconds = time.perf_counter() - started
