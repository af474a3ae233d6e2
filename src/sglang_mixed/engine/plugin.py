"""Entry point `sglang.srt.plugins`: everything that is hooked into SGLang, in one list."""

from __future__ import annotations


def register() -> None:
    """Called once in every SGLang process. Nothing changes for a server that does not ask for mixed precision."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import arguments, python_api
    from .cpu import logits, ops, parallel
    from .cpu.platform import runs_on_torch_cpu
    from .layers import quantization
    from .loading import loader
    from .serving import questions, routes, tracking

    arguments_path = "sglang.srt.server_args.ServerArgs"
    runner_path = "sglang.srt.model_executor.model_runner.ModelRunner"
    worker_path = "sglang.srt.managers.tp_worker.BaseTpWorker"
    for target, hook in {
        f"{arguments_path}.add_cli_args": arguments.add_cli_args,
        f"{arguments_path}.from_cli_args": arguments.from_cli_args,
        "sglang.srt.model_loader.loader.get_model_loader": loader.get_model_loader,
        "sglang.srt.model_loader.loader.DefaultModelLoader.load_model": python_api.load_default,
        "sglang.srt.model_loader.utils.get_model_architecture": loader.get_model_architecture,
        f"{runner_path}.load_model": tracking.load_model,
        f"{runner_path}.forward": tracking.forward,
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": tracking.init_batch,
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.forward_impl": tracking.forward_impl,
        f"{worker_path}.update_weights_from_disk": loader.update_weights,
        f"{worker_path}.update_weights_from_distributed": loader.update_weights,
        f"{worker_path}.update_weights_from_tensor": loader.update_weights,
        f"{worker_path}.update_weights_from_ipc": loader.update_weights,
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state": questions.get_internal_state,
        "sglang.srt.entrypoints.engine.Engine._launch_subprocesses": routes.launch_subprocesses,
        "sglang.srt.models.gpt_oss.GptOssAttention.__init__": quantization.quantize_attention,
        "sglang.srt.utils.common.add_prometheus_middleware": routes.add_prometheus_middleware,
        "sglang.srt.utils.auth.decide_request_auth": routes.decide_request_auth,
        "uvicorn.run": routes.run_uvicorn,
    }.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    if runs_on_torch_cpu():
        lm_head = "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head"
        for target, hook in {lm_head: logits.compute_lm_head, **ops.hooks(), **parallel.hooks()}.items():
            HookRegistry.register(target, hook, HookType.AROUND)
        ATTENTION_BACKENDS["torch_native"] = ops.create_attention
    Engine.server_args_class = staticmethod(arguments.engine_arguments(Engine.server_args_class))
    # First in the table: SGLang lets the first method that claims a checkpoint's config have it.
    others = dict(QUANTIZATION_METHODS)
    QUANTIZATION_METHODS.clear()
    QUANTIZATION_METHODS.update({quantization.NAME: quantization.MixedPrecisionQuantization, **others})
