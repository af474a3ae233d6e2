"""Every kernel: memory is the file byte for byte and as large as promised, and products are right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_mixed.errors import FormatError, InconsistentFormatError, UnsupportedError
from sglang_mixed.formats import ModuleFormat, detect, get_format
from sglang_mixed.kernels import KERNELS, chunked, compiled, cpu_kernel, get_kernel, int4, nibbles, pack, resident_bytes
from sglang_mixed.kernels.base import layout_bytes
from sglang_mixed.kernels.compressed import CompressedWeight, NamedPart

sys.path.append(str(Path(__file__).parents[1] / "formats"))
import packers
from cases import BLOCK, CASES, built


@pytest.fixture(autouse=True)
def no_weight_is_small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The fast kernels are tested on shapes that would otherwise count as small."""
    monkeypatch.setattr(chunked, "SMALL_VALUES", 0)
    cpu_kernel.cache_clear()
    yield
    cpu_kernel.cache_clear()


@pytest.fixture(autouse=True, params=["native", "torch"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here runs with the compiled products and without."""
    monkeypatch.setenv("SGLANG_MIXED_NATIVE", "01"[request.param == "native"])
    if request.param == "native" and not compiled.available():
        pytest.skip("no C compiler")


def octets(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_memory(module: packers.Packed, format: ModuleFormat) -> tuple:
    before = {name: octets(tensor) for name, tensor in module.tensors.items()}
    kernel, resident = pack(module.tensors, format)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in resident.items()} == kernel.layout(format)
    assert sum(tensor.untyped_storage().nbytes() for tensor in resident.values()) == layout_bytes(kernel.layout(format))
    check_unpacks(module, kernel.unpack(resident, format))
    assert before == {name: octets(tensor) for name, tensor in module.tensors.items()}
    return kernel, resident


def check_unpacks(module: packers.Packed, back: dict[str, torch.Tensor]) -> None:
    assert back.keys() == module.tensors.keys()
    for name, tensor in back.items():
        original = module.tensors[name]
        assert (tensor.dtype, tensor.shape) == (original.dtype, original.shape)
        assert octets(tensor) == octets(original), name


def check_product(y: torch.Tensor, x: torch.Tensor, reference: np.ndarray) -> None:
    assert y.dtype == x.dtype
    expected = x.double() @ torch.from_numpy(reference).double().t()
    assert y.shape == expected.shape
    error, energy = (y.double() - expected).square(), expected.square()
    # A few outputs may all be rounded the far way.
    assert error.mean() <= (1e-5 if len(x) >= 64 else 4e-5) * energy.mean()
    if len(x) >= 64:
        assert (error.mean(0) <= 1e-4 * energy.mean(0)).all()


@pytest.mark.parametrize("name", CASES)
def test_memory_is_the_file_and_products_are_right(name: str) -> None:
    module, format, generator = built(name)
    assert cpu_kernel(format).name == CASES[name][0]
    kernel, resident = check_memory(module, format)
    assert layout_bytes(kernel.layout(format)) == resident_bytes(format)
    held = {one: octets(tensor) for one, tensor in resident.items()}
    for rows in (1, 3, 64, 200, 260):
        x = torch.randn(rows, format.shape[1], generator=generator) + 0.5
        check_product(kernel.linear(x.bfloat16(), resident, format), x.bfloat16(), module.reference)
    x /= (x.double() @ torch.from_numpy(module.reference).t()).abs().max() / 1000  # float16 ends at 65504
    for dtype in (torch.float16, torch.float32):
        check_product(kernel.linear(x.to(dtype), resident, format), x.to(dtype), module.reference)
    assert held == {one: octets(tensor) for one, tensor in resident.items()}


@pytest.mark.parametrize("name", CASES)
def test_rows_may_be_none_or_not_contiguous(name: str) -> None:
    module, format, generator = built(name)
    kernel, resident = pack(module.tensors, format)
    for dtype in (torch.bfloat16, torch.float32):
        empty = kernel.linear(torch.empty(0, format.shape[1], dtype=dtype), resident, format)
        assert empty.shape == (0, format.shape[0])
        assert empty.dtype == dtype
    wide = torch.randn(40, 2 * format.shape[1] + 1, generator=generator).bfloat16()
    for x in (wide[:1, 1::2], wide[:2, 1 : format.shape[1] + 1], wide[:, 1::2], wide[:5, : format.shape[1]]):
        check_product(kernel.linear(x, resident, format), x, module.reference)


@pytest.mark.parametrize("name", CASES)
def test_the_fallback_runs_all(name: str) -> None:
    module, format, generator = built(name)
    kernel = get_kernel("chunked")
    resident = kernel.pack(module.tensors, format)
    check_unpacks(module, kernel.unpack(resident, format))
    x = torch.randn(3, format.shape[1], generator=generator).bfloat16()
    check_product(kernel.linear(x, resident, format), x, module.reference)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] == "int4"])
def test_int4_without_knowing_torchs_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (int4, nibbles):
        monkeypatch.setattr(room, "layout_is_known", lambda: False)
    module, format, generator = built(name)
    kernel, resident = check_memory(module, format)
    x = torch.randn(40, format.shape[1], generator=generator).bfloat16()
    check_product(kernel.linear(x, resident, format), x, module.reference)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] == "int4"])
def test_compiled_packing_is_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, format, _ = built(name)
    kernel, resident = pack(module.tensors, format)
    monkeypatch.setenv("SGLANG_MIXED_NATIVE", "0")
    plain = kernel.pack(module.tensors, format)
    assert plain.keys() == resident.keys()
    assert all(torch.equal(plain[one], resident[one]) for one in plain)
    check_unpacks(module, kernel.unpack(resident, format))


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("name", ["float channel 128x256", "fp8 128x128 128x256"])
def test_fp8_is_exact_down_to_the_smallest_codes(name: str, rows: int) -> None:
    module, format, generator = built(name)
    weight = module.tensors["weight"].view(torch.uint8)
    weight.copy_(torch.randint(0, 256, weight.shape, generator=generator) & 0x87)
    scale = module.tensors[format.parameters.scale_name].fill_(0.5)
    module.reference[:] = packers.e4m3(weight.numpy()) * float(scale.flatten()[0])
    kernel, resident = pack(module.tensors, format)
    x = torch.randn(rows, format.shape[1], generator=generator).bfloat16() * 1e3
    check_product(kernel.linear(x, resident, format), x, module.reference)


def test_pack_frees_the_files_buffer() -> None:
    module, format, _ = built("int channel 128x256")
    buffer = torch.empty(module.tensors["weight"].nbytes + 100, dtype=torch.int8)
    view = buffer[3 : 3 + module.tensors["weight"].nbytes].view(128, 256)
    view.copy_(module.tensors["weight"])
    _, resident = pack({**module.tensors, "weight": view}, format)
    assert resident["weight"].untyped_storage().nbytes() == view.nbytes
    assert resident["weight"].data_ptr() % 64 == 0
    assert torch.equal(resident["weight"], view)


def test_nan_weights_are_refused() -> None:
    module, format, _ = built("float channel 128x256")
    module.tensors["weight"].view(torch.uint8)[7, 9] = 0xFF
    with pytest.raises(FormatError, match="in row 7 is NaN"):
        pack(module.tensors, format)


def test_asymmetric_zeros_under_a_symmetric_config_are_refused() -> None:
    module, format, _ = built("gptq4 64x128 g32 True v1 g_idx")
    module.tensors["qzeros"][0, 0] += 1
    with pytest.raises(InconsistentFormatError, match="sym denies what qzeros says"):
        pack(module.tensors, format)


def test_a_shuffled_g_idx_without_act_order_is_refused() -> None:
    module, format, _ = built("gptq4 64x128 g32 True v1 g_idx")
    module.tensors["g_idx"] = module.tensors["g_idx"].flip(0)
    with pytest.raises(InconsistentFormatError, match="desc_act denies what g_idx says"):
        pack(module.tensors, format)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("plain")])
def test_small_weights_compute_bit_for_bit_what_the_dequantized_model_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, format, generator = built(name)
    fast_bytes = resident_bytes(format)
    monkeypatch.setattr(chunked, "SMALL_VALUES", 1 << 20)
    cpu_kernel.cache_clear()
    kernel, resident = check_memory(module, format)
    assert kernel.name == "small"
    assert layout_bytes(kernel.layout(format)) == fast_bytes  # parts of any size may be fused: no kernel may differ
    weight = get_format(format.name).dequantize(module.tensors, format.parameters, torch.float32).bfloat16()
    x = torch.randn(5, format.shape[1], generator=generator).bfloat16()
    assert torch.equal(kernel.linear(x, resident, format), torch.nn.functional.linear(x, weight))


STACKED: dict[str, Callable[[np.random.Generator, int], packers.Packed]] = {
    "gptq4": lambda rng, out: packers.gptq(rng, out, 256, group=128, sym=False),
    "awq": lambda rng, out: packers.awq(rng, out, 256, group=128),
    "packed4": lambda rng, out: packers.packed(rng, out, 256, group=128, sym=False),
    "packed8": lambda rng, out: packers.packed(rng, out, 256, bits=8, group=128),
    "fp8": lambda rng, out: packers.eight_bit(rng, (out, 256), (128, 128), (out // 128, 2), BLOCK),
}


@pytest.mark.parametrize("kind", STACKED)
def test_a_stacked_weight_is_one_product_and_restores_every_part(kind: str) -> None:
    rng = np.random.default_rng(0)
    modules = [STACKED[kind](rng, out) for out in (256, 128, 128)]
    parts = [NamedPart(f"m{index}", detect("m", one.infos, one.config)) for index, one in enumerate(modules)]
    stacked = CompressedWeight(parts)
    every = [(index, local, tensor) for index, one in enumerate(modules) for local, tensor in one.tensors.items()]
    for index, local, _ in every:
        stacked.expect(index, local)
    for index, local, tensor in every:
        stacked.receive(index, local, tensor)
    restored = stacked.restore()
    for index, local, tensor in every:
        assert octets(restored[f"m{index}.{local}"]) == octets(tensor), local
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    check_product(stacked.linear(x), x, np.concatenate([one.reference for one in modules]))


def test_uneven_act_order_groups_go_to_the_fallback() -> None:
    module, format, generator = built("gptq4 64x128 g32 True v1 act")
    g_idx = module.tensors["g_idx"]
    old = g_idx[0].item()
    g_idx[0] = (old + 1) % 4
    scales = module.tensors["scales"].double().numpy()
    module.reference[:, 0] *= scales[(old + 1) % 4] / scales[old]
    kernel, resident = check_memory(module, format)
    assert kernel.name == "chunked"
    x = torch.randn(3, 128, generator=generator).bfloat16()
    check_product(kernel.linear(x, resident, format), x, module.reference)


def test_a_part_of_act_orders_columns_goes_to_the_fallback() -> None:
    module, format, generator = built("gptq4 64x128 g32 True v1 act")
    module.tensors["qweight"], module.tensors["g_idx"] = module.tensors["qweight"][:8], module.tensors["g_idx"][:64]
    module.reference = module.reference[:, :64]
    part = replace(format, parameters=replace(format.parameters, num_groups=4), shape=(64, 64))
    assert cpu_kernel(part).name == "chunked"
    kernel, resident = check_memory(module, part)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    check_product(kernel.linear(x, resident, part), x, module.reference)


def test_the_registry_says_what_exists() -> None:
    assert [get_kernel(name).name for name in KERNELS] == list(KERNELS)
    with pytest.raises(UnsupportedError, match="no kernel 'int5'"):
        get_kernel("int5")
