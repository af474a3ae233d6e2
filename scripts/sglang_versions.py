"""Run the engine's tests on other releases of SGLang, each in an environment of its own, and note what came of it.

    python scripts/sglang_versions.py 0.5.15.post1 0.5.23
    python scripts/sglang_versions.py 0.5.23 --tests tests/engine tests/guides

One line a release goes to docs/versions.jsonl, in place of an older one; `tests/engine/support.py` makes a table of
them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from packaging.version import Version

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "versions.jsonl"
#: Models, layouts and formats against stock SGLang, the server and what it reports, counts and refuses.
TESTS = tuple(f"tests/engine/test_{name}.py" for name in ("support", "serving", "tracking", "refusals"))
#: It is what is noted here that this one compares.
LEFT_OUT = "tests/engine/test_support.py::test_the_document_lists_these_rows"
PACKAGES = ("sglang", "torch", "transformers")
VERSIONS = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH")
    parser.add_argument("--environments", type=Path, help="a folder that keeps the environments (some GB each)")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.environments or Path(temporary)
        for version in options.versions:
            outcome = run(install(version, folder / version), options.tests, Path(temporary) / "junit.xml")
            print(json.dumps(outcome), flush=True)
            failed += outcome["failed"]
            note(outcome)
    return 1 if failed else 0


def install(version: str, folder: Path) -> Path:
    """The Python of an environment with that SGLang and this checkout."""
    python = folder / "bin" / "python"
    if not python.exists():
        uv = shutil.which("uv") or ROOT / ".venv-uv" / "bin" / "uv"
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=True)
        excludes = ROOT / "requirements" / "excludes.txt"
        command = [uv, "pip", "install", "--quiet", "--python", python, "--excludes", excludes, f"sglang=={version}"]
        subprocess.run([*command, "--group", "dev", "--editable", "."], check=True, cwd=ROOT)
    return python


def run(python: Path, tests: list[str], report: Path) -> dict[str, Any]:
    """What the tests say there. Warnings of other releases are not errors."""
    told = subprocess.run([python, "-c", VERSIONS], check=True, stdout=subprocess.PIPE, text=True).stdout
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["-W", "default", "-p", "no:cacheprovider", "--tb=short", "--deselect", LEFT_OUT, f"--junit-xml={report}"]
    subprocess.run([python, "-m", "pytest", *options, *tests], check=False, cwd=ROOT, env=environment)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, skipped, failures, errors = (int(suite.get(key, 0)) for key in ("tests", "skipped", "failures", "errors"))
    return {
        **json.loads(told),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "tests": list(tests),
        "passed": total - skipped - failures - errors,
        "failed": failures + errors,
        "skipped": skipped,
    }


def note(outcome: dict[str, Any]) -> None:
    """Keep it, one line a release, oldest first."""
    lines = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
    kept = [line for line in lines if line["sglang"] != outcome["sglang"]]
    ordered = sorted([*kept, outcome], key=lambda line: Version(line["sglang"]))
    RECORD.write_text("".join(json.dumps(line) + "\n" for line in ordered))


if __name__ == "__main__":
    sys.exit(main())
