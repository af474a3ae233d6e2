"""What a planned mix gains: KL divergence to BF16 on held-out text, against hand rules and layer mixes of equal bytes.

The tiny model runs in transformers in float32, so that nothing but the weights is rounded. Errors are measured on
other text of the standard library. Each is done twice: with every matrix chosen by itself, as a CPU runs it, and with
whole experts and fused matrices, as a GPU does. The last part plans for one kind of text, the documentation in prose,
with and without what the experts do on it. `--table` prints the tables of docs/loop.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from measure import report
from transformers import AutoTokenizer

from sglang_mixed.config import MixedPrecisionMap
from sglang_mixed.experts import ExpertCounts, ExpertExport
from sglang_mixed.plan.candidates import Candidates, find_candidates
from sglang_mixed.plan.families import layer_of
from sglang_mixed.search import Budget, Search, weighted_errors
from sglang_mixed.sensitivity import Sensitivity, read_sensitivity, write_sensitivity
from sglang_mixed.sensitivity.divergence import measure_divergence
from sglang_mixed.sensitivity.model import ReferenceModel

TINY = Path(__file__).parents[1] / "examples" / "tiny"
SOURCES = {"bf16": "bf16", "fp8": "fp8-block", "fp8_channel": "fp8-channel", "int8": "int8", "gptq_int4": "gptq-int4"}
WINDOW, CALIBRATION_WINDOWS, TEST_WINDOWS, PROSE_WINDOWS = 256, 32, 48, 32
#: Shares of the way from all-Int4 to all-INT8, in bytes.
BUDGETS = (0.3, 0.45, 0.6, 0.75)
#: Of a plan that chooses every matrix by itself, and of one that chooses whole experts.
RULE_BARS = {True: 0.75, False: 1.0}
UNITS = {True: "every matrix by itself", False: "whole experts"}
LAYER_BAR, TRAFFIC_BAR = 1.0, 1.0

Choice = dict[str, str]


class Tried(NamedTuple):
    """A mix and what it gives on held-out text, in nats a token."""

    name: str
    rank_bytes: int
    divergence: float


def library_text(skip: str) -> str:
    """Standard library sources that the model was trained on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py")))
    return "".join(text for text in texts if 5_000 < len(text) < 40_000 and text[:2000] not in skip)


def prose() -> str:
    """Python's documentation, in English; the model was not trained on it."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def windows(text: str, count: int, skip: int = 0) -> torch.Tensor:
    """Token ids [count, WINDOW], the first `skip` windows left out."""
    ids = AutoTokenizer.from_pretrained(str(TINY / "bf16"))(text, verbose=False)["input_ids"]
    begin = skip * WINDOW
    return torch.tensor(ids[begin : begin + count * WINDOW]).view(count, WINDOW)


def hand_rules(candidates: Candidates) -> Iterable[tuple[str, Choice]]:
    """Attention high, experts low: one source for attention and one for the experts, every pair."""
    for attention, experts in itertools.product(SOURCES, repeat=2):
        yield f"attention {attention}, experts {experts}", by_layer(candidates, (attention,) * 2, (experts,) * 2)


def layer_mixes(candidates: Candidates) -> Iterable[tuple[str, Choice]]:
    """A source for each layer's attention and one for its experts; uniform where all are the same."""
    for mix in itertools.product(SOURCES, repeat=4):
        name = "layer 0: attention {}, experts {}; layer 1: attention {}, experts {}".format(*mix)
        yield name, by_layer(candidates, mix[::2], mix[1::2])


def by_layer(candidates: Candidates, attention: tuple[str, ...], experts: tuple[str, ...]) -> Choice:
    """A source for each layer's attention, and one for its experts."""
    return {name: (experts if ".experts." in name else attention)[layer_of(name)] for name in candidates.units}


class Trial:
    """Measures mixes on one text; each is measured once."""

    def __init__(self, candidates: Candidates, text: torch.Tensor) -> None:
        self.candidates, self.model = candidates, ReferenceModel(candidates, text)
        self._known: dict[tuple[str, ...], float] = {}

    def __call__(self, name: str, choice: Mapping[str, str]) -> Tried:
        plan = self.candidates.with_choice(choice)
        key = tuple(choice.values())
        if key not in self._known:
            changed = [one for one in plan.modules.values() if one.source != plan.base]
            weights = {one.name: self.candidates.dequantize(one.source, one.name) for one in changed}
            with self.model.replaced(weights):
                self._known[key] = float(self.model.divergence().double().mean())
        return Tried(name, plan.weight_bytes(), self._known[key])


