"""Embeddings and heads are read to where SGLang's loader copies them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_mixed.checkpoint import Entry, Read
from sglang_mixed.engine.loading.ledger import Ledger
from sglang_mixed.engine.state import Loading

NAME = "model.embed_tokens.weight"
#: SGLang fills a vocabulary up to 64 rows.
PARAMETER = torch.zeros(64, 16, dtype=torch.bfloat16)


def destination(dtype: str = "BF16", name: str = NAME, shape: tuple[int, ...] = (50, 16), **place: Any) -> Any:
    nothing: Any = None
    loading = Loading(nothing, Ledger(), nothing, vocabularies={NAME: PARAMETER})
    return loading.destination(Read(name, Entry(0, dtype, shape, 0, 2 * shape[0] * shape[1]), **place))


def test_a_vocabulary_is_read_to_the_first_rows_of_its_parameter() -> None:
    found = destination()
    assert found.data_ptr() == PARAMETER.data_ptr() and found.shape == (50, 16)


@pytest.mark.parametrize(
    "other",
    [{"dtype": "F16"}, {"name": "lm_head.weight"}, {"shape": (65, 16)}, {"shape": (50, 8)}],
    ids=["another dtype", "another tensor", "more rows", "other columns"],
)
def test_what_is_not_what_the_parameter_holds_is_read_to_memory_of_its_own(other: dict[str, Any]) -> None:
    assert destination(**other) is None


def test_a_part_is_read_into_the_whole_tensor_that_the_loader_cuts() -> None:
    found = destination(ranges=((0, 25), (0, 16)))
    assert found.shape == (25, 16) and found.untyped_storage().data_ptr() != PARAMETER.untyped_storage().data_ptr()
