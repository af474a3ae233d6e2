"""The model in float32, in plain transformers, with weights that are replaced and put back one part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import SensitivityError, UnsupportedError
from ..plan.candidates import Candidates
from ..plan.families import EXPERTS, LANGUAGE_MODEL, expert_of

_LAYERS = ".layers."
#: Rows of tokens that run together.
BATCH_TOKENS = 2048
#: The base's log-probabilities stay in memory up to this size.
KEPT_BYTES = 1 << 30


class ReferenceModel:
    """The base as transformers runs it, in float32 so that nothing is rounded but the weights.

    Needs memory for all weights in float32, on the GPU where there is one. Raises UnsupportedError where transformers
    cannot load the model, or holds a weight in a way in which it is not found again.
    """

    def __init__(self, candidates: Candidates, windows: torch.Tensor) -> None:
        """`windows`: token ids [count, length] of the text."""
        self._candidates = candidates
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(candidates).to(self.device).eval()
        rows = max(1, BATCH_TOKENS // windows.shape[1])
        self._batches = list(torch.split(windows.to(self.device), rows))
        #: Layer -> what the layers before it gave, for each batch, with the base's weights.
        self._before: dict[int, list[Any]] = {}
        #: Batch -> the base's log-probabilities.
        self._kept: dict[int, torch.Tensor] = {}
        self._layers = self._decoder_layers()
        self._hidden_before(len(self._layers))

    @torch.no_grad()
    def divergence(self, layer: int = 0) -> torch.Tensor:
        """KL(base || now) in nats of every token's prediction, float32 [windows, length].

        `layer` is the first whose weights differ from the base's: those before it are not run again.
        """
        found = []
        for number, batch in enumerate(self._batches):
            base = self._of_base(number, batch)
            now = self._log_probabilities(number, batch, layer)
            found.append(torch.nn.functional.kl_div(now, base, reduction="none", log_target=True).sum(-1))
        return torch.cat(found).clamp_(min=0)

    @torch.no_grad()
    def expert_uses(self) -> dict[str, tuple[float, ...]]:
        """`...experts` -> for each expert the share of the text's tokens that are routed to it."""
        counts: dict[str, torch.Tensor] = {}
        hooks = []
        for name, module in self._model.named_modules():
            if name.endswith(".experts"):
                hooks.append(module.register_forward_pre_hook(_counter(counts, name), with_kwargs=True))
        for batch in self._batches:
            self._model(input_ids=batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        tokens = sum(batch.numel() for batch in self._batches)
        return {name: tuple((found / tokens).tolist()) for name, found in counts.items()}

    @contextmanager
    def replaced(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """With other weights in these modules, by checkpoint name, [out, in]; the base's afterwards."""
        slots = {name: self.slot(name) for name in weights}
        kept = {name: slot.clone() for name, slot in slots.items()}
        try:
            for name, weight in weights.items():
                slots[name].copy_(weight)
            yield
        finally:
            for name, weight in kept.items():
                slots[name].copy_(weight)

    def slot(self, name: str) -> torch.Tensor:
        """Where the model keeps a module's weight: a view [out, in], proven by the base's values that lie in it."""
        weight = self._candidates.dequantize(self._candidates.base, name).to(self.device)
        for view in self._views(name):
            if view.shape == weight.shape and view.equal(weight):
                return view
        raise UnsupportedError(
            "transformers keeps this weight where it is not found again",
            tensor=name,
            rule="each weight of the base is a parameter of the model, or a part of a layer's stacked experts",
            remedy="measure the weights alone: leave out --text",
        )

    def _views(self, name: str) -> Iterator[torch.Tensor]:
        parent, _, last = name.rpartition(".")
        expert = expert_of(parent)
        if expert is None:
            yield from (parameter.data for key, parameter in self._parameters(name) if key == "weight")
            return
        for names in EXPERTS:
            if last in names:
                yield from self._expert_views(expert, names.index(last))

    def _expert_views(self, expert: tuple[str, int], part: int) -> Iterator[torch.Tensor]:
        """Of each stacked parameter: the expert's matrix, or its upper or lower half or every second row of it."""
        owner, number = expert
        owner = owner.replace(".block_sparse_moe.", ".mlp.")
        for _, parameter in self._parameters(owner):
            if parameter.ndim == 3 and number < len(parameter):
                for matrix in (parameter.data[number], parameter.data[number].T):
                    half = len(matrix) // 2
                    yield matrix
                    if part < 2:
                        yield matrix[half:] if part else matrix[:half]
                        yield matrix[part::2]

    def _parameters(self, name: str) -> list[tuple[str, torch.nn.Parameter]]:
        module = self._submodule(name)
        return [] if module is None else list(module.named_parameters(recurse=False))

    def _submodule(self, name: str) -> torch.nn.Module | None:
        """By its checkpoint name, or by that within the language model, where transformers loads that alone."""
        for known in (name, name.removeprefix(LANGUAGE_MODEL)):
            try:
                return self._model.get_submodule(known)
            except AttributeError:
                continue
        return None

    def _decoder_layers(self) -> torch.nn.ModuleList:
        names = (module for unit in self._candidates.units.values() for module in unit.modules)
        layered = next((name for name in names if _LAYERS in name), None)
        if layered is None:
            raise SensitivityError("no source differs from the base in any layer", remedy="add a quantized source")
        layers = self._submodule(layered.partition(_LAYERS)[0] + ".layers")
        assert isinstance(layers, torch.nn.ModuleList)
        return layers

    def _of_base(self, number: int, batch: torch.Tensor) -> torch.Tensor:
        """What the base predicts: kept where that is little, else the head runs again on what the last layer gave."""
        if number in self._kept:
            return self._kept[number]
        found = self._log_probabilities(number, batch, len(self._layers))
        if found.nbytes * len(self._batches) <= KEPT_BYTES:
            self._kept[number] = found
        return found

    def _log_probabilities(self, number: int, batch: torch.Tensor, layer: int) -> torch.Tensor:
        with self._starting_at(layer, number):
            logits = self._model(input_ids=batch, use_cache=False).logits
        return torch.as_tensor(logits.float().log_softmax(-1))

    @contextmanager
    def _starting_at(self, layer: int, number: int) -> Iterator[None]:
        """Let the layers before this one give what they gave for this batch."""
        if layer == 0:
            yield
            return
        before = self._hidden_before(layer)[number]
        for skipped in self._layers[:layer]:
            skipped.forward = _giving(before)
        try:
            yield
        finally:
            for skipped in self._layers[:layer]:
                del skipped.forward

    @torch.no_grad()
    def _hidden_before(self, layer: int) -> list[Any]:
        """Kept for this layer and for the end only: a large model's would fill the memory.

        The end's are taken before any weight is replaced, a layer's while only later ones may be.
        """
        if layer not in self._before:
            found: list[Any] = []
            hook = self._layers[layer - 1].register_forward_hook(lambda module, given, output: found.append(output))
            for batch in self._batches:
                self._model(input_ids=batch, use_cache=False)
            hook.remove()
            self._before = {one: kept for one, kept in self._before.items() if one == len(self._layers)}
            self._before[layer] = found
        return self._before[layer]


def _load(candidates: Candidates) -> torch.nn.Module:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UnsupportedError(
            "transformers is not installed",
            rule="the output's divergence is measured by running the model in it",
            remedy="pip install 'sglang-mixed[plan]', or measure the weights alone: leave out --text",
        ) from error
    path = candidates.checkpoints[candidates.base].path
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise UnsupportedError(
            f"transformers cannot load the base: {error}",
            file=path,
            remedy="measure the weights alone: leave out --text",
        ) from error
    return model


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *arguments, **keywords: output


def _counter(counts: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    """Counts the ids of the chosen experts, the one integer tensor among what an experts' module is given."""

    def count(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = (*arguments, *keywords.values())
        ids = next((one for one in given if torch.is_tensor(one) and not one.is_floating_point()), None)
        if ids is not None:
            experts = next(one for one in module.parameters() if one.ndim == 3).shape[0]
            found = torch.bincount(ids.flatten(), minlength=experts).cpu()
            counts[name] = counts.get(name, torch.zeros_like(found)) + found

    return count
