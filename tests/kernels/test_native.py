"""The compiled products: nothing outside a matrix is touched, plain C does what the vector instructions do."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sglang_mixed.kernels import compiled, native

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(params=["this CPU", "plain C"])
def library(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    monkeypatch.delenv("SGLANG_MIXED_NATIVE", raising=False)
    if request.param == "plain C":
        monkeypatch.setattr(compiled, "FLAGS", tuple(flag for flag in compiled.FLAGS if not flag.startswith("-march")))
        monkeypatch.setattr(compiled, "X86_FLAGS", ("-Wno-psabi",))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
        compiled._library.cache_clear()
    if not compiled.available():
        pytest.skip("no C compiler")
    yield
    if request.param == "plain C":
        compiled._library.cache_clear()


def before_a_wall(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, its last byte the last one before a page that must not be touched."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    flat = torch.frombuffer(room, dtype=torch.uint8, count=tensor.nbytes, offset=size - tensor.nbytes)
    return flat.copy_(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


#: What rounding a result to x's dtype may cost.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def right(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Off by its rounding, and little of the largest result."""
    assert y.shape == expected.shape
    slack = (1e-5 if y.dtype == torch.float32 else 1e-4) * expected.abs().max()
    assert ((y.double() - expected).abs() <= ROUNDING[y.dtype] * expected.abs() + slack).all()


def blocks(scales: torch.Tensor, height: int, width: int, shape: tuple[int, int]) -> torch.Tensor:
    """Block scales as a matrix of the weight's shape, in float64."""
    return scales.double().repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def octet_weight(kind: int, out: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes that end before a wall, and what they are."""
    codes = torch.randint(-128, 128, (out, columns), dtype=torch.int8, generator=GENERATOR)
    if kind == native.FP8:
        codes[(codes & 127) == 127] = 0  # NaN
    return before_a_wall(codes), codes.view((torch.float8_e4m3fn, torch.int8)[kind]).double()


@pytest.mark.parametrize("kind", [native.FP8, native.INT8])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 32])
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (5, 17), (66, 257), (130, 300), (64, 512)])
def test_octets_end_where_they_end(library: None, out: int, columns: int, rows: int, kind: int) -> None:
    weight, reference = octet_weight(kind, out, columns)
    x = torch.randn(rows, columns, generator=GENERATOR) + 0.5
    for dtype, height, width, inverse in (
        (torch.float32, 1, columns, False),
        (torch.bfloat16, out, columns, True),
        (torch.float16, 3, 64, False),
        (torch.float32, 128, 13, True),
    ):
        grid = -(-out // height), -(-columns // width)
        scales = before_a_wall((torch.rand(grid, generator=GENERATOR) + 0.1).to(dtype))
        scale = blocks(scales, height, width, (out, columns))
        expected = reference / scale if inverse else reference * scale
        one = native.Octets(kind, weight, scales, height, width, inverse)
        for given in ROUNDING:
            x_given = before_a_wall(x.to(given) / 8)
            right(one.linear(x_given), x_given.double() @ expected.t())
        panel = before_a_wall(torch.empty(-(-out // 2), columns, dtype=torch.bfloat16))
        one.decode(panel, out // 2, scaled=False)
        assert torch.equal(panel, reference[out // 2 :].bfloat16())
        one.decode(panel, out // 2)
        right(panel, expected[out // 2 :])


def tiled(codes: torch.Tensor) -> torch.Tensor:
    """Codes [out, in] in torch's layout."""
    octets = []
    for tile in codes.split(64):
        first, second = (tile[:32], tile[32:]) if len(tile) == 64 else (tile[::2], tile[1::2])
        octets.append((first | second << 4).t().reshape(-1))
    return torch.cat(octets).to(torch.uint8).view(len(codes), -1)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 32])
@pytest.mark.parametrize(("out", "group"), [(16, 32), (64, 64), (112, 32), (192, 128), (80, 1056)])
def test_nibbles_end_where_they_end(library: None, out: int, group: int, rows: int) -> None:
    groups = 3
    codes = torch.randint(0, 16, (out, groups * group), generator=GENERATOR)
    zeros = torch.randint(0, 16, (groups, out), generator=GENERATOR)
    nibbles = before_a_wall(tiled(codes))
    qzeros = before_a_wall((zeros[:, ::2] | zeros[:, 1::2] << 4).to(torch.uint8))
    x = torch.randn(rows, groups * group, generator=GENERATOR) + 0.5
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scales = before_a_wall((torch.rand(groups, out, generator=GENERATOR) * 1e-3).to(dtype))
        for stored, zero in ((None, torch.full_like(zeros, 8)), (qzeros, zeros + 1)):
            weight = (codes - zero.t().repeat_interleave(group, 1)) * scales.double().t().repeat_interleave(group, 1)
            one = native.Nibbles(nibbles, scales, stored, 1)
            for given in ROUNDING:
                x_given = before_a_wall(x.to(given))
                right(one.linear(x_given), x_given.double() @ weight.t())
            panel = before_a_wall(torch.empty(groups * group, out, dtype=torch.bfloat16))
            one.decode(panel, 0)
            assert torch.equal(panel, weight.t().float().bfloat16())


