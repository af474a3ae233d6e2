"""Every shell and Python block of every page is run, by this test or by the one it names, or says why it cannot be."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_mixed.cli.main import app

from ..engine.launch import Server
from ..guides.jobs import run_python
from .blocks import PAGES, ROOT, Block, blocks

SERVER = "sglang serve --model-path examples/tiny/bf16 --enable-mixed-precision --mixed-precision-config"
SERVER += " examples/tiny/map.yaml --port 30000"
THE_SERVER = "the server of this page"
REASON = re.compile(r"not run: (needs (a GPU|GPUs|Docker|Kubernetes|several hosts)|installs|takes )")
NAMED = re.compile(r"run by ((?:tests/[\w/]+\.py::\w+ ?)+)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server that the pages start, once for all of them."""
    server = Server(tmp_path_factory.mktemp("server") / "log", *words_of_the_server(), fresh=False).wait()
    yield server.url
    server.job.kill()


def words_of_the_server() -> list[str]:
    """Its arguments, but for the port: others may be at work on this host."""
    words = SERVER.removesuffix(" --port 30000").split()[2:]
    return [str(ROOT / word) if word.startswith("examples/") else word for word in words]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's commands run one after another: a clone, as far as they know."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, url: str) -> None:
    """Run one line of a shell block for real; our own command in this process, where its imports are done."""
    command = command.replace("http://127.0.0.1:30000", url)
    words = shlex.split(command)
    if words[0] == "sglang-mixed":
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}\n{result.output}"
        return
    if words[0] == "curl":
        command = command.replace("curl", "curl --fail --silent --show-error", 1)
    paths = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", command], check=True, env=paths, stdout=subprocess.DEVNULL)


def runs_here(page: str) -> list[Block]:
    return [block for block in blocks(page, "bash", "python") if not block.comment]


@pytest.mark.parametrize("page", [page for page in PAGES if runs_here(page)])
def test_the_blocks_of_a_page_run_in_order(page: str, server: str, folder: Path) -> None:
    for number, block in enumerate(runs_here(page)):
        if block.language == "python":
            assert run_python(folder / f"log{number}", block.code)
        else:
            for command in block.commands:
                run(command, server)


@pytest.mark.parametrize("page", PAGES)
def test_a_block_that_is_not_run_here_says_where_or_why(page: str) -> None:
    for block in blocks(page, "bash", "python"):
        if block.comment == THE_SERVER:
            assert block.commands == [SERVER]
        elif named := NAMED.fullmatch(block.comment):
            for test in named[1].split():
                path, _, name = test.partition("::")
                tree = ast.parse((ROOT / path).read_text())
                assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test
        else:
            assert not block.comment or REASON.match(block.comment), f"{page}: {block.comment}"


def test_there_is_something_to_run() -> None:
    assert {"README.md", "docs/index.md", "docs/concepts.md", "docs/http.md"} <= {
        page for page in PAGES if runs_here(page)
    }
