"""What is fuzzed: checkpoints of one layer, in several formats, and maps over them; each mutant one changed file."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sglang_mixed.checkpoint import open_checkpoint
from sglang_mixed.checkpoint.header import read_header
from sglang_mixed.checkpoint.modules import Modules
from sglang_mixed.config import load_map
from sglang_mixed.errors import CheckpointError, MapError, MixedPrecisionError
from sglang_mixed.plan import make_plan
from sglang_mixed.plan.rank import Rank
from sglang_mixed.plan.values import verify_values
from sglang_mixed.stream import ReadLog, stream

from ..models import write, write_map
from .mutator import Mutator, Object, dump, parse

INDEX = "model.safetensors.index.json"
#: Processor seconds that one mutant may take.
BOUND = 2.0
KINDS = ("bf16", "fp8", "gptq")


class Hang(Exception):
    """A mutant took longer than it may."""


class Wrong(Exception):
    """A mutant had an outcome that is neither an error of ours nor a correct load."""


class File(NamedTuple):
    """A file that is mutated: a safetensors one as header tree and data, or text."""

    path: Path
    original: bytes
    tree: Any
    data: bytes = b""


class Corpus:
    """The true files, on a memory file system where there is one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for kind in KINDS:
            write(folder / kind, kind, layers=1, experts=2, shards=2 if kind == "gptq" else 1)
        self.map = write_map(
            folder,
            {"model.layers.*.mlp.experts.*.*.weight": "gptq", "model.layers.0.self_attn.{q,k}_proj": "fp8"},
            default="bf16",
            **{kind: kind for kind in KINDS},
        )
        shards = [path for kind in KINDS for path in sorted((folder / kind).glob("*.safetensors"))]
        self.shards = [_shard(path) for path in shards]
        self.configs = [_text(folder / kind / "config.json") for kind in KINDS]
        self.index = _text(folder / "gptq" / INDEX)
        sections = {
            "mixed_precision": {
                **{f"{kind}_path": str(folder / kind) for kind in KINDS},
                "default": "bf16",
                "weight_mapping": {
                    "model.layers.*.mlp.experts.{0..1}.*.weight": "gptq",
                    "model.layers.0.self_attn.q_proj": "fp8",
                },
            },
            "inference": {"max_seq_length": 64, "dtype": "bfloat16"},
            "server": {"host": "127.0.0.1", "port": 8080},
        }
        self.map_tree = parse(json.dumps(sections))


def _shard(path: Path) -> File:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return File(path, raw, parse(raw[8:end]), raw[end:])


def _text(path: Path) -> File:
    raw = path.read_bytes()
    return File(path, raw, parse(raw))


