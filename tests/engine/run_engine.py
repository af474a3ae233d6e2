"""One `sgl.Engine` in a process of its own: its shutdown ends every child of the process it runs in.

Reads JSON {"arguments": {...}, "requests": [{...}, ...]} from stdin; writes the answers, and the memory statistics
where a mix was served, as the last line of stdout.
"""

from __future__ import annotations

import json
import sys

import sglang

from sglang_mixed import get_mixed_precision_memory_stats

if __name__ == "__main__":
    job = json.load(sys.stdin)
    engine = sglang.Engine(**job["arguments"])
    answers = [engine.generate(**request) for request in job["requests"]]
    mixed = job["arguments"].get("enable_mixed_precision")
    print(json.dumps({"answers": answers, "memory": get_mixed_precision_memory_stats() if mixed else None}))
    engine.shutdown()
