"""The grouped Triton kernels against float64, interpreted: every format, mixes of all, shapes that fit no block."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import grouped_cases as cases
import pytest
import torch
from grouped_cases import FORMATS

from sglang_mixed.formats import detect
from sglang_mixed.formats.slicing import Region
from sglang_mixed.kernels.base import Tensors
from sglang_mixed.kernels.grouped import launch
from sglang_mixed.kernels.grouped.arrange import arrange
from sglang_mixed.kernels.grouped.codec import LARGEST_STEP
from sglang_mixed.kernels.implied import without_implied

Run = Callable[..., Any]
#: Of at least 64 rows. FP16's own rounding of an output is 4e-8.
WORST_COLUMN, WHOLE = 1e-4, 1e-5
#: Triton's interpreter cuts BF16 off instead of rounding it, which costs four times as much.
WHOLE_CUT_OFF = 5e-5


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Start a function of `grouped_checks`, by name, in one of two processes where Triton interprets."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    for future in [pool.submit(os.getpid), pool.submit(os.getpid)]:
        future.result()
    os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
    with pool:
        yield lambda name, *arguments, **named: pool.submit(call, name, arguments, named)


@pytest.fixture(scope="session")
def alone(run: Run) -> dict[str, dict[str, Future[tuple[float, float]]]]:
    """The errors of every format in linear layers: of many rows and few, of a rank's share, and of whole steps."""
    share = Region((8, 74), (24, 130))
    return {
        name: {
            "many": run("linear", name, odd_shape(name), 64),
            "few": run("linear", name, odd_shape(name), 3),
            "part": run("linear", name, (96, 160), 64, share),
            "whole steps": run("linear", name, (32, 256), 64),
            "part of whole steps": run("linear", name, (96, 256), 20, share),
            "few in whole steps": run("linear", name, (32, 256), 3),
            "few in parts": run("linear", name, odd_shape(name), 3, parts=3),
            "part in parts": run("linear", name, (96, 160), 16, share, parts=4),
            "whole steps in parts": run("linear", name, (32, 256), 5, parts=2),
        }
        for name in FORMATS
    }


def odd_shape(name: str) -> tuple[int, int]:
    """Neither a multiple of the kernels' blocks; of bytes also odd, which words and groups are not."""
    return (83, 145) if name.startswith(("plain", "fp8", "int8", "mxfp8")) else (32, 160)


