"""Wrong weights are noticed: by the comparison that test_support.py rests on, and by the proof.

Every fault is one that a loader could make, put into a copy of the checkpoint that is served.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_mixed.engine.loading import proof as proof_module
from sglang_mixed.engine.loading.intake import Intake
from sglang_mixed.engine.loading.ledger import Ledger
from sglang_mixed.engine.loading.proof import Proof
from sglang_mixed.engine.loading.stock import StockParameters
from sglang_mixed.engine.loading.transfer import Transfer
from sglang_mixed.errors import ProofError
from sglang_mixed.plan import Plan, Rank, RankPlan, make_plan
from sglang_mixed.stream import ReadLog

from ..models import write_map
from .comparison import BOUND, REQUEST, differing_tokens, largest_difference
from .family_models import write_family
from .launch import Engine
from .layers import fill
from .mixes import SOURCES
from .reference import References, prompts_for

Tensors = dict[str, torch.Tensor]
ATTENTION, EXPERTS = "model.layers.1.self_attn", "model.layers.1.mlp.experts"
#: Even experts and q are asymmetric GPTQ with act-order, all other matrices FP8 in blocks of 64 x 32.
MAPPING = {
    "model.layers.*.self_attn.*_proj": "fp8_block",
    "model.layers.*.self_attn.q_proj": "act_order",
    "model.layers.*.mlp.experts.**": "fp8_block",
    "model.layers.*.mlp.experts.{0,2,4,6}.**": "act_order",
}


def exchange(tensors: Tensors, one: str, other: str) -> None:
    """All tensors below one name trade places with those below the other."""
    for name in [name for name in tensors if name.startswith(f"{one}.")]:
        twin = other + name.removeprefix(one)
        tensors[name], tensors[twin] = tensors[twin], tensors[name]


def exchange_experts(tensors: Tensors) -> None:
    exchange(tensors, f"{EXPERTS}.1", f"{EXPERTS}.3")


def exchange_key_and_value(tensors: Tensors) -> None:
    exchange(tensors, f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj")


def double_scale(tensors: Tensors) -> None:
    tensors[f"{ATTENTION}.o_proj.weight_scale_inv"][0, 0] *= 2


def lower_zero_points(tensors: Tensors) -> None:
    """Each 4-bit field of the words less one, where it is not zero already."""
    words = tensors[f"{EXPERTS}.0.down_proj.qzeros"]
    fields = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    words -= ((fields > 0).long() << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def shuffle_groups(tensors: Tensors) -> None:
    g_idx = tensors[f"{EXPERTS}.0.down_proj.g_idx"]
    g_idx.copy_(g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(0))])


def exchange_slices(tensors: Tensors) -> None:
    """The halves of o_proj's columns, of which two ranks have one each."""
    for local in ("weight", "weight_scale_inv"):
        tensor = tensors[f"{ATTENTION}.o_proj.{local}"]
        left, right = tensor.view(torch.uint8).chunk(2, 1)
        tensors[f"{ATTENTION}.o_proj.{local}"] = torch.cat([right, left], 1).view(tensor.dtype)


class Fault(NamedTuple):
    """The source whose tensors it alters."""

    source: str
    alter: Callable[[Tensors], None]


FAULTS = {
    "two experts swapped": Fault("fp8_block", exchange_experts),
    "one scale doubled": Fault("fp8_block", double_scale),
    "GPTQ zero point off by one": Fault("act_order", lower_zero_points),
    "g_idx shuffled": Fault("act_order", shuffle_groups),
    "wrong rank's slice": Fault("fp8_block", exchange_slices),
    "k and v swapped": Fault("fp8_block", exchange_key_and_value),
}
NAMES = ["nothing", *FAULTS]