@pytest.mark.parametrize("kind", [native.FP8, native.INT8])
def test_a_large_value_that_no_weight_meets_leaves_the_others_their_bits(library: None, kind: int) -> None:
    # Many outputs, and always the same: what two bytes hold here comes to 0.9e-5, and of few outputs to twice as much.
    GENERATOR.manual_seed(0)
    weight, reference = octet_weight(kind, 2048, 4096)
    weight[:, 7], reference[:, 7] = 0, 0
    one = native.Octets(kind, weight, torch.ones(2048), 1, 4096)
    x = torch.randn(2, 4096, generator=GENERATOR) / 8
    x[0, 7] = 1e2
    for given in ROUNDING:
        y, expected = one.linear(x.to(given)).double(), x.to(given).double() @ reference.t()
        assert (y - expected).square().mean() <= 1e-5 * expected.square().mean()


def test_rows_that_are_no_numbers_stay_none(library: None) -> None:
    x = torch.randn(3, 256, generator=GENERATOR).bfloat16()
    x[1, 5], x[2, 9] = float("nan"), float("inf")
    for kind in (native.FP8, native.INT8):
        y = native.Octets(kind, octet_weight(kind, 64, 256)[0], torch.ones(64), 1, 256).linear(x)
        assert y[0].isfinite().all()
        assert not y[1:].isfinite().any(1).all()
    codes = torch.full((64, 128), 0x53, dtype=torch.uint8)
    y = native.Nibbles(codes, torch.ones(2, 64), None, 0).linear(x)
    assert y[0].isfinite().all()
    assert not y[1:].isfinite().any()


def test_zeros_of_x_give_zeros(library: None) -> None:
    x = torch.zeros(2, 256).bfloat16()
    for kind in (native.FP8, native.INT8):
        y = native.Octets(kind, octet_weight(kind, 64, 256)[0], torch.ones(64), 1, 256).linear(x)
        assert torch.equal(y, torch.zeros(2, 64).bfloat16())


@pytest.mark.parametrize("with_place", [False, True])
@pytest.mark.parametrize("order", native.WORD_ORDERS)
@pytest.mark.parametrize(("out", "columns"), [(16, 32), (64, 96), (112, 160), (192, 256)])
def test_words_end_where_they_end(library: None, out: int, columns: int, order: str, with_place: bool) -> None:
    codes = torch.randint(0, 16, (out, columns), generator=GENERATOR)
    groups_of_eight = {
        "gptq": codes.t().view(columns // 8, 8, out).transpose(1, 2),
        "awq": codes.t().view(columns, out // 8, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]],
        "packed": codes.view(out, columns // 8, 8),
    }[order]
    words = before_a_wall((groups_of_eight << 4 * torch.arange(8)).sum(-1).to(torch.int32))
    place = before_a_wall(torch.randperm(columns, generator=GENERATOR).to(torch.int32)) if with_place else None
    nibbles = torch.empty(out, columns // 2, dtype=torch.uint8)
    native.pack_nibbles(words, order, nibbles, place)
    assert torch.equal(nibbles, tiled(codes if place is None else codes[:, place.argsort()]))
    back = before_a_wall(torch.zeros_like(words))
    native.unpack_nibbles(before_a_wall(nibbles), order, back, place)
    assert torch.equal(back, words)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 48), (17, 33), (40, 16)])
def test_words_turn_to_their_last_one(library: None, rows: int, columns: int) -> None:
    words = torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int32, generator=GENERATOR)
    turned = torch.empty(words.shape[::-1], dtype=torch.int32)
    native.turn_words(before_a_wall(words), 0x80808080, turned)
    assert torch.equal(turned, words.t() ^ (0x80808080 - 2**32))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [(0, 0), (40, 299), (129, 298), (129, 299)])
def test_a_nan_is_found(library: None, place: tuple[int, int], code: int) -> None:
    codes = torch.full((130, 300), 0x7E, dtype=torch.uint8)
    assert not native.has_nan(before_a_wall(codes))
    codes[place] = code
    assert native.has_nan(before_a_wall(codes))


@pytest.mark.parametrize("has_openmp", [True, False])
def test_threads_share_a_job(library: None, has_openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "VALUES_PER_THREAD", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if has_openmp:
        assert compiled._openmp() is not None
    else:
        monkeypatch.setattr(compiled, "_openmp", lambda: None)
    weight = torch.randint(-127, 127, (131, 70), dtype=torch.int8, generator=GENERATOR)
    x = torch.randn(5, 70, generator=GENERATOR)
    one = native.Octets(native.INT8, weight, torch.ones(131), 1, 70)
    for given in ROUNDING:
        right(one.linear(x.to(given)), x.to(given).double() @ weight.double().t())
    codes = torch.zeros(131, 70, dtype=torch.uint8)
    assert not native.has_nan(codes)
    for row in (0, 65, 130):
        codes.zero_()[row, 69] = 0x7F
        assert native.has_nan(codes)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_there_is_one_warning(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SGLANG_MIXED_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    if compiler != "false":
        monkeypatch.setenv("PATH", "")
    compiled._library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not compiled.available()
        assert not compiled.available()
    compiled._library.cache_clear()
    assert len(caplog.records) == 1
    assert not list(tmp_path.rglob("*.so"))
