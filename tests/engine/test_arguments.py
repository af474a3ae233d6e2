"""From flags and map sections to SGLang's arguments: nothing without our flag, explicit flags win, bad input stops."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sglang_mixed.engine import arguments
from sglang_mixed.errors import MapError, MissingFileError, UnsupportedError

from .conftest import TINY

MAP = TINY / "map.yaml"
MIXED: dict[str, Any] = {
    "enable_mixed_precision": True,
    "mixed_precision_config": str(MAP),
    "model_path": str(TINY / "bf16"),
}


def test_without_our_flag_nothing_is_translated() -> None:
    assert arguments.translate({"model_path": "anything", "quantization": "fp8"}, set()) == {}


def test_the_map_becomes_sglang_arguments() -> None:
    overrides = arguments.translate(MIXED, set())
    assert overrides["quantization"] == "mixed_precision"
    expected = {
        "context_length": 1024,
        "max_running_requests": 16,
        "dtype": "bfloat16",
        "host": "127.0.0.1",
        "port": 8080,
    }
    assert {name: overrides[name] for name in expected} == expected
    request = arguments.Request(**json.loads(overrides["model_loader_extra_config"])["mixed_precision"])
    assert request.rebuild_plan().fingerprint == request.fingerprint


def test_an_explicit_flag_wins_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        overrides = arguments.translate({**MIXED, "port": 9}, {"port"})
    assert "port" not in overrides
    assert "--port 9 wins over the map's server.port: 8080" in caplog.text


def test_flags_given_on_the_command_line_are_told_from_defaults() -> None:
    def sglang_flags(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--port", type=int, default=30000)
        parser.add_argument("--host", default="127.0.0.1")

    parser = argparse.ArgumentParser()
    arguments.add_cli_args(sglang_flags, parser)
    parsed = parser.parse_args(["--enable-mixed-precision", "--port", "30000"])
    assert parsed.port == 30000 and parsed.host == "127.0.0.1"
    assert parsed.explicit_arguments == {"enable_mixed_precision", "port"}


def test_other_loader_settings_are_kept() -> None:
    overrides = arguments.translate({**MIXED, "model_loader_extra_config": '{"num_threads": 2}'}, set())
    assert json.loads(overrides["model_loader_extra_config"])["num_threads"] == 2


def test_a_map_without_the_enabling_flag_is_refused() -> None:
    with pytest.raises(MapError, match="without --enable-mixed-precision"):
        arguments.translate({"mixed_precision_config": str(MAP), "model_path": "x"}, set())


def test_the_enabling_flag_without_a_map_is_refused() -> None:
    with pytest.raises(MapError, match="needs a map"):
        arguments.translate({"enable_mixed_precision": True, "model_path": "x"}, set())


def test_a_missing_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as error:
        arguments.translate({**MIXED, "mixed_precision_config": str(tmp_path / "no.yaml")}, set())
    assert str(tmp_path / "no.yaml") in str(error.value)


@pytest.mark.parametrize(("flag", "value"), [("quantization", "fp8"), ("load_format", "dummy"), ("enable_eplb", True)])
def test_flags_that_contradict_the_map_are_refused(flag: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match="--" + flag.replace("_", "-")):
        arguments.translate({**MIXED, flag: value}, set())


def test_the_command_line_ends_with_the_message_and_status_1() -> None:
    namespace = argparse.Namespace(enable_mixed_precision=True, mixed_precision_config="/nowhere.yaml", model_path="x")
    with pytest.raises(SystemExit) as ended:
        arguments.from_cli_args(lambda args: args, object, namespace)
    assert "/nowhere.yaml" in str(ended.value.code)


def test_a_changed_source_is_noticed_by_the_process_that_loads() -> None:
    overrides = arguments.translate(MIXED, set())
    request = json.loads(overrides["model_loader_extra_config"])["mixed_precision"]
    with pytest.raises(Exception, match="same checkpoints"):
        arguments.Request(**{**request, "fingerprint": "0" * 64}).rebuild_plan()
