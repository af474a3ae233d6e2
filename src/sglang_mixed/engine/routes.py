"""Our HTTP routes, and the way their questions reach the schedulers.

The question travels as SGLang's own GetInternalStateReq, marked by its request id; the answer is one per DP rank.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from ..errors import EngineError
from . import state

MARK = "mixed_precision"


def get_internal_state(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Hook around the scheduler's handler: a marked request is answered with this rank's report."""
    question = request.rid or ""
    if not question.startswith(MARK) or state.proof is None:
        return original(scheduler, request)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    return GetInternalStateReqOutput(internal_state=state.proof.report(modules=question.endswith("modules")))


async def ask_schedulers(modules: bool = True) -> list[dict[str, Any]]:
    """The reports of all DP ranks."""
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = state.tokenizer_manager
    manager.auto_create_handle_loop()
    request = GetInternalStateReq(rid=f"{MARK}/modules" if modules else MARK)
    return [answer.internal_state for answer in await manager.get_internal_state_communicator(request)]


def launch_subprocesses(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hook around `Engine._launch_subprocesses`: remember the way to the schedulers and add the routes."""
    result = original(*args, **kwargs)
    server_args = kwargs.get("server_args", next((a for a in args if hasattr(a, "model_path")), None))
    if getattr(server_args, "quantization", None) != "mixed_precision":
        return result
    state.tokenizer_manager = result[0]
    if http_server := sys.modules.get("sglang.srt.entrypoints.http_server"):
        http_server.app.add_api_route("/mixed_precision", mixed_precision, methods=["GET"])
    return result


async def mixed_precision(modules: bool = True) -> dict[str, Any]:
    """`GET /mixed_precision`: the proof and the memory of rank 0, and one report per further data-parallel rank."""
    first, *others = await ask_schedulers(modules)
    return {**first, "data_parallel_ranks": others} if others else first


def get_mixed_precision_memory_stats() -> dict[str, Any]:
    """Totals of the mixed model that this process serves, or whose `sgl.Engine` it runs.

    `weight_bytes`, `planned_bytes`, `bf16_bytes` (what 16 bits would take), `memory_saved_mb` (MiB),
    `compression_ratio`, and `by_format` / `by_module_kind`, each {modules, bytes, bf16_bytes}.
    Raises EngineError where no such model runs.
    """
    if state.proof is not None:
        return state.proof.report(modules=False)
    if state.tokenizer_manager is None:
        raise EngineError(
            "no mixed-precision model runs in this process",
            remedy="start sgl.Engine(enable_mixed_precision=True, ...), or ask a server: sglang-mixed proof URL",
        )
    return asyncio.get_event_loop().run_until_complete(ask_schedulers(modules=False))[0]
