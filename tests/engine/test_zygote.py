"""Processes forked from the zygote are what new ones are, and none of them is left behind."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from .launch import TINY, Engine, Server, http, zygote

CHILDREN = """
import multiprocessing, os, sys, time
from pathlib import Path
import psutil

if __name__ == "__main__":
    import sglang.srt.managers.scheduler as scheduler
    scheduler.marked = True
    os.environ["MARK"] = "set by the parent"
    from tests.engine.test_zygote import child
    process = multiprocessing.get_context("spawn").Process(target=child, args=(sys.argv[1], 1))
    process.start()
    process.join()
    assert process.exitcode == 7, process.exitcode
"""


def child(path: str, depth: int) -> None:
    """What a spawned process sees; run in a process that the zygote's job, or its child, has spawned."""
    import multiprocessing
    import sys

    import sglang.srt.managers.scheduler as scheduler
    from sglang.srt import plugins

    from sglang_mixed.engine import state

    seen = {
        "parent": psutil.Process().ppid() == multiprocessing.parent_process().pid,
        "mark": os.environ.get("MARK"),
        "module": getattr(scheduler, "marked", None),
        "plugins": plugins._plugins_loaded,
        "state": [state.loading, state.proof, state.tokenizer_manager],
        "threads": psutil.Process().num_threads(),
    }
    with Path(path).open("a") as file:
        file.write(json.dumps(seen) + "\n")
    if depth:
        scheduler.marked = True
        grandchild = multiprocessing.get_context("spawn").Process(target=child, args=(path, depth - 1))
        grandchild.start()
        grandchild.join()
    sys.exit(7)


def descendants(pid: int) -> list[int]:
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def test_what_a_job_spawns_is_its_child_with_its_environment_and_none_of_its_state(tmp_path: Path) -> None:
    job = zygote().start(tmp_path / "log", CHILDREN, str(tmp_path / "seen"))
    assert job.wait(120) == 0, (tmp_path / "log").read_text()
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    expected: dict[str, Any] = {"parent": True, "mark": "set by the parent", "module": None, "plugins": False}
    assert seen == [{**expected, "state": [None, None, None], "threads": 1}] * 2


def test_an_engine_whose_scheduler_fails_shows_its_log(tmp_path: Path) -> None:
    wrong = {"model_loader_extra_config": '{"no_such_key": 1}'}
    engine = Engine(tmp_path / "log", TINY / "bf16", {"input_ids": [[5]]}, **wrong)
    with pytest.raises(AssertionError, match=r"(?s)Scheduler hit an exception.*no_such_key"):
        engine.result()


def test_an_engine_that_hangs_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "log", TINY / "bf16", {"input_ids": [[5]]}, log_level="info")
    while len(processes := descendants(engine.job.pid)) < 3 and engine.job.poll() is None:
        time.sleep(0.1)
    with pytest.raises(AssertionError, match="still runs after 0 s"):
        engine.result(seconds=0)
    assert not any(map(psutil.pid_exists, processes))


def test_a_forked_server_answers_and_ends(tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--model-path", TINY / "bf16", fresh=False).wait()
    processes = descendants(server.job.pid)
    assert len(processes) >= 3
    assert http(f"{server.url}/generate", {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}})["output_ids"]
    server.stop()
    assert not any(map(psutil.pid_exists, processes))
