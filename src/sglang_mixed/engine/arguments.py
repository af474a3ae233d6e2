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

from ..checkpoint import changed
from ..checkpoint.folder import quantization_config, read_config
from ..config import MixedPrecisionMap, load_map, locate
from ..errors import CheckpointError, EngineError, MapError, MixedPrecisionError, UnsupportedError
from ..formats.mix import METHOD
from ..plan import Plan, make_plan
from ..preflight import available_devices, check_address, check_devices
from .unsupported import refuse_unsupported

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
#: Keyword arguments of `sgl.Engine` that SGLang does not know.
OURS = (
    "enable_mixed_precision",
    "mixed_precision_config",
    "allow_different_base",
    "disable_expert_tracking",
    "verify_values",
    "enable_ep_moe",
)


@dataclass(frozen=True, slots=True)
class Request:
    """What every rank needs to build the same plan; travels as JSON in `model_loader_extra_config`.

    `written`: when the newest of this node's files was written, in ns.
    """

    map: dict[str, Any]
    base: str
    fingerprint: str
    track_experts: bool = True
    verify_values: bool = False
    written: int = 0

    def rebuild_plan(self) -> Plan:
        """The plan, from this process's view of the files.

        Raises EngineError if they differ from the launcher's, ChangedFileError if one was written since.
        """
        plan = make_plan(MixedPrecisionMap.from_json(self.map), base=self.base)
        if plan.fingerprint != self.fingerprint:
            raise EngineError(
                f"this process's files give plan {plan.fingerprint[:12]}, the launcher's gave {self.fingerprint[:12]}",
                rule="every process reads the same map and the same checkpoints",
                remedy="restart; on several nodes, put the same checkpoint files on each",
            )
        if self.written and (newest := plan.newest_file())[0] != self.written:
            raise changed(newest[1])
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
    group.add_argument(
        "--verify-values", action="store_true", help="Look at every weight while it is loaded, not only at scales."
    )
    group.add_argument(
        "--disable-expert-tracking", action="store_true", help="Do not count the tokens routed to each expert."
    )
    if not any("--enable-ep-moe" in action.option_strings for action in parser._actions):
        parser.add_argument("--enable-ep-moe", action="store_true", help="An older name: --ep-size equal to --tp-size.")
    parse_args = parser.parse_args

    def parse_and_note(args: Any = None, namespace: Any = None) -> argparse.Namespace:
        parsed: argparse.Namespace = parse_args(args, namespace)
        if parsed.enable_mixed_precision or parsed.enable_ep_moe:
            parsed.explicit_arguments = _given(parser, parse_args, args)
        return parsed

    parser.parse_args = parse_and_note  # type: ignore[assignment, method-assign]


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """Hook around `ServerArgs.from_cli_args`. An error of ours ends the process with its message and status 1."""
    try:
        overrides = translate(vars(args), getattr(args, "explicit_arguments", set()))
        if "quantization" in overrides:
            _check_host(argparse.Namespace(**vars(args) | overrides))
    except MixedPrecisionError as error:
        raise SystemExit(f"sglang-mixed: error: {error}") from None
    for name, value in overrides.items():
        setattr(args, name, value)
    return original(args) if getattr(original, "__self__", None) is not None else original(cls, args)


def _check_host(args: argparse.Namespace) -> None:
    """What would end the start after minutes of loading."""
    on_accelerators = args.device != "cpu" and not args.enable_dp_attention
    check_devices(args.tp_size, args.dp_size, args.nnodes, available_devices() if on_accelerators else None)
    check_address(args.host, args.port)


def engine_arguments(server_args_class: Callable[..., Any]) -> Callable[..., Any]:
    """`Engine.server_args_class` that also takes our keyword arguments."""

    def build(**arguments: Any) -> Any:
        overrides = translate(arguments, set(arguments))
        return server_args_class(**{k: v for k, v in arguments.items() if k not in OURS} | overrides)

    return build


def translate(arguments: Mapping[str, Any], explicit: Collection[str]) -> dict[str, Any]:
    """SGLang arguments to set; none without our flags. Plans and checks everything, before any process is started."""
    overrides = _expert_parallel(arguments, explicit)
    path = _map_path(arguments)
    if path is None:
        return overrides
    described = dataclasses.replace(load_map(path), allow_different_base=bool(arguments.get("allow_different_base")))
    overrides |= _from_sections(described, arguments, explicit)
    refuse_unsupported({**arguments, **overrides})
    base = str(arguments["model_path"])
    plan = make_plan(described, base=base)
    for warning in plan.warnings:
        logger.warning("mixed precision: %s", warning)
    request = Request(
        described.to_json(),
        base,
        plan.fingerprint,
        track_experts=not arguments.get("disable_expert_tracking"),
        verify_values=bool(arguments.get("verify_values")),
        written=plan.newest_file()[0],
    )
    extra = json.loads(arguments.get("model_loader_extra_config") or "{}")
    return overrides | {
        "quantization": "mixed_precision",
        "model_loader_extra_config": json.dumps(extra | {"mixed_precision": dataclasses.asdict(request)}),
        "disable_shared_experts_fusion": True,
    }


def _map_path(arguments: Mapping[str, Any]) -> Path | None:
    """The map, or the exported mix that needs none; None for a model that is served as it is."""
    path = arguments.get("mixed_precision_config")
    if arguments.get("enable_mixed_precision"):
        found = Path(path) if path else _exported_mix(arguments.get("model_path"))
        if found is None:
            raise MapError(
                "--enable-mixed-precision needs a map", remedy="add --mixed-precision-config MAP.yaml (see the README)"
            )
        return found
    if path:
        raise MapError(
            "--mixed-precision-config is given without --enable-mixed-precision",
            file=path,
            remedy="add --enable-mixed-precision, or leave the map out to serve the checkpoint as it is",
        )
    return _exported_mix(arguments.get("model_path"))


def _exported_mix(model_path: object) -> Path | None:
    """The folder of a model that `sglang-mixed export` wrote; None for any other, whatever is wrong with it."""
    try:
        folder = locate(str(model_path), Path.cwd())
        quantization = quantization_config(folder, read_config(folder))
    except CheckpointError:
        return None
    return folder if quantization.get("quant_method") == METHOD else None


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


def _expert_parallel(arguments: Mapping[str, Any], explicit: Collection[str]) -> dict[str, Any]:
    """`--enable-ep-moe`, which SGLang has dropped: every tensor-parallel rank holds its own experts.

    As there, an `--ep-size` of 1 beside it gives way.
    """
    if not arguments.get("enable_ep_moe"):
        return {}
    tp_size, ep_size = arguments.get("tp_size") or 1, arguments.get("ep_size")
    if "ep_size" in explicit and ep_size not in (1, tp_size):
        raise UnsupportedError(
            f"--enable-ep-moe means --ep-size {tp_size} (the --tp-size), but --ep-size {ep_size} is given too",
            remedy="leave one of the two out",
        )
    logger.warning("--enable-ep-moe is an older name: served with --ep-size %d, the --tp-size", tp_size)
    return {"ep_size": tp_size}


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