def call(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    import grouped_checks

    return getattr(grouped_checks, name)(*arguments, **named)


def assert_close(worst: float, whole: float, bound: float = WHOLE) -> None:
    assert worst <= WORST_COLUMN and whole <= bound, f"normalized squared error {worst:.1e}, of the whole {whole:.1e}"


CASES = ["many", "few", "part", "whole steps", "part of whole steps", "few in whole steps"]


@pytest.mark.parametrize("case", [*CASES, "few in parts", "part in parts", "whole steps in parts"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_of_any_format_multiplies_as_its_reference(alone: Any, name: str, case: str) -> None:
    worst, whole = alone[name][case].result()
    assert_close(0 if case.startswith("few") or case.endswith("parts") else worst, whole)


@pytest.mark.parametrize("columns", [160, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_are_arranged_together_are_what_each_alone_is(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = [cases.of_one_size(FORMATS[name](cases.generator(name, seed), 32, columns)) for seed in range(3)]
    module_format = detect("weight", packed[0].infos, packed[0].config)
    assert module_format is not None

    def arranged() -> Tensors:
        stacked = {local: torch.stack([one.tensors[local] for one in packed]) for local in packed[0].tensors}
        return arrange(stacked, module_format).tensors

    together = arranged()
    monkeypatch.setattr("sglang_mixed.kernels.grouped.arrange.VALUES_AT_ONCE", 2 * 32 * columns)
    assert all(same_bytes(tensor, together[local]) for local, tensor in arranged().items())
    for number, one in enumerate(packed):
        alone = arrange({local: tensor[None] for local, tensor in one.tensors.items()}, module_format).tensors
        assert all(same_bytes(tensor, together[local][number : number + 1]) for local, tensor in alone.items())


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one[..., None].view(torch.uint8), other[..., None].view(torch.uint8)
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-10), (torch.bfloat16, WHOLE_CUT_OFF)])
def test_products_are_exact_in_other_dtypes_but_for_their_one_rounding(
    run: Run, dtype: torch.dtype, bound: float
) -> None:
    running = [run("linear", name, (96, 160), 64, None, dtype) for name in ("plain", "fp8 128x128", "awq", "gptq 2")]
    for one in running:
        assert_close(*one.result(), bound)


def test_experts_of_all_formats_in_one_layer_compute_what_they_must(run: Run) -> None:
    # In turns: gate, up and down of one expert differ from each other, and experts from their neighbours.
    names = [*FORMATS, *list(FORMATS)[: -len(FORMATS) % 3]]
    found = run("experts", names, 66, top_k=2, reorders=True).result()
    assert_close(found["worst"], found["whole"])
    assert found["guarded"] and found["skipped"] and found["reordered"] == 0


@pytest.fixture(scope="session")
def layers(run: Run) -> dict[str, Future[dict[str, Any]]]:
    mixed = ["gptq", "fp8 128x128", "awq", "int8 channel", "plain", "packed"]
    swiglu = {"activation": ("swiglu", 1.702, 7.0), "biased": True}
    return {
        "decode, one token": run("experts", mixed, 1, top_k=1),
        "decode": run("experts", mixed * 2, 12, top_k=2, reorders=True),
        "gate and up alike": run("experts", [name for name in mixed for _ in range(3)], 70, top_k=2, reorders=True),
        "prefill": run("experts", mixed, 90, top_k=1, reorders=True),
        "in turns": run("experts", mixed, 70, top_k=1, at_once=48),
        "gelu": run("experts", mixed, 70, top_k=1, activation=("gelu",)),
        "limited": run("experts", mixed, 70, top_k=1, activation=("limited_silu", 1.0, 0.5)),
        "limited after": run("experts", mixed, 70, top_k=1, activation=("silu_limited", 1.0, 0.5)),
        "gpt-oss": run("experts", ["mxfp4"] * 3 + mixed, 70, top_k=2, **swiglu),
        "bfloat16": run("experts", mixed, 70, top_k=1, dtype=torch.bfloat16),
        "float32": run("experts", mixed, 70, top_k=1, dtype=torch.float32),
        "no token": run("experts", mixed, 0, top_k=1),
    }


@pytest.fixture(scope="session")
def layers_in_parts(run: Run) -> dict[str, Future[dict[str, Any]]]:
    """Layers of few pairs, whose products are cut along their columns too."""
    mixed = ["gptq", "fp8 128x128", "awq", "int8 channel", "plain", "packed"]
    everything = [*FORMATS, *list(FORMATS)[: -len(FORMATS) % 3]]
    swiglu = {"activation": ("swiglu", 1.702, 7.0), "biased": True}
    return {
        "one pair": run("experts", mixed, 1, top_k=1, skips=False, parts=(3, 2)),
        "one token": run("experts", mixed * 5, 1, top_k=8, skips=False, parts=(5, 3), dtype=torch.float32),
        "most pairs": run("experts", mixed * 5, 4, top_k=8, parts=(4, 3), reorders=True),
        "all formats": run("experts", everything, 16, top_k=2, parts=(3, 2), reorders=True),
        "gate and up whole": run("experts", mixed, 8, top_k=1, parts=(1, 3)),
        "down whole": run("experts", mixed, 8, top_k=1, parts=(2, 1)),
        "gelu": run("experts", mixed, 8, top_k=1, activation=("gelu",), biased=True, parts=(2, 2)),
        "limited": run("experts", mixed, 8, top_k=1, activation=("limited_silu", 1.0, 0.5), parts=(2, 2)),
        "limited after": run("experts", mixed, 8, top_k=1, activation=("silu_limited", 1.0, 0.5), parts=(2, 2)),
        "gpt-oss": run("experts", ["mxfp4"] * 3 + mixed, 8, top_k=2, parts=(2, 3), **swiglu),
        "bfloat16": run("experts", mixed, 8, top_k=1, biased=True, dtype=torch.bfloat16, parts=(2, 2)),
        "float32": run("experts", mixed, 8, top_k=1, dtype=torch.float32, parts=(2, 3)),
    }


@pytest.mark.parametrize(
    "name",
    ["decode", "gate and up alike", "prefill", "in turns", "gelu", "limited", "limited after", "gpt-oss", "float32"],
)
def test_a_layer_of_experts_computes_what_it_must(layers: Any, name: str) -> None:
    found = layers[name].result()
    assert_close(found["worst"] if name != "decode" else 0, found["whole"], 1e-10 if name == "float32" else WHOLE)


def test_a_layer_in_bf16_is_as_exact_as_the_interpreter_rounds(layers: Any) -> None:
    assert_close(layers["bfloat16"].result()["worst"], layers["bfloat16"].result()["whole"], 2 * WHOLE_CUT_OFF)


@pytest.mark.parametrize("columns", [64, 768, 2048, 2880, 14336])
def test_few_products_are_cut_into_parts_of_steps_and_many_are_not(columns: int) -> None:
    steps = -(-columns // LARGEST_STEP)
    for pairs in (8, 32):
        for own in launch.cut_experts(columns, columns, pairs, takes_registers=False):
            assert 1 <= own.parts <= min(steps, launch.MOST_PARTS)
    sizes = (16, launch.FEW_OUTPUTS + 1, 1 << 16)
    fewest, few, many = (launch.cut_linear(1, columns, outputs, takes_registers=False).parts for outputs in sizes)
    assert fewest == -(-steps // launch.LINEAR_OF_FEW_OUTPUTS[8].steps)
    assert few == -(-steps // launch.LINEAR[8].steps) and many == 1
    assert launch.cut_linear(1 << 16, columns, 64, takes_registers=False).parts == 1


def test_sums_in_parts_are_never_more_than_there_are_counts_for() -> None:
    most = 0
    for rows, columns, outputs in itertools.product(
        (1, 9, 20, 50, 100, 200, 999), (512, 4096, 1 << 15), range(64, 60000, 640)
    ):
        own = launch.cut_linear(rows, columns, outputs, takes_registers=False)
        tiles, blocks, parts = own.grid(outputs, rows)
        most = max(most, tiles * blocks * (parts > 1))
    assert launch.MOST_SUMS // 2 < most <= launch.MOST_SUMS


IN_PARTS = ["one pair", "one token", "most pairs", "all formats", "gate and up whole", "down whole", "gelu", "limited"]
BOUNDS = {"one token": 1e-10, "float32": 1e-10, "bfloat16": 2 * WHOLE_CUT_OFF}


@pytest.mark.parametrize("name", [*IN_PARTS, "limited after", "gpt-oss", "bfloat16", "float32"])
def test_a_layer_in_parts_computes_what_it_must(layers_in_parts: Any, name: str) -> None:
    found = layers_in_parts[name].result()
    assert_close(0, found["whole"], BOUNDS.get(name, WHOLE))


def test_kernels_write_their_tensors_and_nothing_else(layers: Any, layers_in_parts: Any) -> None:
    # What they write to began as NaN: a part of it that is left out would come out.
    assert all(one.result()["guarded"] for one in [*layers.values(), *layers_in_parts.values()])


def test_a_token_whose_experts_are_all_elsewhere_comes_out_as_zeros(layers: Any, layers_in_parts: Any) -> None:
    assert all(one.result()["skipped"] for one in [*layers.values(), *layers_in_parts.values()])


def test_the_order_of_tokens_does_not_matter(layers: Any, layers_in_parts: Any) -> None:
    assert all(one.result()["reordered"] == 0 for one in [*layers.values(), *layers_in_parts.values()])


def test_one_doubled_scale_of_an_expert_is_noticed(run: Run) -> None:
    assert run("doubled_scale").result() > WORST_COLUMN


#: Zero points of 3 bits lie in 4, those of 6 in 8; columns of act-order have the group of each step beside them.
WIDER = ("gptq 3 asymmetric", "packed 6 asymmetric", "act-order")


@pytest.mark.parametrize("name", FORMATS)
def test_memory_holds_the_bytes_that_are_planned(name: str) -> None:
    packed = FORMATS[name](cases.generator(name), 512, 512)
    module_format = detect("weight", packed.infos, packed.config)
    assert module_format is not None
    # What formats imply is not planned.
    planned = sum(one.nbytes for one in kept(packed.tensors, module_format).values())
    files: Tensors = {local: one[None] for local, one in packed.tensors.items()}
    held = sum(one.nbytes for one in cases.arrange(files, module_format).tensors.values())
    assert planned == held if not name.endswith(WIDER) else planned < held <= 1.1 * planned


def kept(tensors: Tensors, module_format: Any) -> Tensors:
    statics = ("input_scale", "input_global_scale")
    return {name: one for name, one in without_implied(tensors, module_format).items() if name not in statics}
