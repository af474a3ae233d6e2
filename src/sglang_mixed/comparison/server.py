"""A running SGLang server, asked over HTTP for its own log-probabilities, speed and memory."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
from numpy.typing import NDArray

from ..client import authorization, every_rank
from ..errors import EngineError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
_TIMEOUT = 600


@dataclass(frozen=True, slots=True)
class Predictions:
    """Of every token but each window's first: [windows, length - 1], natural logarithms.

    `logprobs`: of the text's own token. `top_ids`, `top_logprobs` [..., k]: the likeliest, the likeliest first.
    """

    logprobs: Floats
    top_ids: Integers
    top_logprobs: Floats


class Server:
    """`url` as in http://127.0.0.1:30000. Raises EngineError where the server does not answer as SGLang does."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url, self._api_key = url.rstrip("/"), api_key

    def is_ready(self) -> bool:
        """Whether it answers."""
        try:
            self._ask("/model_info")
        except EngineError:
            return False
        return True

    def tokenizer_path(self) -> str:
        """Where its tokenizer is."""
        about = self._ask("/model_info")
        return str(about.get("tokenizer_path") or about["model_path"])

    def predict(
        self, windows: Sequence[Sequence[int]], top: int, advance: Callable[[int], object] = lambda windows: None
    ) -> Predictions:
        """What the server predicts along each window of token ids, all of one length; `advance` is told of each."""
        answers = []
        for window in windows:
            answers.append(self._generate(window, top))
            advance(1)
        chosen = [[float(token[0]) for token in answer["input_token_logprobs"][1:]] for answer in answers]
        tops = [[best[:top] for best in answer["input_top_logprobs"][1:]] for answer in answers]
        ids = np.array([[[int(token[1]) for token in best] for best in answer] for answer in tops], np.int64)
        values = np.array([[[float(token[0]) for token in best] for best in answer] for answer in tops])
        return Predictions(np.array(chosen), ids, values)

    def tokens_per_second(self, windows: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Generated tokens a second, all windows at once; the prompts' time counts."""
        body = {
            "input_ids": [list(window) for window in windows],
            "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True},
        }
        self._ask("/flush_cache", {})
        start = time.perf_counter()
        self._ask("/generate", body)
        return len(windows) * new_tokens / (time.perf_counter() - start)

    def weight_bytes(self) -> int | None:
        """Bytes of weights of all ranks: of a mix as it measures itself, else None."""
        try:
            report = self._ask("/mixed_precision?modules=false")
        except EngineError:
            return None
        return sum(int(rank["weight_bytes"]) for rank in every_rank(report))

    def _generate(self, window: Sequence[int], top: int) -> dict[str, Any]:
        body = {
            "input_ids": list(window),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top,
        }
        answer: dict[str, Any] = self._ask("/generate", body)["meta_info"]
        return answer

    def _ask(self, route: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json", **authorization(self._api_key)}
        request = urllib.request.Request(self.url + route, None if body is None else json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                data = response.read()
                return json.loads(data) if data[:1] in (b"{", b"[") else data.decode()
        except HTTPError as error:
            raise EngineError(
                f"{route} is answered with {error.code}: {error.read(500).decode(errors='replace')}",
                file=self.url,
                rule="an SGLang server's routes",
                remedy="give the address of an SGLang server, and --api-key where it wants one",
            ) from error
        except (URLError, OSError, ValueError) as error:
            raise EngineError(
                f"no server answers: {error}", file=self.url, remedy="start it, or correct the address"
            ) from error
