"""What a map rules out is refused by name with a remedy before anything starts; `--enable-ep-moe` still works."""

from __future__ import annotations

import argparse
import logging
from importlib.metadata import version
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_mixed.engine import arguments, state
from sglang_mixed.engine.plugin import missing
from sglang_mixed.engine.unsupported import UNSUPPORTED, refuse_unsupported
from sglang_mixed.errors import UnsupportedError

from .conftest import TINY

MIXED: dict[str, Any] = {
    "enable_mixed_precision": True,
    "mixed_precision_config": str(TINY / "map.yaml"),
    "model_path": str(TINY / "bf16"),
}
#: Arguments that SGLang had until 0.5.17, and that it has since 0.5.21.
OTHERS = {"torchao_config"} | {
    *("attn_dp_size", "shared_experts_tp_size", "enable_paged_experts"),
    *("enable_nvidia_megakernel", "enable_amd_monokernel", "enable_megamoe_for_layernorm_sp"),
}


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    arguments.add_cli_args(ServerArgs.add_cli_args, parser)
    return parser.parse_args(["--model-path", str(TINY / "bf16"), *flags])


def test_every_refused_argument_is_one_of_sglang() -> None:
    names = {name for group in UNSUPPORTED for name in group.allowed}
    assert names - set(vars(parse())) <= OTHERS


def test_an_sglang_without_a_function_that_is_changed_serves_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    here, gone = "uvicorn.run", "sglang.srt.model_loader.loader.gone"
    assert missing({(gone, here): print, gone: print}) == (gone,)
    monkeypatch.setattr(state, "missing", (gone,))
    with pytest.raises(UnsupportedError, match=rf"SGLang {version('sglang')} has no {gone}"):
        refuse_unsupported({})


def test_sglangs_defaults_go_with_a_map() -> None:
    refuse_unsupported(vars(parse()))


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("--pp-size 2", "use --tp-size, --ep-size and --dp-size"),
        ("--tp-size 2 --dp-size 2 --enable-dp-attention", "use --tp-size"),
        ("--enable-eplb", "--ep-size shares the experts out"),
        ("--ep-num-redundant-experts 2", "leave --ep-num-redundant-experts out"),
        ("--moe-a2a-backend deepep", "leave --moe-a2a-backend out"),
        ("--moe-runner-backend flashinfer_cutlass", "leave --moe-runner-backend out"),
        ("--speculative-algorithm EAGLE", "serve the checkpoint without a map"),
        ("--speculative-draft-model-path somewhere", "serve the checkpoint without a map"),
        ("--enable-lora", "leave --enable-lora out"),
        ("--kt-weight-path somewhere", "leave --kt-weight-path out"),
        ("--enable-deterministic-inference", "leave --enable-deterministic-inference out"),
        ("--cpu-offload-gb 4", "leave --cpu-offload-gb out"),
        ("--enable-torch-compile", "leave --enable-torch-compile out"),
        ("--weight-loader-disable-mmap", "leave --weight-loader-disable-mmap out"),
        ("--load-format remote_instance", "leave --load-format out"),
        ("--enable-http2 --tokenizer-worker-num 2", "leave one of the two out"),
    ],
)
def test_flags_that_no_map_can_be_served_with_are_refused_with_a_remedy(flags: str, remedy: str) -> None:
    given = parse("--enable-mixed-precision", "--mixed-precision-config", str(TINY / "map.yaml"), *flags.split())
    with pytest.raises(SystemExit) as ended:
        arguments.from_cli_args(lambda _, args: args, object, given)
    message = str(ended.value.code)
    assert any(flag in message for flag in flags.split() if flag.startswith("--")) and remedy in message


@pytest.mark.parametrize("flags", ["--speculative-algorithm NGRAM", "--tp-size 2 --ep-size 2 --dp-size 2"])
def test_flags_that_leave_the_weights_alone_are_kept(flags: str) -> None:
    refuse_unsupported(vars(parse(*flags.split())))


def test_a_flag_without_a_map_is_sglangs_own_business() -> None:
    assert arguments.translate({"model_path": "x", "enable_lora": True, "pp_size": 2}, {"enable_lora", "pp_size"}) == {}


@pytest.mark.parametrize("ep_size", [(), ("--ep-size", "4"), ("--ep-size", "1")])
def test_enable_ep_moe_shares_experts_over_all_ranks(
    ep_size: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    given = parse("--tp-size", "4", "--enable-ep-moe", *ep_size)
    with caplog.at_level(logging.WARNING):
        assert arguments.from_cli_args(lambda _, args: args, object, given).ep_size == 4
    assert "--ep-size 4" in caplog.text


def test_enable_ep_moe_and_another_ep_size_contradict_each_other() -> None:
    given = parse("--tp-size", "4", "--enable-ep-moe", "--ep-size", "2")
    with pytest.raises(SystemExit, match="--enable-ep-moe means --ep-size 4"):
        arguments.from_cli_args(lambda _, args: args, object, given)


def test_enable_ep_moe_is_a_keyword_of_the_engine_with_a_map_and_without() -> None:
    build = arguments.engine_arguments(dict)
    assert build(model_path="x", tp_size=2, enable_ep_moe=True) == {"model_path": "x", "tp_size": 2, "ep_size": 2}
    mixed = build(**MIXED, tp_size=2, enable_ep_moe=True)
    assert mixed["ep_size"] == 2 and mixed["quantization"] == "mixed_precision"
    with pytest.raises(UnsupportedError, match="--ep-size 2 is given"):
        build(model_path="x", tp_size=4, ep_size=2, enable_ep_moe=True)
