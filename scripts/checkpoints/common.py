"""What the checkpoint scripts share: the corpus, the paths and the hub's per-expert weight layout."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"
BASE = TINY / "bf16"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
LENGTH = 256
HELD_OUT_BYTES = 60_000
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "__pycache__"}


def corpus() -> tuple[list[str], str]:
    """The standard library's sources: the training files in a fixed order, and the held-out text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    names = [n for n in names if not SKIPPED & set(n.split("/"))]
    names.sort(key=lambda n: hashlib.sha256(n.encode()).hexdigest())
    held, train = "", []
    for name in names:
        text = (root / name).read_text(encoding="utf-8", errors="ignore")
        if len(held) < HELD_OUT_BYTES and 2_000 < len(text) < 20_000 and text.isascii():
            held += text
        else:
            train.append(text)
    return train, held[:HELD_OUT_BYTES]


def per_expert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits fused 3-D expert weights into the hub's `experts.E.{gate,up,down}_proj.weight`."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                out[f"{prefix}.{e}.gate_proj.weight"] = gate
                out[f"{prefix}.{e}.up_proj.weight"] = up
        elif leaf == "down_proj" and tensor.dim() == 3:
            out.update({f"{prefix}.{e}.down_proj.weight": t for e, t in enumerate(tensor)})
        else:
            out[name] = tensor
    return {name: tensor.detach().contiguous().clone() for name, tensor in out.items()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder, whatever its shards."""
    out: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        out.update(load_file(path))
    return out


def calibration_ids(tokenizer: Any, count: int = 128) -> list[torch.Tensor]:
    """Windows of training text, spread over the corpus."""
    ids: list[int] = []
    for text in corpus()[0][::4]:
        ids += tokenizer(text)["input_ids"]
    starts = range(0, len(ids) - LENGTH, (len(ids) - LENGTH) // count)
    return [torch.tensor(ids[s : s + LENGTH]) for s in starts][:count]


def quantization_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def finish(folder: Path) -> None:
    """Gives a quantized folder the base's own tokenizer files, and checks what must have stayed as it was."""
    for stray in ("chat_template.jinja", "special_tokens_map.json", "quant_log.csv", "recipe.yaml"):
        (folder / stray).unlink(missing_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(BASE / name, folder / name)
    for path in folder.iterdir():
        path.chmod(0o644)
    base, made = tensors(BASE), tensors(folder)
    kept = [n for n in base if not n.endswith("_proj.weight")]
    changed = [n for n in kept if n not in made or made[n].dtype != base[n].dtype or not made[n].equal(base[n])]
    plain = [n for n in base if n not in kept and n in made and made[n].dtype == torch.bfloat16]
    print(f"{folder.name}: {len(made)} tensors, {len(changed)} of {len(kept)} 16-bit tensors changed", *changed)
    # AWQ rounds to float16 and folds smoothing into the norms; the siblings of one base must not differ in either.
    if plain or (changed and folder.parent == TINY):
        raise SystemExit(f"{folder.name}: changed {changed}, left in 16 bits {plain}")


def decompress(folder: Path, module: str) -> torch.Tensor:
    """One module's weight as compressed-tensors itself decodes it, in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    config = QuantizationConfig.model_validate(quantization_config(folder))
    (scheme,) = config.config_groups.values()
    state = {n.rpartition(".")[2]: t for n, t in tensors(folder).items() if n.startswith(module + ".")}
    if scheme.weights.num_bits == 4 and scheme.weights.type == "float":
        # Its compressor decodes FP4 to bfloat16, which would round.
        packed, scale = state["weight_packed"], state["weight_scale"]
        codes = unpack_fp4_from_uint8(packed, len(packed), packed.shape[1] * 2, torch.float32)
        scale = decompress_mx_scale(scale).float() if scale.dtype == torch.uint8 else scale.float()
        whole = state.get("weight_global_scale")
        return dequantize(codes, scale, args=scheme.weights, global_scale=whole, dtype=torch.float32)
    state = {n: t.float() if "scale" in n and t.is_floating_point() else t for n, t in state.items()}
    compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
    return compressor.decompress(state, scheme)["weight"].float()


@torch.no_grad()
def perplexity(model: torch.nn.Module, stream: torch.Tensor) -> float:
    """Per-token perplexity over consecutive windows of the training length."""
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


def held_out_perplexity(folder: Path) -> float:
    """The perplexity of a 16-bit or dequantized folder on the held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(BASE)((TINY / "heldout.txt").read_text())["input_ids"]
    return perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), torch.tensor([0, *ids]))


def report(folder: Path, dequantize: Callable[[str], torch.Tensor], reference: bool) -> None:
    """Says what the quantized weights are worth as the tool itself decodes them; may keep them."""
    base = tensors(BASE)
    weights = {n: dequantize(n.removesuffix(".weight")).float().contiguous() for n in base if "_proj." in n}
    errors = [((w - base[n].float()).norm() / base[n].float().norm()).item() for n, w in weights.items()]
    with tempfile.TemporaryDirectory() as plain:
        save_file({n: weights.get(n, t.float()) for n, t in base.items()}, Path(plain) / "model.safetensors")
        shutil.copyfile(BASE / "config.json", Path(plain) / "config.json")
        value = held_out_perplexity(Path(plain))
    print(f"{folder.name}: relative weight error {min(errors):.4f} to {max(errors):.4f}, perplexity {value:.2f}")
    if reference:
        save_file(weights, folder / "reference.safetensors")


def arguments(description: str | None) -> argparse.Namespace:
    """The command line that the tools' scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("settings", type=json.loads, help="the tool's settings, as JSON")
    parser.add_argument("--source", type=Path, default=BASE)
    parser.add_argument("--reference", action="store_true", help="also write reference.safetensors")
    return parser.parse_args()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
