"""The memory of a server's processes over time, each process by itself, from Linux' /proc."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from common import processes

#: `rss` counts a page in every process that maps it, `pss` shares it out; `anonymous` is what was allocated.
KINDS = {"rss": "Rss:", "pss": "Pss:", "anonymous": "Anonymous:"}
#: Readings of which begin and end are the mean.
SPAN = 5


class Series:
    """`sizes[process][kind]`: MiB, one reading after another, of the processes that stood at the start."""

    def __init__(self, pid: int) -> None:
        # In the order in which SGLang starts those of one rank.
        children = sorted(process.pid for process in processes(pid))
        self._pids = dict(zip(("http", "scheduler", "detokenizer"), (pid, *children), strict=True))
        self.sizes: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in self._pids}

    def read(self) -> None:
        for name, pid in self._pids.items():
            lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
            found = {line[0]: int(line[1]) for line in lines}
            for kind, field in KINDS.items():
                self.sizes[name][kind].append(round(found[field] / 1024, 2))

    def latest(self) -> dict[str, dict[str, float]]:
        return {name: {kind: values[-1] for kind, values in kinds.items()} for name, kinds in self.sizes.items()}

    def begin(self, kind: str, warm_up: int) -> dict[str, float]:
        """MiB of each process after `warm_up` readings."""
        return {name: fmean(kinds[kind][warm_up : warm_up + SPAN]) for name, kinds in self.sizes.items()}

    def end(self, kind: str) -> dict[str, float]:
        """MiB of each process at last."""
        return {name: fmean(kinds[kind][-SPAN:]) for name, kinds in self.sizes.items()}

    def growth(self, kind: str, warm_up: int) -> float:
        """Of all processes together, as a share of what they had after the warm-up."""
        begin = sum(self.begin(kind, warm_up).values())
        return (sum(self.end(kind).values()) - begin) / begin
