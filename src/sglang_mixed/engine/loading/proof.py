"""The proof: what lies in memory, restored to the file's layout, has the SHA-256 of the bytes in the file.

The files are read a second time for it, after the load and in the background, so that it costs no start-up time.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from ...digests import sha256, sha256_tree
from ...errors import ProofError
from ...file_hashes import FileHash, Request, hash_files, hash_tensor
from ...formats import label_of
from ...formats.slicing import rebase
from ...kernels.compressed import CompressedWeight
from ...memory import rank_memory
from ...plan import Plan, PlannedModule, RankPlan
from ...stream import ReadLog, stream
from ..cpu.platform import runs_on_torch_cpu
from .intake import Bias, Intake
from .stock import StockParameters
from .transfer import Transfer, give_back

logger = logging.getLogger(__name__)


class Proof:
    """The report of one rank's model: what came from where, what it weighs, and that memory equals the files."""

    def __init__(self, plan: RankPlan, stock: StockParameters, log: ReadLog) -> None:
        self._plan, self._stock, self._log = plan, stock, log
        self._weights: list[CompressedWeight | Bias] = []
        #: SHA-256 of what memory holds, on a GPU the tree's; and what has been found to equal it.
        self._memory: dict[str, str] = {}
        self._file: dict[str, FileHash] = {}
        self._casts: dict[str, str] = {}
        #: Bytes that the model keeps besides its weights, such as the halves of a latent attention's kv_b_proj.
        self.derived_bytes = 0
        self._state = "running"
        self._parameter_bytes = 0
        self._seconds = self._verify_seconds = 0.0

    def complete(self, model: torch.nn.Module, seconds: float) -> None:
        """The model was ready after `seconds`: measure it, then verify in the background."""
        for module in model.modules():
            intake = getattr(getattr(module, "quant_method", None), "intake", None)
            self._weights += [*intake.weights, *intake.biases] if isinstance(intake, Intake) else []
        storages = [parameter.untyped_storage() for parameter in model.parameters()]
        self._parameter_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        self._seconds = seconds
        # No daemon: one that works in torch when the interpreter is taken down aborts the process.
        threading.Thread(target=self._verify_or_end, name="weight-proof").start()

    @property
    def plan(self) -> Plan:
        """The whole model's plan."""
        return self._plan.plan

    @property
    def weight_bytes(self) -> int:
        """Bytes the weights occupy, measured on their storages, without padding."""
        return sum(weight.nbytes for weight in self._weights) + self._parameter_bytes - self._stock.padding

    def summary(self) -> str:
        """One line for the log."""
        mib = 2**20
        plan = self._plan
        return (
            f"mixed precision: {self.weight_bytes / mib:.2f} MiB of weights in {len(plan.parts)} modules, "
            f"{plan.weight_bytes / mib:.2f} MiB planned, {self._bf16_bytes() / mib:.2f} MiB in 16 bits; "
            f"{self._log.bytes_read / mib:.2f} MiB read in {self._seconds:.2f} s"
        )

    def report(self, modules: bool = True) -> dict[str, Any]:
        """The JSON of `GET /mixed_precision`, of this rank."""
        plan, rank = self._plan.plan, self._plan.rank
        planned = [plan.modules[name] for name in self._plan.parts]
        return {
            "base": plan.base,
            "sources": {name: str(path) for name, path in plan.sources.items()},
            "fingerprint": plan.fingerprint,
            "rank": {"tp": rank.tp, "ep": rank.ep, "number": rank.number},
            **rank_memory(self._plan),
            "planned_bytes": self._plan.weight_bytes,
            "weight_bytes": self.weight_bytes,
            "padding_bytes": self._stock.padding,
            "derived_bytes": self.derived_bytes,
            "bytes_read": self._log.bytes_read,
            "load_seconds": self._seconds,
            "verification": {
                "state": self._state,
                "modules": len(planned),
                "verified": sum(map(self._is_verified, planned)),
                "seconds": self._verify_seconds,
            },
            **({"modules": [self._row(module) for module in planned]} if modules else {}),
        }

    def _bf16_bytes(self) -> int:
        return sum(map(self._plan.module_bf16_bytes, self._plan.parts))

    def _row(self, module: PlannedModule) -> dict[str, Any]:
        checkpoint, part = self._plan.plan.checkpoints[module.source], self._plan.parts[module.name]
        tensors = {}
        for local in module.tensors:
            name = f"{module.name}.{local}"
            entry = checkpoint.entries[name]
            found, memory = self._file.get(name), self._memory.get(name)
            tensors[local] = {
                "file": str(checkpoint.files[entry.file]),
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                **({"slice": entry.view.text} if entry.view else {}),
                "sha256": found and found.in_file,
                "memory_sha256": found and found.as_held,
                **({} if runs_on_torch_cpu() else {"memory_sha256_tree": memory}),
                **({"held_as": self._casts[name]} if name in self._casts else {}),
            }
        return {
            "module": module.name,
            "source": module.source,
            "format": label_of(module.format),
            "shape": list(module.format.shape),
            "held": {"rows": list(part.held.rows), "columns": list(part.held.columns)},
            "bytes": self._plan.module_bytes(module.name),
            "bf16_bytes": self._plan.module_bf16_bytes(module.name),
            "file": sorted({str(tensor["file"]) for tensor in tensors.values()}),
            "tensors": tensors,
            "verified": self._is_verified(module),
        }

    def _is_verified(self, module: PlannedModule) -> bool:
        return all(f"{module.name}.{local}" in self._file for local in module.tensors)

    def note_stock(self, transfer: Transfer) -> None:
        """Hash what SGLang's own methods hold, while it still lies as in the files."""
        new = {name: tensor for name, tensor in self._stock.tensors.items() if name not in self._memory}
        # The engine may hold another dtype than the file (its own choice, e.g. an FP16 norm in BF16).
        self._casts |= {name: tensor.held_as for name, tensor in new.items() if tensor.is_cast}
        rest = [(name, tensor.restore()) for name, tensor in new.items() if name not in transfer.completed]
        self._memory.update(transfer.hashes(rest))

    def _verify(self) -> Iterator[None]:
        """A weight at a time."""
        if torch.cuda.is_available():
            give_back()
        if runs_on_torch_cpu():
            self.note_stock(Transfer())
        digest = sha256 if runs_on_torch_cpu() else sha256_tree
        for weight in self._weights:
            self._memory.update((name, digest(tensor)) for name, tensor in weight.restore().items())
            yield
        for found in self._in_files():
            self._compare(found)
            yield

    def _in_files(self) -> Iterator[FileHash]:
        """The hashes of all planned tensors as they are held."""
        reads = list(self._plan.reads())
        if runs_on_torch_cpu():
            for name, tensor in stream(reads, ReadLog()):
                held = tensor if name in self._stock.tensors else self._rebased(name, tensor)
                yield hash_tensor(name, held, self._casts)
        else:
            yield from hash_files(Request(reads, self._casts))

    def _rebased(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What was read, as a weight of its own holds it."""
        module, _, local = name.rpartition(".")
        return rebase(local, tensor, self._plan.plan.modules[module].format, self._plan.parts[module].held)

    def _compare(self, stored: FileHash) -> None:
        found, expected = self._memory.get(stored.name, "nothing"), stored.tree or stored.as_held
        if found != expected:
            raise ProofError(
                "a weight in memory is not what its file holds",
                tensor=stored.name,
                rule=f"SHA-256 in memory: {found[:16]}..., of the file: {expected[:16]}...",
                remedy="check that the file has not changed, and this host's memory and disk; then restart",
            )
        self._file[stored.name] = stored

    def _verify_or_end(self) -> None:
        started, main = time.perf_counter(), threading.main_thread()
        try:
            for _ in self._verify():
                if not main.is_alive():
                    return
            self._state = "verified"
        except Exception as error:
            if not main.is_alive():  # an ending interpreter starts no reader
                return
            self._state = "failed"
            logger.critical("mixed precision: proof failed, ending the server\n%s", error)
            if multiprocessing.parent_process() is not None:
                # What SGLang's own schedulers do: the parent ends the whole process tree on SIGQUIT.
                os.kill(os.getppid(), signal.SIGQUIT)
        self._verify_seconds = time.perf_counter() - started
