"""The loader: exactly the planned tensors, in file order, into the model that SGLang built."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.model_loader.loader import DefaultModelLoader

from ...plan import Rank
from ...progress import progress
from ...stream import ReadLog
from .. import state
from ..arguments import Request
from ..cpu.platform import runs_on_torch_cpu
from ..ranks import agree_on_plan, is_first_of_host
from .kernel_builds import KernelBuilds
from .latent import derive_latent_weights
from .ledger import Ledger
from .proof import Proof
from .stock import StockParameters, vocabularies
from .transfer import PinnedTransfer, Transfer

logger = logging.getLogger(__name__)


class MixedPrecisionLoader(DefaultModelLoader):
    """Composes one model from the plan's sources. Peak host memory above the weights: `stream`'s."""

    def __init__(self, load_config: Any) -> None:
        extra = dict(load_config.model_loader_extra_config or {})
        request = extra.pop("mixed_precision")
        super().__init__(dataclasses.replace(load_config, model_loader_extra_config=extra))
        self._request = Request(**request)
        self._log = ReadLog()

    def download_model(self, model_config: Any) -> None:
        """All sources are local folders."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """Build the model, fill it from the plan, and start the proof."""
        started = time.perf_counter()
        agree_on_plan(self._request.fingerprint)
        self._speaks = is_first_of_host()
        plan = self._request.rebuild_plan().rank(this_rank())
        transfer = PinnedTransfer() if torch.cuda.is_available() and not runs_on_torch_cpu() else Transfer()
        ledger = Ledger()
        self._stock = StockParameters(plan, ledger, transfer)
        proof = Proof(plan, self._stock, self._log)
        state.loading = state.Loading(plan, ledger, proof, self._request.verify_values, transfer)
        threads = torch.get_num_threads()
        # The readers have a core to themselves; an operator that waits for one more thread there waits long. With a GPU
        # only the readers compute on the host, and are as many as help.
        torch.set_num_threads(max(1, threads - 1) if runs_on_torch_cpu() else 1)
        try:
            model: torch.nn.Module = super().load_model(model_config=model_config, device_config=device_config)
        finally:
            state.loading = None
            torch.set_num_threads(threads)
        plan.plan.require_unchanged()
        proof.derived_bytes = derive_latent_weights(model)
        proof.complete(model, time.perf_counter() - started)
        state.proof = proof
        logger.info("%s", proof.summary())
        return model

    def _get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        loading = state.current_loading()
        self._stock.watch(model)
        self._builds = KernelBuilds(self._stock.compiled if torch.cuda.is_available() else (), self._speaks)
        loading.vocabularies = vocabularies(model)
        reads = list(loading.plan.reads())
        total = sum(read.nbytes for _, _, tensors in reads for read in tensors)
        with progress("mixed precision: loading", total) as self._log.advance:
            for name, tensor in loading.transfer.stream(reads, self._log, loading):
                self._stock.give(name, tensor)
                yield name, tensor

    def load_weights_and_postprocess(self, model: Any, weights: Any, target_device: torch.device) -> None:
        """As SGLang's, with a look at the model between its `load_weights` and the kernels that repack."""
        load_weights = model.load_weights

        def load_and_check(weights: Any) -> None:
            load_weights(weights)
            self._stock.adopt(model)
            self._check_filled()
            self._builds.wait()

        model.load_weights = load_and_check
        try:
            super().load_weights_and_postprocess(model, weights, target_device)
        finally:
            del model.load_weights

    def _check_filled(self) -> None:
        loading = state.current_loading()
        loading.ledger.close([name for name in self._stock.given if name not in self._stock.tensors])
        self._stock.filled()
        if not runs_on_torch_cpu():
            # SGLang's kernels repack next; after that the files' layout is gone.
            loading.proof.note_stock(loading.transfer)
            loading.transfer.close()
            self._stock.release()


def this_rank() -> Rank:
    """This process's place among the tensor- and expert-parallel ranks, as SGLang numbers them."""
    return Rank(
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_moe_expert_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def get_model_loader(original: Callable[..., Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook around SGLang's `get_model_loader`: our loader for a mixed model, SGLang's for any other."""
    if "mixed_precision" in (load_config.model_loader_extra_config or {}):
        return MixedPrecisionLoader(load_config)
    return original(load_config, *args, **kwargs)


def get_model_architecture(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook around SGLang's choice of the model class, which sends Mixtral in a method it does not know to old code."""
    if model_config.quantization != "mixed_precision":
        return original(model_config, *args, **kwargs)
    model_config.quantization = "fp8"
    try:
        return original(model_config, *args, **kwargs)
    finally:
        model_config.quantization = "mixed_precision"


REFUSED = (
    "weights of a mixed model cannot be updated from one checkpoint: every weight comes from the source "
    "its map names; restart the server with the new map"
)


def update_weights(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Hook around the worker's weight updates: a mixed model refuses them and goes on serving."""
    if state.proof is None:
        answer: tuple[bool, str] = original(*args, **kwargs)
        return answer
    return False, REFUSED


def begin_weight_update(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hook around what opens a session of updates, since 0.5.21: it would unpack a mixed model's weights first."""
    if state.proof is None:
        return original(*args, **kwargs)
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput

    return BeginWeightUpdateReqOutput(success=False, message=REFUSED)
