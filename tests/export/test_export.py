"""`export`: one folder that is the mix, whole or not there, resumed where it was interrupted."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sglang_mixed.checkpoint import Checkpoint, open_checkpoint
from sglang_mixed.digests import sha256
from sglang_mixed.errors import ExportError
from sglang_mixed.export import export
from sglang_mixed.plan import Plan, make_plan

from ..models import Tensors, write, write_map

TINY = Path(__file__).parents[2] / "examples" / "tiny"
SHARD = 1_000_000


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(TINY / "experts.yaml")


@pytest.fixture(scope="module")
def exported(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "mix"
    export(plan, folder, SHARD)
    return folder


def hashes(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: sha256(checkpoint.read_tensor(name)) for name in checkpoint.entries}


def planned_hashes(plan: Plan) -> dict[str, str]:
    return {
        f"{one.name}.{local}": sha256(plan.checkpoints[one.source].read_tensor(f"{one.name}.{local}"))
        for one in plan.modules.values()
        for local in one.tensors
    }


def assert_same_model(folder: Path, plan: Plan) -> None:
    """The folder, taken by itself, is the plan's model: bytes, formats, sizes."""
    again = make_plan(folder)
    assert hashes(open_checkpoint(folder)) == planned_hashes(plan)
    assert {one.name: (one.format, set(one.tensors), one.bias) for one in again.modules.values()} == {
        one.name: (one.format, set(one.tensors), one.bias) for one in plan.modules.values()
    }
    assert again.weight_bytes(2) == plan.weight_bytes(2) and again.file_bytes == plan.file_bytes


def test_bytes_formats_and_sizes_are_the_plans(exported: Path, plan: Plan) -> None:
    assert_same_model(exported, plan)


def test_the_safetensors_library_reads_every_file_that_the_index_names(exported: Path, plan: Plan) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(exported / file, "pt") as tensors:
            found.update({name: (file, sha256(tensors.get_tensor(name))) for name in tensors.keys()})  # noqa: SIM118
    assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
    assert {name: digest for name, (_, digest) in found.items()} == planned_hashes(plan)
    assert index["metadata"]["total_size"] == plan.file_bytes


def test_shards_keep_to_their_size_and_are_listed_with_their_hashes(exported: Path) -> None:
    shards = sorted(exported.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < SHARD + 20_000 for shard in shards)
    listed = "".join(f"{hashlib.sha256(shard.read_bytes()).hexdigest()}  {shard.name}\n" for shard in shards)
    assert (exported / "SHA256SUMS").read_text() == listed


def test_what_the_base_holds_besides_weights_is_copied(tmp_path: Path) -> None:
    base = write(tmp_path / "base", shards=2, auto_map={"AutoModel": "modeling.Model"})
    for name in ("tokenizer.json", "modeling.py", "chat_template.jinja", "LICENSE", "merges.txt"):
        (base / name).write_text(name)
    (base / "inner").mkdir()
    (base / "inner" / "layers.py").write_text("code")
    (base / "inner" / "more.safetensors").write_text("weights")
    for name in ("pytorch_model.bin", "quantize_config.json", ".gitattributes"):
        (base / name).write_text("{}")
    export(make_plan(base), tmp_path / "out", SHARD)
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        *("tokenizer.json", "modeling.py", "chat_template.jinja", "LICENSE", "merges.txt", "inner/layers.py"),
        *("model-00001-of-00001.safetensors", "model.safetensors.index.json", "config.json", "README.md", "SHA256SUMS"),
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "modeling.Model"}


