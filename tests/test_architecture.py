"""The rooms and their arrows: imports run downward only, and each engine or file format is known in one room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sglang_mixed"
#: Rooms from the bottom up; a room imports itself and what stands below it.
LEVELS = [
    {"errors"},
    {"patterns", "yaml_lines", "client", "pages", "progress", "digests"},
    {"formats"},
    {"config", "checkpoint", "kernels"},
    {"stream", "plan"},
    {"file_hashes", "memory", "experts", "export", "preflight", "comparison"},
    {"sensitivity"},
    {"search"},
    {"engine", "torch", "cli"},
    {"compatibility"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem != "__init__")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Absolute dotted names of everything the file imports."""
    package = ["sglang_mixed", *path.relative_to(SOURCE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parent, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_arrows_run_downward_only(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "sglang_mixed" or len(parts) < 2 or parts[1] == room or parts[1] not in LEVEL:
            continue
        assert LEVEL[parts[1]] < LEVEL[room], f"{room} imports {name}"


@pytest.mark.parametrize("path", sorted((SOURCE / "engine").rglob("*.py")), ids=lambda path: path.name)
def test_within_the_engine_layers_know_loading_and_neither_knows_who_asks(path: Path) -> None:
    order = ["loading", "layers", "serving"]
    room = path.relative_to(SOURCE / "engine").parts[0]
    if room in order:
        above = tuple(f"sglang_mixed.engine.{one}." for one in order[order.index(room) + 1 :])
        assert [name for name in imports(path) if name.startswith(above)] == []


@pytest.mark.parametrize(("library", "room"), [("sglang", "engine"), ("yaml", "yaml_lines"), ("typer", "cli")])
def test_a_library_is_known_in_one_room(library: str, room: str) -> None:
    users = {room_of(path) for path in FILES for name in imports(path) if name.split(".")[0] == library}
    assert users == {room}


def test_files_and_functions_stay_small() -> None:
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 300, f"{path.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"  # type: ignore[operator]