def best(trial: Trial, mixes: Iterable[tuple[str, Choice]], limit: int, predicted: Callable[[Choice], float]) -> Tried:
    """The best of the eight that promise most within the limit."""
    fitting = [(name, choice) for name, choice in mixes if trial.candidates.with_choice(choice).weight_bytes() <= limit]
    promising = sorted(fitting, key=lambda mix: predicted(mix[1]))[:8]
    return min((trial(*mix) for mix in promising), key=lambda tried: tried.divergence)


def against_rules(candidates: Candidates, sensitivity: Sensitivity, split: bool, table: bool) -> bool:
    errors = weighted_errors(candidates, sensitivity)
    trial = Trial(candidates, windows((TINY / "heldout.txt").read_text(), TEST_WINDOWS))
    least, most = (candidates.with_choice(candidates.uniform(one)).weight_bytes() for one in ("gptq_int4", "int8"))
    verdicts = []
    for share in BUDGETS:
        limit = int(least + share * (most - least))
        planned = trial("planned", Search(candidates, errors, Budget(limit)).best().choice)

        def predicted(choice: Choice) -> float:
            return sum(errors[pair] for pair in choice.items())

        by_rule = best(trial, hand_rules(candidates), limit, predicted)
        by_layer = best(trial, layer_mixes(candidates), limit, predicted)
        if table:
            for tried in (planned, by_rule, by_layer):
                print(f"| {limit:,} | {tried.name} | {tried.rank_bytes:,} | {tried.divergence:.5f} |")
        ratio, layer_ratio = (planned.divergence / other.divergence for other in (by_rule, by_layer))
        within = f"within {limit:,} bytes, {UNITS[split]}"
        verdicts += [
            report("plan_kl_by_hand_rule", ratio, "x", f"{by_rule.name}, {within}", RULE_BARS[split]),
            report("plan_kl_by_layer_mix", layer_ratio, "x", f"{by_layer.name}, {within}", LAYER_BAR),
        ]
    return all(verdicts)


def with_traffic(candidates: Candidates, sensitivity: Sensitivity, split: bool, table: bool) -> bool:
    """Plan for prose: what the experts did on other prose, against not knowing it."""
    text = prose()
    uses = ReferenceModel(candidates, windows(text, PROSE_WINDOWS)).expert_uses()
    traffic = counted(uses, PROSE_WINDOWS * WINDOW)
    trial = Trial(candidates, windows(text, PROSE_WINDOWS, skip=PROSE_WINDOWS))
    least, most = (candidates.with_choice(candidates.uniform(one)).weight_bytes() for one in ("gptq_int4", "int8"))
    verdicts = []
    for share in BUDGETS:
        limit = int(least + share * (most - least))
        found = {
            name: trial(
                name, Search(candidates, weighted_errors(candidates, sensitivity, known), Budget(limit)).best().choice
            )
            for name, known in (("experts-aware", traffic), ("experts-blind", None))
        }
        if table:
            for tried in found.values():
                print(f"| {limit:,} | {tried.name} | {tried.rank_bytes:,} | {tried.divergence:.5f} |")
        ratio = found["experts-aware"].divergence / found["experts-blind"].divergence
        baseline = f"the plan that knows nothing of the experts' use, on prose within {limit:,} bytes, {UNITS[split]}"
        verdicts.append(report("plan_kl_by_blind_plan", ratio, "x", baseline, TRAFFIC_BAR))
    return all(verdicts)


def counted(uses: Mapping[str, tuple[float, ...]], tokens: int) -> ExpertExport:
    """Shares of tokens as a server would have counted them."""
    layers = tuple(layer_of(owner) for owner in uses)
    counts = ExpertCounts.zeros(layers, len(next(iter(uses.values()))), 2, 0.0)
    for row, shares in enumerate(uses.values()):
        counts.prefill[row] = [round(share * tokens) for share in shares]
    return ExpertExport.of_counts(counts)


def measured(candidates: Candidates, file: Path | None) -> Sensitivity:
    """On text of the library; kept in the file, if there is one."""
    if file and file.exists():
        return read_sensitivity(file)
    text = library_text(skip=(TINY / "heldout.txt").read_text())
    found = measure_divergence(candidates, windows(text, CALIBRATION_WINDOWS))
    if file:
        write_sensitivity(file, found)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder of the measured errors: measured if they are not there")
    arguments = parser.parse_args()
    described = MixedPrecisionMap(TINY / "search", {name: TINY / folder for name, folder in SOURCES.items()})
    verdicts = []
    for split in (True, False):
        candidates = find_candidates(described, split=split)
        file = arguments.keep / f"{UNITS[split].replace(' ', '-')}.json" if arguments.keep else None
        sensitivity = measured(candidates, file)
        for part in (against_rules, with_traffic):
            verdicts.append(part(candidates, sensitivity, split, arguments.table))
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
