from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sglang_mixed.plan import Plan, make_plan

from ..models import write, write_map

Mapped = Callable[..., Plan]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """One model in four forms."""
    return {kind: write(tmp_path / kind, kind) for kind in ("bf16", "fp8", "gptq", "gptq64")}


@pytest.fixture
def mapped(tmp_path: Path, sources: dict[str, Path]) -> Mapped:
    """Plan a mapping over `sources`, some of which may be replaced (or left out with None)."""

    def plan(
        mapping: Mapping[str, str], default: str | None = None, options: Any = None, **changed: Path | None
    ) -> Plan:
        chosen = {name: path for name, path in {**sources, **changed}.items() if path}
        return make_plan(write_map(tmp_path, dict(mapping), default=default, **chosen), **(options or {}))

    return plan
