"""The wheel: all of the package is in it, and it works beside the SGLang that is there, which it does not ask for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .blocks import ROOT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
USED = """
import sglang_mixed
from importlib.util import find_spec
from importlib.metadata import distribution, entry_points
print(sglang_mixed.__file__, sglang_mixed.__version__)
for group in ("sglang.srt.plugins", "sglang.srt.platforms", "console_scripts"):
    (point,) = (one for one in entry_points(group=group) if one.value.startswith("sglang_mixed"))
    # The platform is SGLang's to import, which takes it seconds.
    assert find_spec(point.module) if group == "sglang.srt.platforms" else point.load()
unconditional = [name for name in distribution("sglang-mixed").requires if "extra" not in name]
assert not any(name.startswith("sglang") for name in unconditional)
from sglang_mixed.experts.page import page_html
assert "<html" in page_html()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-c", BUILD, out], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def test_every_file_of_the_package_is_in_it(wheel: Path) -> None:
    package = ROOT / "src"
    files = {
        path for path in (package / "sglang_mixed").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("sglang_mixed/")}
    assert held == {str(path.relative_to(package)) for path in files}


def test_it_works_from_a_folder_of_its_own(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", USED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