def test_the_card_says_what_came_from_where_and_no_path(tmp_path: Path) -> None:
    base, other = write(tmp_path / "base"), tmp_path / "models--org--name" / "snapshots" / "0a1b"
    write(other, "fp8")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tongyi\n---\nlicense: not this\n")
    (other / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n")
    plan = make_plan(write_map(tmp_path, {"**.q_proj": "eight"}, sixteen=base, eight=other))
    export(plan, tmp_path / "out", SHARD)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\nlicense_name: tongyi\nlibrary_name")
    assert "| sixteen | base |" in card and "| eight | org/name | 2 |" in card
    assert "| tongyi |" in card and "| mit |" in card and str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def without_head(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


VARIANTS: dict[str, Callable[[Path], Path]] = {
    "a base that is quantized": lambda path: write_map(
        path, {"**.experts.{0..1}.**": "a", "lm_head": "a"}, a=write(path / "a"), b=write(path / "b", "gptq")
    ),
    "tied embeddings": lambda path: write_map(
        path,
        {"**.down_proj": "b"},
        a=write(path / "a", change=without_head, tie_word_embeddings=True),
        b=write(path / "b", "fp8", tie_word_embeddings=True),
    ),
    "groups of two sizes": lambda path: write_map(
        path, {"**.up_proj": "b"}, a=write(path / "a", "gptq"), b=write(path / "b", "gptq64")
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_mix_stays_what_it_is(variant: str, tmp_path: Path) -> None:
    plan = make_plan(VARIANTS[variant](tmp_path))
    export(plan, tmp_path / "out", SHARD)
    assert_same_model(tmp_path / "out", plan)


def test_a_mix_of_a_mix_keeps_every_part_apart(exported: Path, plan: Plan, tmp_path: Path) -> None:
    again = make_plan(write_map(tmp_path, {"**.o_proj": "eight"}, mix=exported, eight=TINY / "fp8-channel"))
    export(again, tmp_path / "out", SHARD)
    assert_same_model(tmp_path / "out", again)
    sources = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sources"]
    assert sources.keys() == {*plan.sources, "eight"}


def test_experts_in_one_tensor_become_experts_of_their_own(tmp_path: Path) -> None:
    def fuse(tensors: Tensors) -> None:
        for layer in range(2):
            owner = f"model.layers.{layer}.mlp.experts"
            taken = {name: tensors.pop(name) for name in list(tensors) if name.startswith(owner)}
            both = [
                torch.cat([taken[f"{owner}.{expert}.{part}_proj.weight"] for part in ("gate", "up")])
                for expert in range(4)
            ]
            tensors[f"{owner}.gate_up_proj"] = torch.stack(both)
            tensors[f"{owner}.down_proj"] = torch.stack([taken[f"{owner}.{one}.down_proj.weight"] for one in range(4)])

    sources = {"fused": write(tmp_path / "fused", change=fuse), "fp8": write(tmp_path / "fp8", "fp8")}
    plan = make_plan(write_map(tmp_path, {"**.experts.{1,3}.**": "fp8"}, **sources))
    export(plan, tmp_path / "out", SHARD)
    assert_same_model(tmp_path / "out", plan)


def test_zero_points_that_a_16_bit_source_proved_stay_proven_without_it(tmp_path: Path) -> None:
    from ..plan.test_cover import ORIGIN, autoround, with_original, with_random_codes

    config, change = autoround(False), with_random_codes(1, False)
    packed = write(tmp_path / "packed", "gptq", change=change, quantization_config=config)
    base = write(tmp_path / "original", change=with_original)
    plan = make_plan(write_map(tmp_path, {ORIGIN: "packed"}, base=base, packed=packed))
    export(plan, tmp_path / "out", SHARD)
    assert_same_model(tmp_path / "out", plan)


class Interrupted(BaseException):
    pass


def interrupt_at(nbytes: int) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done >= nbytes:
            raise Interrupted

    return advance


def test_a_killed_export_goes_on_with_its_finished_files(plan: Plan, exported: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    script = (
        "import os, sys; from pathlib import Path\n"
        "from sglang_mixed.export import export; from sglang_mixed.plan import make_plan\n"
        "done = 0\n"
        "def advance(count):\n"
        "    global done; done += count\n"
        f"    if done >= 2_500_000: os.kill(os.getpid(), {signal.SIGKILL})\n"
        f"export(make_plan({str(TINY / 'experts.yaml')!r}), Path({str(target)!r}), {SHARD}, advance)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL and not target.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in sorted(partial.glob("*.safetensors"))}
    assert len(finished) == 2 and [path.name for path in partial.glob("*.safetensors.partial")]
    whole, damaged = finished
    data = (partial / damaged).read_bytes()
    (partial / damaged).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    total = 0

    def advance(count: int) -> None:
        nonlocal total
        total += count

    export(plan, target, SHARD, advance)
    assert not partial.exists()
    assert {path.name for path in target.iterdir()} == {path.name for path in exported.iterdir()}
    assert (target / "SHA256SUMS").read_text() == (exported / "SHA256SUMS").read_text()
    assert (target / whole).stat().st_mtime_ns == finished[whole]
    assert total == sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert_same_model(target, plan)


def test_what_an_interrupted_export_of_another_mix_left_is_not_taken(exported: Path, tmp_path: Path) -> None:
    other = make_plan(TINY / "map.yaml")
    with pytest.raises(Interrupted):
        export(other, tmp_path / "out", SHARD // 2, interrupt_at(1_200_000))
    export(make_plan(TINY / "experts.yaml"), tmp_path / "out", SHARD)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in exported.iterdir()}
    assert (tmp_path / "out" / "SHA256SUMS").read_text() == (exported / "SHA256SUMS").read_text()


@contextmanager
def files_of_at_most(nbytes: int) -> Any:
    """The system refuses to let any file of this process grow further, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_no_half_file(plan: Plan, tmp_path: Path) -> None:
    with files_of_at_most(600_000), pytest.raises(ExportError, match="run the same command again"):
        export(plan, tmp_path / "out", SHARD)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["SHA256SUMS"]


def test_an_existing_target_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="the target exists"):
        export(plan, tmp_path, SHARD)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_the_temporary_name_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "file").write_text("mine")
    with pytest.raises(ExportError, match="holds something else"):
        export(plan, tmp_path / "out", SHARD)
    assert (tmp_path / "out.partial" / "file").read_text() == "mine"


def test_two_exports_of_one_target_do_not_mix(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    other = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(ExportError, match="another process"):
            export(plan, tmp_path / "out", SHARD)
    finally:
        os.close(other)
