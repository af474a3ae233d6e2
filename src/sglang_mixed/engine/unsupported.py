"""SGLang flags that a map cannot be combined with, each group with the reason and what to do instead.

A flag that an SGLang version does not know is simply never given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from ..errors import UnsupportedError
from . import state


@dataclass(frozen=True, slots=True)
class Flags:
    """Argument -> the values, besides its empty ones, that a map allows."""

    rule: str
    remedy: str
    allowed: Mapping[str, tuple[object, ...]]


def _none(*names: str) -> dict[str, tuple[object, ...]]:
    return dict.fromkeys(names, ())


UNSUPPORTED = (
    Flags(
        "the map alone decides how each weight is stored and loaded",
        "leave {flag} out",
        {
            "quantization": ("mixed_precision",),
            "load_format": ("auto", "safetensors"),
            "startup_weight_load_mode": ("serial",),
            "weight_cache_mode": ("off",),
            **_none(
                "torchao_config",
                "modelopt_quant",
                "quantize_and_serve",
                "custom_weight_loader",
                "weight_loader_disable_mmap",
                "weight_loader_prefetch_checkpoints",
                "weight_loader_drop_cache_after_load",
                "remote_instance_weight_loader_seed_instance_ip",
                "modelexpress_config",
                "decrypted_config_file",
                "delete_ckpt_after_loading",
                "checkpoint_engine_wait_weights_before_ready",
            ),
        },
    ),
    Flags(
        "an expert stays on the rank that read it",
        "leave {flag} out; --ep-size shares the experts out in equal runs",
        {
            "init_expert_location": ("trivial",),
            "elastic_ep_backend": ("none",),
            **_none("enable_eplb", "ep_num_redundant_experts", "enable_paged_experts"),
        },
    ),
    Flags(
        "every layer is cut over all tensor-parallel ranks alike, and every rank holds all layers",
        "use --tp-size, --ep-size and --dp-size",
        {
            "pp_size": (1,),
            "attn_cp_size": (1,),
            "attn_dp_size": (1,),
            "moe_dp_size": (1,),
            "dwdp_size": (1,),
            **_none(
                "enable_dp_attention",
                "enable_dp_lm_head",
                "moe_dense_tp_size",
                "enable_shared_experts_attn_tp",
                "shared_experts_tp_size",
                "enable_dense_mlp_attn_tp",
            ),
        },
    ),
    Flags(
        "each format of a MoE layer brings its own kernel, and they add up over SGLang's standard dispatch",
        "leave {flag} out",
        {"moe_a2a_backend": ("none",), "moe_runner_backend": ("auto",)},
    ),
    Flags(
        "the map describes one model, and says nothing of a draft model's weights",
        "leave {flag} out, or serve the checkpoint without a map",
        {"speculative_algorithm": ("NGRAM",), **_none("speculative_draft_model_path")},
    ),
    Flags(
        "the order in which kernels of compressed weights add up depends on how many tokens they are given at once",
        "leave {flag} out",
        _none("enable_deterministic_inference"),
    ),
    Flags(
        "compressed weights lie in their kernels' layout, which nothing else can read, move or compile",
        "leave {flag} out",
        {
            "offload_group_size": (-1,),
            **_none(
                "enable_lora",
                "lora_paths",
                "kt_weight_path",
                "cpu_offload_gb",
                "enable_torch_compile",
                "enable_nvidia_megakernel",
                "enable_amd_monokernel",
                "enable_megamoe_for_layernorm_sp",
            ),
        },
    ),
)


def refuse_unsupported(arguments: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a flag that contradicts a map, or an SGLang that cannot serve one."""
    if state.missing:
        raise UnsupportedError(
            f"SGLang {version('sglang')} has no {', no '.join(state.missing)}",
            rule="a map is served by SGLang's own code, changed at these places",
            remedy="install a version that docs/support.md names",
        )
    for group in UNSUPPORTED:
        for name, allowed in group.allowed.items():
            value = arguments.get(name)
            if value and value not in allowed:
                flag = "--" + name.replace("_", "-")
                given = flag if value is True else f"{flag} {value}"
                raise UnsupportedError(
                    f"{given} cannot be combined with --enable-mixed-precision",
                    rule=group.rule,
                    remedy=group.remedy.format(flag=flag),
                )
    if arguments.get("enable_http2") and (arguments.get("tokenizer_worker_num") or 1) > 1:
        raise UnsupportedError(
            "--enable-http2 cannot be combined with --tokenizer-worker-num > 1 where a map is served",
            rule="SGLang starts these workers without its plugins",
            remedy="leave one of the two out",
        )
