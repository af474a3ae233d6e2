"""Several ranks on `torch_cpu`: collectives over gloo, and one host's cores and memory shared out among its ranks."""

from __future__ import annotations

import inspect
import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import psutil
import torch

logger = logging.getLogger(__name__)

#: What SGLang's documentation calls the operator's list of cores, one group a rank: "0-15|16-31".
BINDING = "SGLANG_CPU_OMP_THREADS_BIND"
_shares: list[str] = []


def hooks() -> dict[str, Callable[..., Any]]:
    """SGLang function -> what goes around it."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    binding: dict[str, Callable[..., Any]] = (
        {"sglang.srt.model_executor.model_runner.ModelRunner.init_threads_binding": init_threads_binding}
        if hasattr(ModelRunner, "init_threads_binding")
        else {"sglang.srt.utils.numa_utils.init_threads_binding": bind_threads}
    )
    return {
        **binding,
        "sglang.srt.utils.common.get_cpu_ids_by_node": get_cpu_ids_by_node,
        "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__": init_group,
        "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp": keep_config,
        "sglang.srt.layers.moe.fused_moe_native.moe_forward_native": moe_forward_native,
    }


def init_threads_binding(original: Callable[..., None], runner: Any) -> None:
    """Hook around the model runner's thread binding until 0.5.20, as `bind_threads`."""

    def bind_as_told() -> Any:
        original(runner)
        return runner.local_omp_cpuid

    runner.local_omp_cpuid = _share_host(runner.server_args, runner.gpu_id, bind_as_told)


def bind_threads(original: Callable[..., Any], *, numa_index: int, world_size: int) -> Any:
    """Hook around SGLang's thread binding, which wants a NUMA node for every rank and binds only with AMX.

    Threads are divided, not pinned: two servers on one host would pin their first ranks to the same cores.
    """
    from sglang.srt.runtime_context import get_server_args

    told = partial(original, numa_index=numa_index, world_size=world_size)
    return _share_host(get_server_args(), numa_index, told)


def _share_host(arguments: Any, device: int, bind_as_told: Callable[[], Any]) -> str:
    """The rank's share of this host's cores."""
    _shares[:] = share_cores(sorted(os.sched_getaffinity(0)), ranks_on_host(arguments))
    if arguments.nnodes > 1:
        use_route_to(arguments.dist_init_addr)
    if os.environ.get(BINDING, "all") != "all":
        own: str = bind_as_told()
        cores = parse_cores(own)
        os.sched_setaffinity(0, cores)
        threads = len(cores)
    else:
        own = _shares[device % len(_shares)]
        threads = max(1, torch.get_num_threads() // len(_shares))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    logger.info("torch_cpu: %d ranks on this host, %d threads for this one", len(_shares), torch.get_num_threads())
    return own


def ranks_on_host(arguments: Any) -> int:
    """How many scheduler processes one host runs. With DP attention the DP ranks are the TP ranks."""
    dp = 1 if arguments.enable_dp_attention else arguments.dp_size
    return max(1, dp * arguments.tp_size * arguments.pp_size // arguments.nnodes)


def share_cores(cores: list[int], ranks: int) -> list[str]:
    """Cores -> one comma-separated run per rank, as even as can be; ranks share cores where there are more of them."""
    if ranks >= len(cores):
        return [str(cores[rank % len(cores)]) for rank in range(ranks)]
    bounds = [rank * len(cores) // ranks for rank in range(ranks + 1)]
    return [",".join(map(str, cores[begin:end])) for begin, end in pairwise(bounds)]


def parse_cores(text: str) -> set[int]:
    """ "0-2,5" -> {0, 1, 2, 5}."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def get_cpu_ids_by_node(original: Callable[..., list[str]]) -> list[str]:
    """Hook around SGLang's list of NUMA nodes, by whose number it divides the host's memory: here a rank is a node."""
    return list(_shares) or [",".join(map(str, sorted(os.sched_getaffinity(0))))]


def use_route_to(address: str) -> None:
    """Have ranks listen where the first node reaches them: by itself gloo takes what the host's name resolves to."""
    host, _, port = address.rpartition(":")
    family, kind, *_, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing: it only picks a route
        own = probe.getsockname()[0]
    if "HOST_IP" not in os.environ:
        os.environ.setdefault("SGLANG_HOST_IP", own)
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def keep_config(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook around SGLang's padding of a model's sizes for its AMX kernels: plain torch takes any size."""
    return model_config


#: Parameters of a group's constructor that turn on communicators of accelerators, by all names they have had.
ACCELERATED = (
    "use_pynccl",
    "use_pymscclpp",
    "use_mscclpp",
    "use_custom_allreduce",
    "use_torch_symm_mem_all_reduce",
)


def init_group(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Hook around a group's constructor: communicators of accelerators stay off, which leaves torch's gloo group."""
    known = inspect.signature(original).parameters
    original(*args, **kwargs | dict.fromkeys([name for name in ACCELERATED if name in known], False))


def moe_forward_native(
    original: Callable[..., torch.Tensor], layer: torch.nn.Module, x: torch.Tensor, topk_output: Any, config: Any
) -> torch.Tensor:
    """Hook around SGLang's MoE in plain torch, which knows no -1: an expert of another rank, or padding.

    Only the other (token, expert) pairs are computed, each as a token of its own; x [tokens, hidden] -> the same.
    """
    weights, ids, *_ = topk_output
    if (ids >= 0).all():
        return original(layer, x, topk_output, config)
    tokens, places = (ids >= 0).nonzero(as_tuple=True)
    output = torch.zeros(x.shape)
    if len(tokens):
        own = weights[tokens, places, None]
        pairs = topk_output._replace(topk_weights=torch.ones_like(own), topk_ids=ids[tokens, places, None])
        # Weighted in float32 and rounded once, as the original does with all of a token's experts.
        output.index_add_(0, tokens, original(layer, x[tokens], pairs, config).float() * own)
    return output.to(x.dtype)
