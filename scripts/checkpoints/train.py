"""Trains the tiny Qwen3-MoE on the Python standard library and saves it in the hub's layout."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import BASE, LENGTH, TINY, corpus, per_expert, perplexity, write_json
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 1920,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.05,
    "output_router_logits": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BATCH = 8


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalized by Newton-Schulz; 3-D parameters are stacks of matrices."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buf = self.state[p].setdefault("buf", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buf, group["momentum"]))
                p.sub_(update, alpha=group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


def orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Pushes every singular value towards 1 with an odd quintic iteration."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """One token stream, the end-of-text token before each file."""
    return torch.tensor([i for e in tokenizer.encode_batch(texts) for i in (0, *e.ids)])


def expert_shares(logits: torch.Tensor) -> torch.Tensor:
    """How often each expert of one layer is chosen; the shares add up to the number of choices per token."""
    chosen = logits.topk(CONFIG["num_experts_per_tok"]).indices
    return torch.nn.functional.one_hot(chosen, logits.shape[-1]).float().mean(0).sum(0)


def imbalance(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The load-balancing loss layer by layer; over all layers at once they only balance each other out."""
    layers = [(expert_shares(logits) * logits.softmax(-1).mean(0)).sum() * logits.shape[-1] for logits in router_logits]
    return torch.stack(layers).mean()


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 20 steps, constant, then a linear fall over the last 40 percent."""
    return min((step + 1) / 20, 1.0, (steps - step) / (0.4 * steps))


def train(model: Qwen3MoeForCausalLM, stream: torch.Tensor, held: torch.Tensor, steps: int) -> None:
    matrices, rest = [], []
    for name, p in model.named_parameters():
        outside = name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight", "norm.weight"))
        (rest if outside else matrices).append(p)
    muon = Muon(matrices, lr=0.02)
    adamw = torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    groups = [(g, g["lr"]) for o in (muon, adamw) for g in o.param_groups]
    windows = (len(stream) - 1) // LENGTH
    order = torch.cat([torch.randperm(windows) for _ in range(steps * BATCH // windows + 1)])
    start = time.time()
    for step in range(steps):
        for group, lr in groups:
            group["lr"] = lr * schedule(step, steps)
        rows = order[step * BATCH : (step + 1) * BATCH]
        batch = torch.stack([stream[r * LENGTH : (r + 1) * LENGTH] for r in rows])
        result = model(input_ids=batch, labels=batch, output_router_logits=True)
        (result.loss + CONFIG["router_aux_loss_coef"] * imbalance(result.router_logits)).backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 99:
            share = min(expert_shares(logits).min().item() for logits in result.router_logits)
            print(f"step {step + 1}: loss {result.loss.item():.3f}, rarest expert {share:.3f}, ", end="")
            print(f"{time.time() - start:.0f} s", flush=True)
        if step % 500 == 499:
            print(f"  held-out perplexity {perplexity(model, held):.2f}", flush=True)


def save(model: Qwen3MoeForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: t.bfloat16() for n, t in per_expert(model.state_dict()).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0})
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[2],
            "pad_token": SPECIAL[0],
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=BASE)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    texts, held_text = corpus()
    tokenizer = train_tokenizer(texts)
    stream, held = encode(tokenizer, texts), encode(tokenizer, [held_text])
    print(f"{len(texts)} files, {len(stream)} tokens; {len(held)} held-out tokens", flush=True)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG, experts_implementation="eager")).float()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, perplexity {perplexity(model, held):.0f}")
    model.router_aux_loss_coef = 0.0  # the balancing loss is added in train(), layer by layer
    train(model, stream, held, args.steps)
    model.bfloat16().float()
    print(f"held-out perplexity of the rounded weights {perplexity(model, held):.2f}")
    save(model, tokenizer, args.out)
    (TINY / "heldout.txt").write_text(held_text)


if __name__ == "__main__":
    main()
