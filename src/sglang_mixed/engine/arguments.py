"""From our flags and the map's `inference` and `server` sections to SGLang's own arguments."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MixedPrecisionMap, load_map
from ..errors import EngineError, MapError, MixedPrecisionError, UnsupportedError
from ..plan import Plan, make_plan

logger = logging.getLogger(__name__)

#: Map section and key -> the SGLang argument it becomes.
ARGUMENTS = {
    ("inference", "max_seq_length"): "context_length",
    ("inference", "max_batch_size"): "max_running_requests",
    ("inference", "dtype"): "dtype",
    ("inference", "device_map"): "device",
    ("server", "host"): "host",
    ("server", "port"): "port",
    ("server", "max_workers"): "tokenizer_worker_num",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What every rank needs to build the same plan; travels as JSON in `model_loader_extra_config`."""

    map: dict[str, Any]
    base: str
    fingerprint: str

    def rebuild_plan(self) -> Plan:
        """The plan, from this process's view of the files. Raises EngineError if they differ from the launcher's."""
        plan = make_plan(MixedPrecisionMap.from_json(self.map), base=self.base)
        if plan.fingerprint != self.fingerprint:
            raise EngineError(
                f"this process's files give plan {plan.fingerprint[:12]}, the launcher's gave {self.fingerprint[:12]}",
                rule="every process reads the same map and the same checkpoints",
                remedy="restart; on several nodes, put the same checkpoint files on each",
            )
        return plan


def add_cli_args(original: Callable[..., None], parser: argparse.ArgumentParser) -> None:
    """Hook around `ServerArgs.add_cli_args`: our flags, and a note of which flags the operator gave."""
    original(parser)
    group = parser.add_argument_group("mixed precision (sglang-mixed)")
    group.add_argument("--enable-mixed-precision", action="store_true", help="Serve the mix that the map describes.")
    group.add_argument(
        "--mixed-precision-config", metavar="MAP", help="The YAML map: sources and which weight is whose."
    )
    group.add_argument(
        "--allow-different-base", action="store_true", help="Mix sources although their 16-bit weights differ."
    )
    parse_args = parser.parse_args

    def parse_and_note(args: Any = None, namespace: Any = None) -> argparse.Namespace:
        parsed: argparse.Namespace = parse_args(args, namespace)
        if parsed.enable_mixed_precision:
            parsed.explicit_arguments = _given(parser, parse_args, args)
        return parsed

    parser.parse_args = parse_and_note  # type: ignore[assignment, method-assign]


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Hook around `ServerArgs.from_cli_args`. An error of ours ends the process with its message and status 1."""
    try:
        overrides = translate(vars(args), getattr(args, "explicit_arguments", set()))
    except MixedPrecisionError as error:
        raise SystemExit(f"sglang-mixed: error: {error}") from None
    for name, value in overrides.items():
        setattr(args, name, value)
    return original(args) if getattr(original, "__self__", None) is not None else original(cls, args)


def engine_arguments(server_args_class: Callable[..., Any]) -> Callable[..., Any]:
    """`Engine.server_args_class` that also takes our keyword arguments."""

    def build(**arguments: Any) -> Any:
        overrides = translate(arguments, set(arguments))
        ours = ("enable_mixed_precision", "mixed_precision_config", "allow_different_base")
        return server_args_class(**{k: v for k, v in arguments.items() if k not in ours} | overrides)

    return build


def translate(arguments: Mapping[str, Any], explicit: Collection[str]) -> dict[str, Any]:
    """SGLang arguments to set; empty without our flag. Plans and checks everything, before any process is started."""
    path = arguments.get("mixed_precision_config")
    if not arguments.get("enable_mixed_precision"):
        if path:
            raise MapError(
                "--mixed-precision-config is given without --enable-mixed-precision",
                file=path,
                remedy="add --enable-mixed-precision, or leave the map out to serve the checkpoint as it is",
            )
        return {}
    if not path:
        raise MapError(
            "--enable-mixed-precision needs a map", remedy="add --mixed-precision-config MAP.yaml (see the README)"
        )
    _refuse_unsupported(arguments)
    described = dataclasses.replace(
        load_map(Path(path)), allow_different_base=bool(arguments.get("allow_different_base"))
    )
    base = str(arguments["model_path"])
    plan = make_plan(described, base=base)
    for warning in plan.warnings:
        logger.warning("mixed precision: %s", warning)
    request = Request(described.to_json(), base, plan.fingerprint)
    extra = json.loads(arguments.get("model_loader_extra_config") or "{}")
    overrides: dict[str, Any] = {
        "quantization": "mixed_precision",
        "model_loader_extra_config": json.dumps(extra | {"mixed_precision": dataclasses.asdict(request)}),
        "disable_shared_experts_fusion": True,
    }
    if arguments.get("speculative_draft_model_path") and not arguments.get("speculative_draft_model_quantization"):
        overrides["speculative_draft_model_quantization"] = "unquant"
    return overrides | _from_sections(described, arguments, explicit)


def _from_sections(
    described: MixedPrecisionMap, arguments: Mapping[str, Any], explicit: Collection[str]
) -> dict[str, Any]:
    overrides = {}
    for (section, key), name in ARGUMENTS.items():
        value = getattr(getattr(described, section), key)
        if value is None or (key == "device_map" and value == "auto"):
            continue
        if name in explicit:
            flag = "--" + name.replace("_", "-")
            logger.warning(
                "mixed precision: %s %s wins over the map's %s.%s: %s", flag, arguments[name], section, key, value
            )
        else:
            overrides[name] = value
    return overrides


def _refuse_unsupported(arguments: Mapping[str, Any]) -> None:
    refused = {
        "quantization": (None, "mixed_precision"),
        "load_format": (None, "auto", "safetensors"),
        "startup_weight_load_mode": (None, "serial"),
        "enable_eplb": (None, False),
        "ep_num_redundant_experts": (None, 0),
    }
    for name, allowed in refused.items():
        value = arguments.get(name)
        if value not in allowed:
            flag = "--" + name.replace("_", "-")
            raise UnsupportedError(
                f"{flag} {value} cannot be combined with --enable-mixed-precision",
                rule="the map alone decides how each weight is stored and loaded",
                remedy=f"leave {flag} out",
            )


def _given(parser: argparse.ArgumentParser, parse_args: Callable[..., argparse.Namespace], args: Any) -> set[str]:
    """The destinations of the flags that stand on the command line, by parsing once more without defaults."""
    defaults = [(action, action.default) for action in parser._actions]
    try:
        for action, _ in defaults:
            action.default = argparse.SUPPRESS
        return set(vars(parse_args(args)))
    finally:
        for action, default in defaults:
            action.default = default
