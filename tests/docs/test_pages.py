"""What the pages say of the code is what the code says: generated pages, routes, metrics, names, links."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from scripts.docs import commands, messages

import sglang_mixed
from sglang_mixed import errors
from sglang_mixed.formats import FORMATS

from ..guides.jobs import run_python
from .blocks import PAGES, ROOT

ENGINE = ROOT / "src" / "sglang_mixed" / "engine"
AGAIN = "write the pages again: python -m scripts.docs.write"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_pages_made_from_the_code_are_current(tmp_path: Path) -> None:
    assert page("troubleshooting.md") == messages.page(), AGAIN
    assert page("commands.md") == commands.page(), AGAIN
    # It asks SGLang's methods what they take.
    printed = run_python(tmp_path / "log", "from scripts.docs import formats; print('begin' + formats.page() + 'end')")
    assert page("formats.md") == printed.partition("begin")[2].rpartition("end")[0], AGAIN


def test_every_format_has_its_section() -> None:
    assert all(f"Read by `formats/{name}.py`." in page("formats.md") for name in FORMATS)


def test_a_raised_message_is_on_the_page_or_another_errors() -> None:
    """A call whose words are not found in the code only hands on what another error says."""
    for path in messages.SOURCE.rglob("*.py"):
        module = messages.Module(ast.parse(path.read_text()), messages.constants())
        for call in module.calls:
            if messages.called(call) in messages.TREE and call.args and not module.read(call):
                assert re.search(r"\berror\b|\bfirst\b|'error'", ast.unparse(call)), f"{path}: {ast.unparse(call)}"


def test_what_is_raised_here_is_found_on_the_page() -> None:
    words = page("troubleshooting.md")
    for kind in errors.MixedPrecisionError.__subclasses__():
        assert any(f"\n## {one.__name__}\n" in words for one in (kind, *kind.__subclasses__())), kind


def test_every_route_and_metric_is_described() -> None:
    described, routes = page("http.md"), (ENGINE / "serving" / "routes.py").read_text()
    found = re.findall(r'add_api_route\(f?"?({?PREFIX}?[^",]*)"?, \w+, methods=\["(\w+)"\]', routes)
    assert len(found) == routes.count("add_api_route")
    for path, method in found:
        assert f"## {method} {path.replace('{PREFIX}', 'PREFIX').replace('PREFIX', '/mixed_precision')}\n" in described
    metrics = set(re.findall(r'"(sglang_mixed_\w+)"', (ENGINE / "serving" / "metrics.py").read_text()))
    assert len(metrics) > 5
    assert all(f"`{name}`" in described or f"`{name}_total`" in described for name in metrics)


def test_the_public_names_are_in_the_api_page() -> None:
    text = page("python-api.md")
    assert [name for name in sglang_mixed.__all__ if not re.search(rf"[.`]{name}\b", text)] == []


@pytest.mark.parametrize("name", [*PAGES, "README.zh-CN.md"])
def test_every_relative_link_exists(name: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if "://" in link:
            continue
        target = (ROOT / name).parent / link if link else ROOT / name
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                anchor
            )


def test_every_page_is_in_the_navigation_and_the_site_is_built(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == set(re.findall(r"[\w-]+\.md", str(config["nav"])))
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "open_checkpoint" in (tmp_path / "python-api" / "index.html").read_text()


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"])
def test_every_make_word_is_a_target(name: str) -> None:
    text = (ROOT / name).read_text()
    words = {word for line in re.findall(r"(?:^|`)make ((?:[a-z]+ ?)+)", text, re.MULTILINE) for word in line.split()}
    assert words and words <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
