"""What can be told of a host before a server is started on it: enough accelerators, a free address."""

from __future__ import annotations

import errno
import socket

from .errors import ParallelismError, UnsupportedError


def available_devices() -> int | None:
    """Accelerators that this process sees; None where there is none, and ranks share the CPU."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else None


def check_devices(tp: int, dp: int, nodes: int, available: int | None) -> None:
    """Raise ParallelismError unless this node has an accelerator for each of its ranks."""
    needed = tp * dp // nodes
    if available is None or needed <= available:
        return
    over = f" over {nodes} nodes" if nodes > 1 else ""
    raise ParallelismError(
        f"not enough GPUs: {needed} needed (tp {tp} × dp {dp}{over}), {available} available",
        rule="every rank has a GPU of its own",
        remedy="lower --tp-size or --dp-size, add nodes (--nnodes), or make more GPUs visible (CUDA_VISIBLE_DEVICES)",
    )


def free_port() -> int:
    """A port of this host that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def check_address(host: str, port: int) -> None:
    """Raise UnsupportedError where something listens already, or the address is not this host's."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as listener:
            # As the server binds: connections that were closed a moment ago do not count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise UnsupportedError(
            f"address already in use: {host}:{port}" if taken else f"cannot listen on {host}:{port}: {error.strerror}",
            rule="the server listens where nothing else does, on an address of this host",
            remedy="stop what listens there, or choose another --port" if taken else "correct --host and --port",
        ) from None
