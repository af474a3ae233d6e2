"""Processes that begin with SGLang imported: importing it takes half a minute, forking a process that has takes none.

A zygote imports and does nothing else: no thread, no tensor, no plugin is loaded. Beside every process forked from it
stands a fork made before that process did anything, which forks its children when `multiprocessing` spawns one. So
each child has what a spawned interpreter has after its imports, and nothing of its parent's state; it gets its target
pickled, its parent's environment and file descriptors, and is its parent's own child, as in production.

One engine a process: SGLang's shutdown ends all children of its process, the fork that stands beside it included.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import logging
import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

IMPORTED = (
    "multiprocessing.popen_spawn_posix",
    "sglang.srt.constrained.xgrammar_backend",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.managers.data_parallel_controller",
    "sglang.srt.managers.tp_worker",
    "sglang.srt.models.registry",
    "sglang_mixed.engine.arguments",
    "sglang_mixed.engine.loading.loader",
    "sglang_mixed.engine.plugin",
    "sglang_mixed.engine.layers.quantization",
    "sglang_mixed.engine.serving.routes",
    "sglang_mixed.engine.serving.tracking",
)
SINCE_0_5_19 = "sglang.srt.arg_groups.pipeline", "sglang.srt.arg_groups.resolution_hooks"
ROOT = Path(__file__).parents[2]
# Two threads of a tiny model wait for each other longer than one takes. SGLang compiles a function where there are
# several ranks, which takes longer than all tests need to run it.
FAST = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
#: OpenBLAS and pyarrow's allocator start threads when they are loaded.
THREADLESS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_LEAD = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.engine.zygote import lead_session; lead_session()\n"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_HIGH = 512


class Launcher:
    """The asking end: what it launches become children of this process. `connection` leads to a `fork_on_request`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        # The fork's own child ends at once, and Linux gives the grandchild to the nearest ancestor that asked for it.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def launch(
        self, code: Sequence[str], descriptors: Mapping[int, int], environment: Mapping[str, str], first: str = ""
    ) -> int:
        """Run `python -c *code` with {descriptor there: descriptor here} open; returns the process id.

        `first` is run before: its effect on the process is what those it spawns inherit too.
        """
        body = json.dumps([code, list(descriptors), dict(environment), str(Path.cwd()), first]).encode()
        socket.send_fds(self.connection, [len(body).to_bytes(4)], list(descriptors.values()))
        self.connection.sendall(body)
        return int.from_bytes(_receive(self.connection, 4))

    def replace_spawn(self) -> None:
        """Have `multiprocessing` launch its spawned processes here."""
        original = multiprocessing.util.spawnv_passfds

        def spawnv_passfds(path: Any, arguments: list[str], descriptors: Sequence[int]) -> int:
            if "--multiprocessing-fork" not in arguments:
                return int(original(path, arguments, descriptors))
            code = arguments[arguments.index("-c") + 1 :]
            return self.launch(code, {number: number for number in (0, 1, 2, *descriptors)}, os.environ)

        multiprocessing.util.spawnv_passfds = spawnv_passfds


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the process at the other end has gone")
        data += part
    return data


def fork_on_request(connection: socket.socket) -> list[str]:
    """Serve a Launcher. Returns in every process that it asks for, with that process's code and arguments."""
    while True:
        size, received, *_ = socket.recv_fds(connection, 4, 250)
        if not size:
            os._exit(0)
        code, numbers, environment, folder, first = json.loads(_receive(connection, int.from_bytes(size)))
        ours, theirs = socket.socketpair()
        middle = os.fork()
        if middle == 0:
            if (pid := os.fork()) != 0:
                # Not by the process itself, which may be killed as soon as it is there.
                theirs.sendall(pid.to_bytes(4))
                os._exit(0)
            ours.close()
            connection.close()
            # Nothing is done before the adoption: SGLang asks for its parent, and to be killed when that dies.
            theirs.recv(1)
            theirs.close()
            _take(received, numbers)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            exec(first, {})
            return list(code)
        os.waitpid(middle, 0)
        connection.sendall(_receive(ours, 4))
        for end in (ours, theirs):
            end.close()
        for descriptor in received:
            os.close(descriptor)


def _take(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Give the received descriptors the numbers they have in the asking process."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH) for descriptor in received]
    for descriptor in received:
        os.close(descriptor)
    for descriptor, number in zip(high, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def main(connection: socket.socket) -> None:
    """Import, then fork. Each forked process comes back here with its own code, after the fork that stands by it."""
    for name in IMPORTED:
        importlib.import_module(name)
    for name in SINCE_0_5_19:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    for handler in filter(None, (reference() for reference in logging._handlerList)):
        # A log file that an import has opened: its number may be that of a descriptor which a fork is given.
        if isinstance(handler, logging.FileHandler):
            handler.close()
    assert _threads() == 1, "a fork would lose the threads that an import has started"
    gc.freeze()
    while True:
        code, *arguments = fork_on_request(connection)
        mine, connection = socket.socketpair()
        if os.fork() != 0:
            break
        mine.close()
    connection.close()
    Launcher(mine).replace_spawn()
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


class Job:
    """A process that leads a session in which is all that it launches."""

    alive: ClassVar[set[Job]] = set()

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None
        self.alive.add(self)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def terminate(self) -> None:
        """Ask the process to end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        """The exit status; TimeoutError if it still runs after so many seconds."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs after {seconds} s")
            time.sleep(0.02)
        return status

    def kill(self) -> None:
        """End the process and all that it launched, now."""
        if self not in self.alive:
            return
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-self.pid, 0)
                if pid == self.pid:
                    self.status = os.waitstatus_to_exitcode(status)
        self.alive.discard(self)


class Zygote:
    """The process that has imported SGLang; it ends with this one."""

    def __init__(self) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the zygote lives
        mine, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            cwd=ROOT,
            env=os.environ | FAST | THREADLESS,
        )
        theirs.close()
        self.launcher = Launcher(mine)

    def start(self, log: Path, code: str, *arguments: str, first: str = "") -> Job:
        """Run `python -c CODE ARGUMENTS`, its output in `log`; `first` as in `Launcher.launch`."""
        with log.open("wb") as output, Path(os.devnull).open("rb") as nothing:
            descriptors = {0: nothing.fileno(), 1: output.fileno(), 2: output.fileno()}
            try:
                pid = self.launcher.launch([code, *arguments], descriptors, os.environ | FAST, _LEAD + first)
            except (EOFError, OSError) as error:
                self.output.seek(0)
                raise AssertionError(f"the zygote has ended:\n{self.output.read().decode()}") from error
        return Job(pid)

    def stop(self) -> None:
        """End it; the jobs it started live on."""
        self.launcher.connection.close()
        self.process.kill()
        self.process.wait()
        self.output.close()


def start_fresh(log: Path, code: str, *arguments: str) -> Job:
    """The same as `Zygote.start`, in a new interpreter."""
    output = [
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    command = [sys.executable, "-c", _LEAD + code, *arguments]
    return Job(os.posix_spawn(sys.executable, command, os.environ, file_actions=output))


def lead_session() -> None:
    """Called first in a job: what it starts can be ended with it, and it ends with the process that asked for it."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
