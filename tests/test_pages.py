"""Asking for pages: what a tensor holds stays, and what cannot be asked for is no error."""

from __future__ import annotations

import pytest
import torch

from sglang_mixed.pages import LEAST, populate


@pytest.mark.parametrize("first", [0, 1, 4095, 4096])
def test_values_around_and_inside_the_pages_stay(first: int) -> None:
    whole = torch.arange(4 * LEAST).to(torch.uint8)
    expected = whole.clone()
    part = whole[first : first + 2 * LEAST]
    assert populate(part) is part
    assert torch.equal(whole, expected)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.zeros(1024, 1024)[:, :512],
        torch.zeros(1024, 1024).t(),
        torch.empty(1024, 1024, device="meta"),
    ],
    ids=["empty", "columns", "transposed", "no memory"],
)
def test_memory_that_is_no_run_of_pages_is_left_alone(tensor: torch.Tensor) -> None:
    assert populate(tensor) is tensor


def test_a_system_that_refuses_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_mixed.pages.MADV_POPULATE_WRITE", -1)
    assert populate(torch.zeros(LEAST)).sum() == 0
