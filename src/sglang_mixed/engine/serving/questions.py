"""How the HTTP process asks the schedulers of a mixed model, and what these answer.

A question travels as SGLang's own GetInternalStateReq, marked by its request id; the answer is one per DP rank.
"""

from __future__ import annotations

import asyncio
import functools
import operator
import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from ...errors import EngineError
from ...experts.formats import expert_formats
from ...memory import module_kind
from .. import state
from ..ranks import data_parallel_rank, gather

HTTP_SERVER = "sglang.srt.entrypoints.http_server"
_MARK = "mixed_precision/"
#: How often a question that waits looks whether the server is ending.
_LOOK_SECONDS = 1


class Question(StrEnum):
    """What a scheduler can be asked."""

    MEMORY = "memory"
    MODULES = "modules"
    EXPERTS = "experts"
    LIFETIME_EXPERTS = "lifetime_experts"
    RESET_EXPERTS = "reset_experts"


def get_internal_state(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Hook around the scheduler's handler, which every rank runs: a marked request gets our answer."""
    asked = request.rid or ""
    if not asked.startswith(_MARK):
        return original(scheduler, request)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    question = Question(asked.removeprefix(_MARK))
    answer = {"data_parallel_rank": data_parallel_rank(scheduler), **_answer(question)}
    if question in (Question.MEMORY, Question.MODULES):
        # Whatever one rank answers, an error too, all take part in this.
        ranks = gather({key: value for key, value in answer.items() if key != "modules"})
        if len(ranks) > 1:
            answer["tensor_parallel_ranks"] = ranks
    return GetInternalStateReqOutput(internal_state=answer)


def _answer(question: Question) -> dict[str, Any]:
    try:
        if state.proof is None:
            raise EngineError("no mixed-precision model runs in this process")
        if question in (Question.MEMORY, Question.MODULES):
            return state.proof.report(modules=question == Question.MODULES)
        return expert_answer(question)
    except Exception as error:
        return {"error": str(error)}


def expert_answer(question: Question) -> dict[str, Any]:
    """This rank's counts, which are those of all ranks of its TP group: each of them routes every token."""
    assert state.proof is not None
    plan, tracker = state.proof.plan, state.tracker
    if tracker is None:
        has_experts = any(module_kind(name) == "experts" for name in plan.modules)
        return {"state": "disabled" if has_experts else "no_experts"}
    read = {Question.RESET_EXPERTS: tracker.reset, Question.LIFETIME_EXPERTS: tracker.lifetime_counts}
    counts = read.get(question, tracker.counts)()
    return {"state": "counting", "counts": counts.to_json(), "formats": _formats(counts.layers, counts.experts)}


@functools.cache
def _formats(layers: tuple[int, ...], num_experts: int) -> dict[str, Any]:
    assert state.proof is not None
    return expert_formats(state.proof.plan, layers, num_experts).to_json()


def manager() -> Any:
    """The HTTP process's TokenizerManager; a tokenizer worker makes its own."""
    return state.tokenizer_manager or sys.modules[HTTP_SERVER].get_global_state().tokenizer_manager


async def ask(question: Question) -> list[dict[str, Any]]:
    """The answers of all DP ranks in order; of memory with all TP ranks'. Raises EngineError if one has none."""
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager().auto_create_handle_loop()
    answers = [answer.internal_state for answer in await _answers(GetInternalStateReq(rid=_MARK + question))]
    for answer in answers:
        for rank in answer.get("tensor_parallel_ranks", [answer]):
            if "error" in rank:
                raise EngineError(f"a rank has no report: {rank['error']}")
    return sorted(answers, key=operator.itemgetter("data_parallel_rank"))


async def _answers(request: Any) -> list[Any]:
    asked = asyncio.ensure_future(manager().get_internal_state_communicator(request))
    # A server that ends first stops its schedulers, and then waits for whoever still waits for their answers.
    while not (await asyncio.wait({asked}, timeout=_LOOK_SECONDS))[0]:
        if manager().gracefully_exit:
            asked.cancel()
            raise EngineError("the server is ending")
    return asked.result()
