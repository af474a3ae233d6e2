"""The examples of real size: `check` accepts their maps over headers of true shapes; the sizes are those they state."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from sglang_mixed.plan import make_plan

from ..engine.zygote import ROOT
from .jobs import command_line, words

EXAMPLES = {"qwen3-235b-a22b": (4, 4), "llama2-70b": (4, 1)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_map_is_sound_and_the_readme_tells_its_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.append(str(ROOT / "examples"))
    from headers import write_model

    write_model(name, tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    plan = make_plan(ROOT / "examples" / name / "map.yaml")
    said = (ROOT / "examples" / name / "README.md").read_text()
    assert f"| weights | {plan.weight_bytes(*EXAMPLES[name]) / 2**30:.2f} GiB" in said


def test_the_manifest_of_the_multi_node_page_is_sound() -> None:
    page = (ROOT / "docs" / "multi-node.md").read_text()
    workers, service = yaml.safe_load_all(page.partition("```yaml\n")[2].partition("```")[0])
    template = workers["spec"]["leaderWorkerTemplate"]
    (container,) = template["workerTemplate"]["spec"]["containers"]
    volumes = {volume["name"] for volume in template["workerTemplate"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["containerPort"]
    (line,) = container["args"]
    environment = {"$LWS_GROUP_SIZE": "2", "$LWS_WORKER_INDEX": "1", "$LWS_LEADER_ADDRESS": "leader"}
    for variable, value in environment.items():
        line = line.replace(variable, value)
    line = line.replace("/models/Qwen3-235B-A22B", "MODEL").replace("/maps/map.yaml", "MAP").removeprefix("exec ")
    printed = command_line(*words(line))
    assert printed[6:12] == ["--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "leader:20000"]
