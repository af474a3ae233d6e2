"""Dependencies of the package: named, at versions that are asked for, of free licences, and what is known against them.

    python scripts/audit.py

Looks at what pyproject.toml names and at all that this brings with it, as installed. Advisories are asked of
https://api.osv.dev and listed; they fail nothing, since a new one is no fault of the commit that it meets. Where that
cannot be reached it says so.
"""

from __future__ import annotations

import ast
import json
import sys
import tomllib
import urllib.request
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
#: Words of which a licence must have one.
FREE = ("mit", "bsd", "apache", "psf", "python software", "isc", "mpl", "zlib", "unlicense")
CUDA = ("nvidia-", "cuda-")
OSV = "https://api.osv.dev/v1/querybatch"


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [Requirement(text) for text in project["dependencies"]]
    optional = [Requirement(text) for group in project["optional-dependencies"].values() for text in group]
    installed = closure(direct)
    brought = {canonicalize_name(one.name) for one in closure([*direct, *optional])}
    problems = [*undeclared(brought), *unfit(direct)]
    problems += [f"{one.name}: licence {licence(one)!r}" for one in installed if not is_free(one)]
    answer, found = advisories(installed)
    for problem in [*problems, *found]:
        print(f"audit: {problem}", file=sys.stderr)
    print(f"audit: {len(installed)} packages, {len(problems)} problems; advisories: {answer}")
    return 1 if problems else 0


def closure(requirements: list[Requirement]) -> list[Distribution]:
    """All that is installed for them."""
    found: dict[str, Distribution] = {}
    waiting = [one for one in requirements if one.marker is None or one.marker.evaluate()]
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        wanted = [Requirement(text) for text in found[name].requires or ()]
        waiting += [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return list(found.values())


def undeclared(declared: set[str]) -> list[str]:
    """Libraries that the package imports and that nothing in pyproject.toml brings."""
    homes, problems = packages_distributions(), []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in {one.partition(".")[0] for one in names} - set(sys.stdlib_module_names) - {"sglang_mixed"}:
                owners = {canonicalize_name(one) for one in homes.get(name, [])}
                # What only the engine imports comes with SGLang, and Triton with torch.
                known = owners & declared or "engine" in file.parts or name == "triton"
                if owners and not known:
                    problems.append(f"{file.relative_to(ROOT)} imports {name}, which nothing in pyproject.toml brings")
    return problems


def unfit(requirements: list[Requirement]) -> list[str]:
    """Requirements that what is installed does not meet."""
    problems = []
    for one in requirements:
        try:
            version = distribution(one.name).version
        except PackageNotFoundError:
            problems.append(f"{one.name} is not installed")
            continue
        if not one.specifier.contains(version, prereleases=True):
            problems.append(f"{one.name} {version} is installed, {one.specifier} is asked for")
    return problems


def licence(package: Distribution) -> str:
    """What its metadata says, wherever that stands."""
    classifiers = [text for text in package.metadata.get_all("Classifier") or () if text.startswith("License ::")]
    said = package.metadata.get("License-Expression") or " ".join(classifiers) or package.metadata.get("License") or ""
    return said.splitlines()[0][:120] if said else ""


def is_free(package: Distribution) -> bool:
    """Whether its licence is one of FREE, or it is one of the libraries that torch is linked against."""
    return package.name.startswith(CUDA) or any(word in licence(package).lower() for word in FREE)


def advisories(packages: list[Distribution]) -> tuple[str, list[str]]:
    """What the database says, or why it was not asked; and one line an advisory."""
    queries = [{"package": {"name": one.name, "ecosystem": "PyPI"}, "version": one.version} for one in packages]
    request = urllib.request.Request(OSV, json.dumps({"queries": queries}).encode())
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            results = json.load(response)["results"]
    except (OSError, ValueError) as error:
        return f"not asked ({error})", []
    found = [
        f"{package.name} {package.version}: {vulnerability['id']}"
        for package, result in zip(packages, results, strict=True)
        for vulnerability in result.get("vulns", [])
    ]
    return f"{len(found)} known", found


if __name__ == "__main__":
    sys.exit(main())
