"""The READMEs: both languages say the same, and what they name exists."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from sglang_mixed.cli.main import app
from sglang_mixed.config import load_map

from .blocks import BLOCK, ROOT

READMES = ("README.md", "README.zh-CN.md")
EXPERTS = ROOT / "examples" / "tiny" / "experts.yaml"
OURS = ROOT / "src" / "sglang_mixed" / "engine" / "arguments.py"
#: Flags of SGLang, pip and uv.
FOREIGN = {
    *(
        "--model-path",
        "--quantization",
        "--load-format",
        "--enable-torch-compile",
        "--enable-deterministic-inference",
        "--context-length",
        "--dtype",
    ),
    *("--max-running-requests", "--device", "--host", "--port", "--tokenizer-worker-num", "--no-deps", "--excludes"),
    *("--tp-size", "--ep-size", "--dp-size", "--build-arg", "--gpus", "--ipc"),
}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def code(text: str) -> list[tuple[str, str]]:
    """(language, code) of every block."""
    return [(language, block) for _, language, block in BLOCK.findall(text)]


def headings(text: str) -> list[str]:
    """The heading marks, in order."""
    return re.findall(r"^(#+) ", BLOCK.sub("", text), re.MULTILINE)


def test_both_languages_have_the_same_headings_and_code_blocks() -> None:
    english, chinese = map(read, READMES)
    assert headings(english) == headings(chinese) != []
    assert code(english) == code(chinese) != []
    assert len(english.splitlines()) <= 230


def test_the_example_map_is_the_one_that_runs() -> None:
    (example,) = (one for language, one in code(read("README.md")) if language == "yaml")
    assert example == EXPERTS.read_text()
    found = load_map(EXPERTS)
    assert None not in {*found.inference.model_dump().values(), *found.server.model_dump().values()}


def test_check_prints_what_is_shown() -> None:
    (shown,) = (one for _, one in code(read("README.md")) if one.startswith("$ sglang-mixed check"))
    commands = re.findall(r"^\$ sglang-mixed (.*)\n((?:(?!\$).*\n)+)", shown, re.MULTILINE)
    assert len(commands) == 2
    for command, expected in commands:
        result = CliRunner().invoke(app, command.replace(str(EXPERTS.relative_to(ROOT)), str(EXPERTS)).split())
        printed = " ".join(result.output.split())
        for part in re.split(r"^\.\.\.$", expected, flags=re.MULTILINE):
            assert " ".join(part.split()) in printed


@pytest.mark.parametrize("name", READMES)
def test_every_flag_of_ours_exists(name: str) -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", read(name))) - FOREIGN
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {option for command in commands for parameter in command.params for option in parameter.opts}
    known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', OURS.read_text()))
    assert {"--enable-mixed-precision", "--mixed-precision-config"} <= flags <= known
