"""A server whose process has died ends at once, whichever process it was: it never answers without its model."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from sglang.srt.utils.watchdog import SubprocessWatchdog

logger = logging.getLogger(__name__)

_INTERVAL = 0.25
#: SGLang's dumps of a server that crashed: for 5 to 65 seconds it holds the port. Who wants them sets these.
_DUMPS = ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH")


def end_at_once() -> None:
    """Let a crash of this process's children end it without dumps, unless the environment asks for them."""
    for name in _DUMPS:
        os.environ.setdefault(name, "0")


@contextmanager
def watching_launch(copies: int) -> Iterator[None]:
    """End this process, as SGLang does after a crash, if a rank of several copies (DP) dies while the model is loaded.

    Their controller would wait for it for ever, and nobody watches before all are ready. What hangs below a rank of
    one copy is no rank, and notices itself what becomes of it.
    """
    done = threading.Event()
    if copies > 1:
        threading.Thread(target=_watch_launch, args=(done,), name="launch-watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch_launch(done: threading.Event) -> None:
    before: set[int] = set()
    while not done.wait(_INTERVAL):
        try:
            ranks = [one for child in psutil.Process().children() for one in child.children()]
        except psutil.Error:  # a child that ended meanwhile is its parent's to notice
            continue
        dead = {one.pid for one in ranks if _has_crashed(one)}
        if dead & before:  # a helper that failed is asked for at once
            logger.critical("mixed precision: rank %d died while it started, ending the server", min(dead & before))
            os.kill(os.getpid(), signal.SIGQUIT)
            return
        before = dead


def _has_crashed(process: psutil.Process) -> bool:
    """Whether it ended by a signal or an error, and its parent has not asked for it yet."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return False
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(" ")[2].strip() != "0"
    except (psutil.Error, OSError):
        return False


class Descendant:
    """A process that another one started, as SGLang's watchdog sees those of its own."""

    exitcode = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid) if psutil.pid_exists(pid) else None

    def is_alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        try:
            return self._process is not None and self._process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def watch_all(launched: Sequence[Any]) -> None:
    """Have SGLang's watchdog look at all of what it launched: it knows its own children, and no rank of a copy (DP)."""
    watchdog = next((one for one in launched if isinstance(one, SubprocessWatchdog)), None)
    if watchdog is None:  # a node that only holds ranks
        return
    known = {process.pid for process in watchdog._processes}
    for pid in next(one.all_child_pids for one in launched if hasattr(one, "all_child_pids")):
        if pid not in known:
            watchdog._names.append(f"rank_{pid}")
            watchdog._processes.append(Descendant(pid))