class Fuzzer:
    """Mutants by one seeded generator; `outcomes` counts what became of them."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus, self.mutator = corpus, Mutator(seed)
        self.outcomes: Counter[str] = Counter()

    def run(self, number: int) -> None:
        """So many mutants. Raises Wrong, with the mutant's bytes, at the first outcome that may not be."""
        targets = [self.header] * 12 + [self.text] * 4 + [self.mapping] * 3 + [self.whole]
        for _ in range(number):
            self.mutator.random.choice(targets)()

    def header(self) -> None:
        """A shard's header, read by itself."""
        file = self.mutator.random.choice(self.corpus.shards)
        with changed(file, self._mutant_shard(file)) as path:
            self._judge("header", path, lambda: Modules([read_header(path)]))

    def whole(self) -> None:
        """A shard below a plan that is then loaded."""
        file = self.mutator.random.choice(self.corpus.shards)
        with changed(file, self._mutant_shard(file, valid=0.8)) as path:
            self._judge("plan", path, self.load)

    def text(self) -> None:
        """A config or the index, below a checkpoint or a plan."""
        file = self.mutator.random.choice([*self.corpus.configs, self.corpus.index])
        with changed(file, self._mutant_text(file)) as path:
            if self.mutator.random.random() < 0.7:
                self._judge("folder", path, lambda: _examine(path.parent))
            else:
                self._judge("plan", path, self.load)

    def mapping(self) -> None:
        """A map, parsed; one in four planned."""
        random = self.mutator.random
        if random.random() < 0.3:
            raw = self.mutator.flip(self.corpus.map.read_bytes())
        else:
            raw = dump(self.mutator.mutate(self.corpus.map_tree), compact=False).encode("utf-8", "replace")
        path = self.corpus.folder / "mutant.yaml"
        path.write_bytes(raw)
        self._judge("map", path, lambda: make_plan(path) if random.random() < 0.25 else load_map(path).patterns())

    def load(self) -> None:
        """Plan the corpus, look at all values, and read what each of two layouts holds."""
        plan = make_plan(self.corpus.map)
        verify_values(plan)
        for rank in (Rank(), Rank(2, 2, 1)):
            planned = plan.rank(rank)
            reads = list(planned.reads())
            expected = sum(read.nbytes for _, _, tensors in reads for read in tensors)
            log = ReadLog()
            found = dict(stream(reads, log))
            _require(sum(tensor.nbytes for tensor in found.values()) == log.bytes_read == expected, "bytes differ")
        _require(plan.file_bytes <= expected * 4 + (1 << 20), "planned bytes are out of all proportion")

    def _mutant_shard(self, file: File, valid: float = 0.2) -> bytes:
        random = self.mutator.random
        if random.random() < 0.25:
            return self.mutator.flip(file.original, len(file.original) - len(file.data))
        tree = self.mutator.mutate(file.tree)
        data = file.data
        if random.random() < valid:
            data = bytes(_lay_out(tree, len(data)))
        raw = dump(tree, compact=random.random() < 0.7).encode("utf-8", "surrogatepass")
        if random.random() < 0.1:
            data = data[: random.randrange(len(data) + 1)] + bytes(random.choice((0, 1, 64)))
        length = (
            len(raw)
            if random.random() < 0.95
            else random.choice((0, 1, len(raw) - 1, len(raw) + 1, 1 << 40, (1 << 64) - 1))
        )
        return length.to_bytes(8, "little") + raw + data

    def _mutant_text(self, file: File) -> bytes:
        if self.mutator.random.random() < 0.2:
            return self.mutator.flip(file.original)
        return dump(self.mutator.mutate(file.tree)).encode("utf-8", "surrogatepass")

    def _judge(self, target: str, path: Path, attempt: Callable[[], object]) -> None:
        try:
            with bounded():
                attempt()
        except MixedPrecisionError as error:
            text = str(error)
            _require(bool(error.what) and error.what in text, "an error without a text", path, error)
            if isinstance(error, CheckpointError | MapError):
                _require(error.file is not None, "an error that names no file", path, error)
            self.outcomes[f"{target}: {type(error).__name__}"] += 1
        except Exception as error:
            _require(False, f"{type(error).__name__}: {error}"[:300], path, error)
        else:
            self.outcomes[f"{target}: loaded"] += 1


def _examine(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for module in checkpoint.modules:
        checkpoint.format(module)
    checkpoint.check_index()


def _lay_out(tree: Any, available: int) -> int:
    """Make offsets follow dtypes and shapes, where these are sound; returns the bytes of data that takes."""
    from sglang_mixed.formats.base import ITEM_BYTES

    place = 0
    for name, value in tree if isinstance(tree, Object) else ():
        fields = dict(value) if isinstance(value, Object) else {}
        shape, dtype = fields.get("shape"), fields.get("dtype")
        if name == "__metadata__" or not isinstance(shape, list) or not isinstance(dtype, str):
            continue
        size = ITEM_BYTES.get(dtype, 1)
        for one in shape:
            if type(one) is not int or not 0 <= one < 1 << 20:
                return available
            size *= one
        if place + size > 1 << 22:
            return available
        for number, (key, _) in enumerate(value):
            if key == "data_offsets":
                value[number] = key, [place, place + size]
        place += size
    return place


@contextmanager
def changed(file: File, raw: bytes) -> Iterator[Path]:
    """The file with other bytes, inside the block."""
    file.path.write_bytes(raw)
    try:
        yield file.path
    finally:
        file.path.write_bytes(file.original)


@contextmanager
def bounded() -> Iterator[None]:
    """Hang after BOUND seconds of this process's processor time, or half a minute on the clock."""
    signal.setitimer(signal.ITIMER_VIRTUAL, BOUND)
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _on_timer(*_: object) -> None:
    raise Hang(f"more than {BOUND} s")


signal.signal(signal.SIGVTALRM, _on_timer)
signal.signal(signal.SIGALRM, _on_timer)


def _require(holds: bool, what: str, path: Path | None = None, cause: BaseException | None = None) -> None:
    if not holds:
        kept = path.read_bytes()[:4000] if path else b""
        raise Wrong(what + (f" of {path}: {kept!r}" if path else "")) from cause
