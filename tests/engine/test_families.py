"""Stock SGLang on the CPU platform against Hugging Face transformers, both in float32: a wrong operation shows.

Mixes are compared with stock SGLang on the same platform; what that platform computes wrongly would be wrong in both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .comparison import REQUEST, random_prompts
from .conftest import Engine
from .families import FAMILIES, VOCABULARY
from .family_models import write_family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpu_platform_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    model = write_family(tmp_path / family, family)
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "torch_dtype": "float32"}))
    prompts = random_prompts(VOCABULARY)[:6]
    # The second time, most of the prompt is in the cache.
    asked = [{"input_ids": prompts, **REQUEST}, {"input_ids": prompts[:1], **REQUEST, "logprob_start_len": -1}]
    engine = Engine(tmp_path / "log", model, *asked, dtype="float32", skip_tokenizer_init=True)
    expected = transformers_model(model)
    first, again = engine.result()["answers"]
    assert again[0]["meta_info"]["cached_tokens"] >= len(prompts[0]) - 1
    for prompt, answer in zip([*prompts, prompts[0]], [*first, *again], strict=True):
        found = answer["meta_info"]
        scored = [*found["input_token_logprobs"], *found["output_token_logprobs"]]
        ours = torch.tensor([value for value, *_ in scored if value is not None])
        tokens = torch.tensor([*prompt, *(token for _, token, _ in found["output_token_logprobs"])])
        with torch.no_grad():
            scores = expected(tokens.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
        theirs = scores.gather(1, tokens[1:].unsqueeze(1)).squeeze(1)
        assert len(ours) >= REQUEST["sampling_params"]["max_new_tokens"]
        torch.testing.assert_close(ours, theirs[-len(ours) :], atol=1e-4, rtol=0)


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
