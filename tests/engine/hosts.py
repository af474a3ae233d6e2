"""Two hosts in one machine: network namespaces with a virtual cable between them, and shared memory of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


class Host:
    """One network namespace."""

    def __init__(self, number: int) -> None:
        self.name, self.cable = f"sglang-mixed-{os.getpid()}-{number}", f"cable{number}"
        self.address = f"10.213.0.{number + 1}"
        #: Python that takes its process, and what that starts, to this host.
        self.enter = f"from {__name__} import enter; enter({self.name!r})"

    def run(self, call: Callable[[], T]) -> T:
        """The call's result, from a thread on this host."""

        def there() -> T:
            enter(self.name)
            return call()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(there).result()


def enter(name: str) -> None:
    """Take the calling thread to a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{name}").open() as namespace:
        failed = libc.setns(namespace.fileno(), _CLONE_NEWNET)
    # SGLang takes ranks that find each other's shared memory for neighbours, and connects them over loopback.
    failed = failed or libc.unshare(_CLONE_NEWNS)
    failed = failed or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    if failed or libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), f"cannot enter {name}")


class TwoHosts:
    """Context manager. Raises OSError with the reason where this machine does not allow network namespaces."""

    def __enter__(self) -> tuple[Host, Host]:
        self.hosts = first, second = Host(0), Host(1)
        try:
            for host in self.hosts:
                _ip("netns", "add", host.name)
            ends = ("type", "veth", "peer", "name", second.cable, "netns", second.name)
            _ip("link", "add", first.cable, "netns", first.name, *ends)
            for host in self.hosts:
                _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.cable)
                for device in ("lo", host.cable):
                    _ip("-n", host.name, "link", "set", device, "up")
            first.run(lambda: None)
        except OSError:
            self.__exit__()
            raise
        return self.hosts

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
