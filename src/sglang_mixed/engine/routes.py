"""Our HTTP routes, and the way their questions reach the schedulers.

The question travels as SGLang's own GetInternalStateReq, marked by its request id; the answer is one per DP rank.
"""

from __future__ import annotations

import asyncio
import operator
import sys
from collections.abc import Callable
from typing import Any

from ..errors import EngineError
from . import state
from .ranks import gather

MARK = "mixed_precision"
HTTP_SERVER = "sglang.srt.entrypoints.http_server"


def get_internal_state(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Hook around the scheduler's handler, which every rank runs: a marked request gets all their reports."""
    question = request.rid or ""
    if not question.startswith(MARK):
        return original(scheduler, request)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    report = {"data_parallel_rank": scheduler.ps.dp_rank or 0, **_report(modules=question.endswith("modules"))}
    ranks = gather({key: value for key, value in report.items() if key != "modules"})
    return GetInternalStateReqOutput(
        internal_state={**report, "tensor_parallel_ranks": ranks} if len(ranks) > 1 else report
    )


def _report(modules: bool) -> dict[str, Any]:
    # Whatever happens here, the other ranks wait in the gather.
    try:
        if state.proof is None:
            raise EngineError("no mixed-precision model runs in this process")
        return state.proof.report(modules)
    except Exception as error:
        return {"error": str(error)}


async def ask_schedulers(modules: bool = True) -> list[dict[str, Any]]:
    """The reports of all DP ranks in order, each with those of its TP ranks. Raises EngineError if one has none."""
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = state.tokenizer_manager or sys.modules[HTTP_SERVER].get_global_state().tokenizer_manager
    manager.auto_create_handle_loop()
    request = GetInternalStateReq(rid=f"{MARK}/modules" if modules else MARK)
    reports = [answer.internal_state for answer in await manager.get_internal_state_communicator(request)]
    for report in reports:
        for rank in report.get("tensor_parallel_ranks", [report]):
            if "error" in rank:
                raise EngineError(f"a rank has no report: {rank['error']}")
    return sorted(reports, key=operator.itemgetter("data_parallel_rank"))


def launch_subprocesses(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hook around `Engine._launch_subprocesses`: remember the way to the schedulers and add the routes."""
    result = original(*args, **kwargs)
    server_args = kwargs.get("server_args", next((a for a in args if hasattr(a, "model_path")), None))
    if getattr(server_args, "quantization", None) != "mixed_precision":
        return result
    state.tokenizer_manager = result[0]
    if http_server := sys.modules.get(HTTP_SERVER):
        add_routes(http_server.app)
    return result


def run_uvicorn(original: Callable[..., None], app: Any, *args: Any, **kwargs: Any) -> None:
    """Hook around `uvicorn.run`: tokenizer workers are new processes that import the app by name; they get ours."""
    if app == f"{HTTP_SERVER}:app" and state.tokenizer_manager is not None:
        app = f"{__package__}.worker:app"
    original(app, *args, **kwargs)


def add_routes(app: Any) -> None:
    """Add our routes to SGLang's FastAPI app."""
    app.add_api_route("/mixed_precision", mixed_precision, methods=["GET"])


async def mixed_precision(modules: bool = True) -> dict[str, Any]:
    """`GET /mixed_precision`: the proof and the memory of rank 0; per further rank a report without modules.

    `tensor_parallel_ranks` are all of a group, rank 0 too; `data_parallel_ranks` are the other groups.
    """
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
