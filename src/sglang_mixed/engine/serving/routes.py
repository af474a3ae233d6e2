"""Our HTTP routes in SGLang's server. Whoever may read `/server_info` may read them; a reset is for its admins."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse
from sglang.srt.utils.auth import AuthDecision, AuthLevel, auth_level

from ...errors import EngineError, ExpertCountsError, MixedPrecisionError, UnsupportedError
from ...experts import ExpertFormats, nothing_counted, report
from ...experts.page import page_html
from .. import state
from .questions import HTTP_SERVER, Question, ask
from .statistics import add_counts, described_map, export_experts
from .watchdog import end_at_once, watch_all, watching_launch

PREFIX = "/mixed_precision"


def launch_subprocesses(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hook around `Engine._launch_subprocesses`: remember the way to the schedulers, watch them, add the routes."""
    server_args = kwargs.get("server_args", next((a for a in args if hasattr(a, "model_path")), None))
    if getattr(server_args, "quantization", None) != "mixed_precision":
        return original(*args, **kwargs)
    end_at_once()
    with watching_launch(getattr(server_args, "dp_size", 1)):
        result = original(*args, **kwargs)
    watch_all(result)
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
    app.add_api_route(PREFIX, mixed_precision, methods=["GET"])
    app.add_api_route(f"{PREFIX}/experts", experts, methods=["GET"])
    app.add_api_route(f"{PREFIX}/experts/reset", reset_experts, methods=["POST"])
    app.add_api_route(f"{PREFIX}/experts.json", download_experts, methods=["GET"])
    app.add_api_route(f"{PREFIX}/page", page, methods=["GET"])
    app.add_exception_handler(MixedPrecisionError, answer_error)


def add_prometheus_middleware(original: Callable[[Any], None], app: Any) -> None:
    """Hook around the function that mounts `/metrics`: of a server with our routes it has our metrics, too."""
    original(app)
    if any(getattr(route, "path", None) == PREFIX for route in app.routes):
        # It must not be imported earlier: with the first import of its library SGLang chooses the folder.
        from .metrics import metrics_app

        app.routes[-1].app = metrics_app()


def decide_request_auth(original: Callable[..., AuthDecision], *, method: str, path: str, **rest: Any) -> AuthDecision:
    """Hook around the check of API keys: a browser has none for the page, which holds no data and asks for it."""
    if method == "GET" and path == f"{PREFIX}/page":
        return AuthDecision(allowed=True)
    return original(method=method, path=path, **rest)


async def mixed_precision(modules: bool = True) -> dict[str, Any]:
    """`GET /mixed_precision`: the proof and the memory of rank 0; per further rank a report without modules.

    `tensor_parallel_ranks` are all of a group, rank 0 too; `data_parallel_ranks` are the other groups.
    """
    first, *others = await ask(Question.MODULES if modules else Question.MEMORY)
    return {**first, "data_parallel_ranks": others} if others else first


async def experts(layer: str | None = None, top: str = "10") -> dict[str, Any]:
    """`GET /mixed_precision/experts`: what was counted since the last reset, of one `layer` or of all.

    The answer is `experts.report`'s; `top` is how many experts it ranks.
    """
    number, most = None if layer is None else whole_number("layer", layer), whole_number("top", top)
    answers = await ask(Question.EXPERTS)
    counts = add_counts(answers)
    if counts is None:
        return nothing_counted(answers[0]["state"], described_map())
    formats = ExpertFormats.from_json(answers[0]["formats"])
    return await asyncio.to_thread(report, counts, formats, described_map(), layer=number, top=most)


@auth_level(AuthLevel.ADMIN_OPTIONAL)  # type: ignore[untyped-decorator]
async def reset_experts() -> JSONResponse:
    """`POST /mixed_precision/experts/reset`: count from nothing again; answers the export of what was cleared."""
    return await exported(Question.RESET_EXPERTS)


async def download_experts() -> JSONResponse:
    """`GET /mixed_precision/experts.json`: the counts as a file that `sglang-mixed experts` reads."""
    response = await exported(Question.EXPERTS)
    response.headers["Content-Disposition"] = 'attachment; filename="experts.json"'
    return response


async def exported(question: Question) -> JSONResponse:
    """What all ranks answer, as an export. With many experts that takes long, and other requests are waiting."""
    answers = await ask(question)
    return await asyncio.to_thread(lambda: JSONResponse(export_experts(answers).to_json()))


def whole_number(name: str, text: str) -> int:
    """A query parameter. Raises ExpertCountsError for anything but a number from 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ExpertCountsError(f"{name}={text[:40]!r}", rule=f"{name} is a whole number from 0")
    return int(text)


async def page() -> HTMLResponse:
    """`GET /mixed_precision/page`: all of this to look at."""
    return HTMLResponse(page_html())


async def answer_error(request: Request, error: MixedPrecisionError) -> JSONResponse:
    """An error of ours as {"error": its message}: 400 for the request's, 409 and 503 for the server's."""
    status = 409 if isinstance(error, UnsupportedError) else 503 if isinstance(error, EngineError) else 400
    return JSONResponse({"error": str(error)}, status)
