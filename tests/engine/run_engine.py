"""One `sgl.Engine` in a process of its own: its shutdown ends every child of the process it runs in."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

CODE = "from tests.engine.run_engine import main; main()"


def main() -> None:
    """Read JSON {"arguments": {...}, "requests": [{...}, ...]} from one file; write the answers to another.

    The statistics of memory and experts stand beside the answers where a mix was served.
    """
    import sglang

    from sglang_mixed import get_expert_activation_stats, get_mixed_precision_memory_stats
    from sglang_mixed.errors import UnsupportedError

    asked, answered = map(Path, sys.argv[1:])
    job = json.loads(asked.read_text())
    engine = sglang.Engine(**job["arguments"])
    answers = [engine.generate(**request) for request in job["requests"]]
    mixed = engine.server_args.quantization == "mixed_precision"
    result = {"answers": answers, "memory": get_mixed_precision_memory_stats() if mixed else None}
    if mixed:
        with contextlib.suppress(UnsupportedError):  # no experts, or not counted
            result["experts"] = get_expert_activation_stats()
    answered.write_text(json.dumps(result))
    engine.shutdown()
