"""What engine tests share: a zygote that is ready when they begin, prompts, and references that are asked once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .comparison import held_out_prompts
from .gpu_model import replace_device
from .launch import FLAGS, SMALL, TINY, Engine, Server, free_port, http, stop_all, zygote
from .reference import Comparison, References

__all__ = ["FLAGS", "SMALL", "TINY", "Engine", "Server", "free_port", "held_out_prompts", "http", "zygote"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """The zygote imports while the tests before its first job run."""
    wanted = any(item.path.parent == Path(__file__).parent for item in session.items)
    if wanted and not session.config.option.collectonly and not torch.accelerator.is_available():
        zygote()


def pytest_sessionfinish() -> None:
    stop_all()


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors arrive as they do on a GPU."""
    replace_device(monkeypatch.setattr)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return held_out_prompts()


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


@pytest.fixture(scope="session")
def stock_answers(references: References) -> Callable[..., list[dict[str, Any]]]:
    """(plan, prompts) -> what stock SGLang answers with the plan's weights, dequantized to BF16."""
    return references.answers


@pytest.fixture(scope="session")
def compare_with_reference(references: References) -> Callable[..., Comparison]:
    """(map, arguments of the mixed engine only: tp_size=2, ...) -> how far it is from its reference on one rank."""
    return references.compare