class Models:
    """The mix as it should be, named "nothing", and with each of the faults."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, Path] = {}
        true = folder / "nothing"
        for source in ("bf16", "act_order", "fp8_block"):
            write_family(true / source, "qwen3_moe", *SOURCES[source])
        self._maps["nothing"] = write_map(
            true, MAPPING, default="bf16", bf16="bf16", act_order="act_order", fp8_block="fp8_block"
        )

    def described(self, name: str) -> Path:
        """The map."""
        if name not in self._maps:
            fault, copy = FAULTS[name], self._folder / str(len(self._maps))
            shutil.copytree(self._folder / "nothing", copy)
            file = copy / fault.source / "model.safetensors"
            tensors = load_file(file)
            fault.alter(tensors)
            save_file(tensors, file)
            self._maps[name] = copy / "map.yaml"
        return self._maps[name]

    def altered(self, name: str) -> set[str]:
        """The tensors that the fault has altered."""
        file = Path(FAULTS[name].source) / "model.safetensors"
        true, found = (load_file(self.described(one).parent / file) for one in ("nothing", name))
        return {key for key in true if not torch.equal(true[key].view(torch.uint8), found[key].view(torch.uint8))}


class Answers:
    """What the reference and the mixes answer; the next mix starts while one is waited for."""

    def __init__(self, folder: Path, models: Models, references: References) -> None:
        self._folder, self._models, self._references = folder, models, references
        self._true = make_plan(models.described("nothing"))
        self._prompts = prompts_for(self._true.sources["bf16"])
        self._engines: dict[str, Engine] = {}

    def compare(self, name: str) -> tuple[float, list[tuple[int, int]]]:
        """Largest difference from the true weights' log-probabilities, and the greedy tokens that differ."""
        self._start(name)
        reference = self._references.answers(self._true, self._prompts)
        for following in NAMES[NAMES.index(name) + 1 :][:1]:
            self._start(following)
        ours: list[dict[str, Any]] = self._engines[name].result()["answers"][0]
        return largest_difference(ours, reference), differing_tokens(ours, reference)

    def _start(self, name: str) -> None:
        if name not in self._engines:
            described, log = self._models.described(name), self._folder / f"{len(self._engines)}.log"
            arguments = {"enable_mixed_precision": True, "mixed_precision_config": str(described)}
            asked = {"input_ids": self._prompts, **REQUEST}
            self._engines[name] = Engine(log, described.parent / "bf16", asked, skip_tokenizer_init=True, **arguments)


@pytest.fixture(scope="module")
def faulty_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, faulty_models: Models, references: References) -> Answers:
    return Answers(tmp_path_factory.mktemp("answers"), faulty_models, references)


def test_the_comparison_finds_no_fault_in_the_true_weights(answers: Answers) -> None:
    difference, tokens = answers.compare("nothing")
    assert difference <= BOUND
    assert tokens == []


@pytest.mark.parametrize("name", FAULTS)
def test_the_comparison_notices(name: str, answers: Answers) -> None:
    difference, tokens = answers.compare(name)
    assert difference > BOUND
    assert tokens != []


def matrices(plan: Plan) -> RankPlan:
    """The whole plan as a rank that holds only what is quantized."""
    rank = plan.rank(Rank())
    rank.parts = {name: part for name, part in rank.parts.items() if plan.modules[name].format.name != "plain"}
    return rank


def load(rank: RankPlan) -> torch.nn.Module:
    """A model that holds these modules, q, k and v together."""
    intake = Intake()

    def build() -> None:
        modules = rank.plan.modules
        for name in rank.parts:
            if name.endswith(".q_proj"):
                intake.open([modules[name.replace(".q_proj", f".{one}_proj")] for one in "qkv"])
            elif not name.endswith((".k_proj", ".v_proj")):
                intake.open([modules[name]])

    fill(rank, build)
    model = torch.nn.Module()
    model.quant_method = SimpleNamespace(intake=intake)
    return model


def prove(held: RankPlan, planned: RankPlan, ended: threading.Event, monkeypatch: pytest.MonkeyPatch) -> Proof:
    """What one plan's files gave to memory against the files of another; `ended` is set where the server would end."""
    # A proof that fails ends its parent, which here is what runs the tests.
    signals = SimpleNamespace(kill=lambda *_: ended.set(), getppid=lambda: 0)
    monkeypatch.setattr(proof_module, "os", signals)
    monkeypatch.setattr(proof_module, "multiprocessing", SimpleNamespace(parent_process=lambda: signals))
    proof = Proof(planned, StockParameters(planned, Ledger(), Transfer()), ReadLog())
    proof.complete(load(held), 0.0)
    for thread in threading.enumerate():
        if thread.name == "weight-proof":
            thread.join()
    return proof


def test_the_proof_finds_no_fault_in_the_true_weights(faulty_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    true, ended = matrices(make_plan(faulty_models.described("nothing"))), threading.Event()
    found = prove(true, true, ended, monkeypatch).report()["verification"]
    assert (found["state"], found["verified"]) == ("verified", len(true.parts))
    assert not ended.is_set()


@pytest.mark.parametrize("name", FAULTS)
def test_the_proof_names_the_tensor_and_ends_the_server(
    name: str, faulty_models: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held, true = (matrices(make_plan(faulty_models.described(one))) for one in (name, "nothing"))
    ended = threading.Event()
    with caplog.at_level(logging.CRITICAL):
        found = prove(held, true, ended, monkeypatch).report()["verification"]
    assert found["state"] == "failed"
    assert ended.is_set()
    (error,) = caplog.records[-1].args  # type: ignore[misc]
    assert isinstance(error, ProofError)
    assert error.tensor in faulty_models.altered(name)
