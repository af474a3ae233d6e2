"""Commands as the guides write them, run in processes that have imported SGLang already."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from ..engine.launch import FLAGS, RUN_SCRIPT, TINY, zygote
from ..engine.zygote import ROOT, Job

#: `python FILE ...`, `python -m MODULE ...`.
RUN_FILE = """\
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUN_MODULE = """\
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
SMALL = [*FLAGS, "--skip-server-warmup"]
PATHS = {"MODEL": str(TINY / "bf16"), "MAP": str(TINY / "map.yaml")}


def words(command: str, **paths: object) -> list[str]:
    """A guide's command with its paths replaced."""
    text = command.replace("\\\n", " ")
    for name, path in {**PATHS, **{key: str(one) for key, one in paths.items()}}.items():
        text = text.replace(name, path)
    return shlex.split(text)


def start(log: Path, command: str, *more: str, **paths: object) -> Job:
    """Start a guide's command: python, or sglang-mixed."""
    program, *rest = words(command, **paths)
    if program == "sglang-mixed":
        return zygote().start(log, RUN_SCRIPT, program, *rest, *more)
    if rest[0] == "-m":
        return zygote().start(log, RUN_MODULE, *rest[1:], *more)
    return zygote().start(log, RUN_FILE, str(ROOT / rest[0]), *rest[1:], *more)


def run_python(log: Path, code: str, **paths: object) -> str:
    """Run a guide's Python; its output."""
    for name, path in {**PATHS, **{key: str(one) for key, one in paths.items()}}.items():
        code = code.replace(name, path)
    job = zygote().start(log, code)
    try:
        status = job.wait(120)
    finally:
        job.kill()
    assert status == 0, log.read_text()
    return log.read_text()


def with_scripts() -> dict[str, str]:
    """An environment that finds the commands that are installed here."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def command_line(*command: str) -> list[str]:
    """What `--dry-run` prints, without what is the same always."""
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True, env=with_scripts())
    python, module, name, flag, model, *rest = done.stdout.split()
    assert (python, module, name, flag, model) == (
        "python",
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(TINY / "bf16"),
    )
    return rest
