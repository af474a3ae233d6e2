"""The compiled products: nothing outside a matrix is touched, plain C does what the vector instructions do."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_mixed.kernels import native

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(params=["this CPU", "plain C"])
def library(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    monkeypatch.delenv("SGLANG_MIXED_NATIVE", raising=False)
    if request.param == "plain C":
        monkeypatch.setattr(native, "FLAGS", tuple(flag for flag in native.FLAGS if not flag.startswith("-march")))
        monkeypatch.setattr(native, "X86_FLAGS", ("-Wno-psabi",))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
        native._library.cache_clear()
    if not native.available():
        pytest.skip("no C compiler")
    yield
    if request.param == "plain C":
        native._library.cache_clear()


def before_a_wall(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, its last byte the last one before a page that must not be touched."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    flat = torch.frombuffer(room, dtype=torch.uint8, count=tensor.nbytes, offset=size - tensor.nbytes)
    return flat.copy_(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def close(y: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert y.shape == expected.shape
    assert (y.double() - expected).square().mean() <= bound * expected.square().mean()


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (5, 17), (66, 257), (130, 300), (64, 512)])
def test_octets_end_where_they_end(library: None, out: int, columns: int, rows: int) -> None:
    x = torch.randn(rows, columns, generator=GENERATOR)
    for kind, dtype, unit in ((native.INT8, torch.int8, 1), (native.FP8, torch.float8_e4m3fn, 256)):
        octets = torch.randint(-127, 127, (out, columns), dtype=torch.int8, generator=GENERATOR)
        octets[octets == -1] = 0  # FP8's NaN
        weight, reference = before_a_wall(octets), octets.view(dtype).double() / unit
        spread = before_a_wall(torch.rand(-(-out // 3), columns, generator=GENERATOR))
        scaled = reference * spread.double().repeat_interleave(3, 0)[:out]
        for one, expected in (
            (native.Octets(kind, weight), reference),
            (native.Octets(kind, weight, spread, 3), scaled),
        ):
            close(one.linear(before_a_wall(x)), x.double() @ expected.t(), 1e-12)
            panel = before_a_wall(torch.empty(-(-out // 2), columns, dtype=torch.bfloat16))
            one.decode(panel, out // 2)
            assert torch.equal(panel, expected[out // 2 :].float().bfloat16())


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
@pytest.mark.parametrize(("out", "group"), [(16, 32), (64, 64), (112, 32), (192, 128)])
def test_nibbles_end_where_they_end(library: None, out: int, group: int, rows: int) -> None:
    groups = 3
    codes = torch.randint(0, 16, (out, groups * group), generator=GENERATOR)
    zeros = torch.randint(0, 16, (groups, out), generator=GENERATOR)
    packed = []
    for low in range(0, out, 64):
        tile = codes[low : low + 64].t()
        first, second = (tile[:, :32], tile[:, 32:]) if tile.shape[1] == 64 else (tile[:, ::2], tile[:, 1::2])
        packed.append((first | second << 4).reshape(-1))
    nibbles = before_a_wall(torch.cat(packed).to(torch.uint8).view(out, -1))
    qzeros = before_a_wall((zeros[:, ::2] | zeros[:, 1::2] << 4).to(torch.uint8))
    x = torch.randn(rows, groups * group, generator=GENERATOR) + 0.5
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scales = before_a_wall((torch.rand(groups, out, generator=GENERATOR) * 1e-3).to(dtype))
        for stored, zero in ((None, torch.full_like(zeros, 8)), (qzeros, zeros + 1)):
            weight = (codes - zero.t().repeat_interleave(group, 1)) * scales.double().t().repeat_interleave(group, 1)
            one = native.Nibbles(nibbles, scales, stored, 1)
            close(one.linear(before_a_wall(x)), x.double() @ weight.t(), 1e-10)
            panel = before_a_wall(torch.empty(groups * group, out, dtype=torch.bfloat16))
            one.decode(panel, 0)
            assert torch.equal(panel, weight.t().float().bfloat16())


def test_threads_share_a_product(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VALUES_PER_THREAD", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight = torch.randint(-127, 127, (131, 70), dtype=torch.int8, generator=GENERATOR)
    x = torch.randn(5, 70, generator=GENERATOR)
    close(native.Octets(native.INT8, weight).linear(x), x.double() @ weight.double().t(), 1e-12)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_there_is_one_warning(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SGLANG_MIXED_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    if compiler != "false":
        monkeypatch.setenv("PATH", "")
    native._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not native.available()
        assert not native.available()
    native._library.cache_clear()
    assert len(caplog.records) == 1
    assert not list(tmp_path.rglob("*.so"))
