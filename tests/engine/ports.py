"""Ports that nobody else takes between the time SGLang is told of them and the time it listens there, seconds later."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path


def _own() -> Iterator[int]:
    """This test worker's, from anywhere on: other runs may be at work on this host.

    From 32768 on Linux gives ports to whoever wants any one, as each rank does ten times. SGLang's own choice for a
    server is 30000, and 0.5.15 listens for gRPC at its port plus 10,000.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(20_000 + worker, 29_000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    return itertools.islice(itertools.cycle(ports), random.SystemRandom().randrange(len(ports)), None)


_ports = _own()


def free_port() -> int:
    """A port where nothing listens, another one each time."""
    return next(filter(_is_free, _ports))


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def port_was_taken(log: Path) -> bool:
    """Whether a process ended for a port that it had chosen itself, from those that Linux gives to all.

    SGLang does so for each of several copies of a model, and takes no other advice.
    """
    return "EADDRINUSE" in log.read_text()
