"""The products of native.c, compiled by this machine's C compiler on first use; without one, torch's kernels run.

The library is kept in the user's cache folder under a hash of all that shaped it. SGLANG_MIXED_NATIVE=0 turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .panels import linear_by_panels, spans

#: Rows of x that one call takes; the C source has the same.
MAX_ROWS = 16
#: Kinds of 8-bit weights.
FP8, INT8 = 0, 1
SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LANES, TILE, DEPTH, BLOCK = 16, 64, 32, 4
#: A thread that would get fewer weights costs more than it saves.
VALUES_PER_THREAD = 1 << 19
#: Decoded weights of a GEMM, in the second-level cache.
PANEL_BYTES = 2 << 20
COMPILE_SECONDS = 60

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
X86_FLAGS = ("-mprefer-vector-width=512",)

Pointer = ctypes.c_void_p
_OCTETS = (ctypes.c_int, Pointer, Pointer, ctypes.c_long)
_NIBBLES = (Pointer, ctypes.c_int, Pointer, Pointer, ctypes.c_float)
SIGNATURES = {
    "bytes_product": (*_OCTETS, Pointer, Pointer, *[ctypes.c_long] * 6),
    "bytes_decode": (*_OCTETS, Pointer, *[ctypes.c_long] * 3),
    "nibbles_product": (*_NIBBLES, Pointer, Pointer, Pointer, *[ctypes.c_long] * 6),
    "nibbles_decode": (*_NIBBLES, Pointer, *[ctypes.c_long] * 7),
}

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether the compiled products are there and wanted; the first call compiles them, for some two seconds."""
    return os.environ.get("SGLANG_MIXED_NATIVE") != "0" and _library() is not None


def takes(x: torch.Tensor) -> bool:
    """Whether to run x [rows, in] here: bf16, or few rows of any dtype."""
    return x.shape[0] > 0 and (x.dtype == torch.bfloat16 or x.shape[0] <= MAX_ROWS) and available()


@dataclass(frozen=True, slots=True)
class Octets:
    """An 8-bit weight [out, in] in the file's layout; of FP8 everything here computes with w / 256.

    Unscaled, or times `spread` float32 [row blocks, in], of which `height` rows of W share a row.
    """

    kind: int
    weight: torch.Tensor
    spread: torch.Tensor | None = None
    height: int = 1

    def __post_init__(self) -> None:
        out, columns = self.weight.shape
        fits = self.kind in (FP8, INT8) and self.weight.is_contiguous() and self.weight.itemsize == 1
        if self.spread is not None:
            fits = fits and self.height > 0 and self.spread.shape == (-(-out // self.height), columns)
            fits = fits and self.spread.is_contiguous() and self.spread.dtype == torch.float32
        assert fits, "weight and scales must be contiguous and of one shape"

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out]: float32 of few rows, bf16 of many bf16 ones."""
        (out, columns), rows = self.weight.shape, len(x)
        assert rows > 0 and x.shape[1] == columns
        if rows > MAX_ROWS:
            height = max(1, PANEL_BYTES // (2 * columns))
            return linear_by_panels(x, (out, columns), lambda low, _, panel: self.decode(panel, low), height)
        x32, y = x.float().contiguous(), torch.empty(rows, out)
        if columns % LANES:
            x32 = F.pad(x32, (0, -columns % LANES))
        given = (*self._pointers(), x32.data_ptr(), y.data_ptr(), rows, columns, x32.shape[1], out)
        function = _function("bytes_product")
        _split(lambda low, high: function(*given, low, high), 0, out, BLOCK, columns)
        return y

    def decode(self, target: torch.Tensor, start: int) -> None:
        """Rows from `start` on to `target` bf16 [some rows, in]."""
        (out, columns), stop = self.weight.shape, start + len(target)
        assert start >= 0 and stop <= out and target.shape[1] == columns
        assert target.is_contiguous() and target.dtype == torch.bfloat16
        function, given, address = _function("bytes_decode"), self._pointers(), target.data_ptr()

        def part(low: int, high: int) -> None:
            function(*given, address + (low - start) * columns * target.itemsize, columns, low, high)

        _split(part, start, stop, BLOCK, columns)

    def _pointers(self) -> tuple[int, int, int | None, int]:
        return self.kind, self.weight.data_ptr(), None if self.spread is None else self.spread.data_ptr(), self.height


@dataclass(frozen=True, slots=True)
class Nibbles:
    """A 4-bit weight [out, in] in torch's layout; scales [groups, out], zero points packed or all 8."""

    nibbles: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor | None
    zero_offset: int

    def __post_init__(self) -> None:
        out, columns = self.shape
        groups = len(self.scales)
        fits = self.scales.shape == (groups, out) and columns % groups == 0 and columns // groups % DEPTH == 0
        fits = fits and self.scales.dtype in SCALE_TYPES and out % 16 == 0 and self.nibbles.itemsize == 1
        fits = fits and all(one.is_contiguous() for one in (self.nibbles, self.scales))
        if self.qzeros is not None:
            fits = fits and self.qzeros.is_contiguous() and self.qzeros.nbytes == groups * out // 2
        assert fits, "nibbles, scales and zero points must be of one contiguous weight"

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.nibbles.shape[0], self.nibbles.shape[1] * 2

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out]: float32 of few rows, bf16 of many bf16 ones."""
        (out, columns), rows, groups = self.shape, len(x), len(self.scales)
        assert rows > 0 and x.shape[1] == columns
        if rows > MAX_ROWS:
            return self._by_panels(x)
        x32, y = x.float().contiguous(), torch.empty(rows, out)
        sums = x32.view(rows, groups, -1).sum(-1)
        given = (*self._pointers(), x32.data_ptr(), sums.data_ptr(), y.data_ptr(), rows, columns, out)
        function = _function("nibbles_product")
        _split(lambda low, high: function(*given, columns // groups, low, high), 0, out, TILE, columns)
        return y

    def decode(self, target: torch.Tensor, start: int) -> None:
        """Rows from `start`, whole tiles of them, to `target` bf16 [in, some rows], which is Wᵀ."""
        (out, columns), stop = self.shape, start + target.shape[1]
        assert start >= 0 and stop <= out and start % TILE == 0 and (stop % TILE == 0 or stop == out)
        assert target.is_contiguous() and target.dtype == torch.bfloat16 and len(target) == columns
        given = (*self._pointers(), target.data_ptr(), start, stop - start, columns, out, columns // len(self.scales))
        function = _function("nibbles_decode")
        _split(lambda low, high: function(*given, low, high), start, stop, TILE, columns)

    def _by_panels(self, x: torch.Tensor) -> torch.Tensor:
        out, columns = self.shape
        width = max(1, PANEL_BYTES // (2 * columns * TILE)) * TILE
        panel, y = torch.empty(columns * min(width, out), dtype=torch.bfloat16), x.new_empty(len(x), out)
        for start, stop in spans(0, out, width):
            part = panel[: columns * (stop - start)].view(columns, -1)
            self.decode(part, start)
            y[:, start:stop] = x @ part
        return y

    def _pointers(self) -> tuple[int, int, int, int | None, float]:
        zeros = None if self.qzeros is None else self.qzeros.data_ptr()
        kind = SCALE_TYPES[self.scales.dtype]
        return self.nibbles.data_ptr(), kind, self.scales.data_ptr(), zeros, float(self.zero_offset)


def _split(part: Callable[[int, int], object], start: int, stop: int, unit: int, columns: int) -> None:
    """Run part(low, high) over [start, stop) on torch's number of threads; pieces begin at whole units."""
    units = -(-(stop - start) // unit)
    threads = min(torch.get_num_threads(), (stop - start) * columns // VALUES_PER_THREAD, units)
    if threads <= 1:
        part(start, stop)
        return
    first, *others = spans(start, stop, -(-units // threads) * unit)
    futures = [_pool(torch.get_num_threads()).submit(part, *span) for span in others]
    try:
        part(*first)
    finally:  # the others write into the caller's tensors
        for future in futures:
            future.result()


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sglang-mixed-native")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _function(name: str) -> Callable[..., None]:
    library = _library()
    assert library is not None, "ask available() first"
    return getattr(library, name)  # type: ignore[no-any-return]


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("no compiled CPU kernels, torch's run instead (slower): %s", detail)
        return None
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, None
    return library


def _build() -> Path:
    """The shared library, from the cache or compiled. Raises OSError or SubprocessError."""
    if sys.byteorder != "little":
        raise OSError("native.c reads little-endian words")
    compiler = _compiler()
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    binary = Path(compiler[0]).resolve().stat()
    key = (SOURCE.read_bytes(), compiler, binary.st_size, binary.st_mtime_ns, flags, _cpu())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-mixed"
    target = folder / f"native-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # renamed whole: another process may do the same
            built = Path(temporary, "native.so")
            command = [*compiler, *flags, "-o", str(built), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
            built.replace(target)
    return target


def _compiler() -> list[str]:
    for candidate in (os.environ.get("CC"), "cc", "gcc", "clang"):
        command = shlex.split(candidate or "")
        if command and (path := shutil.which(command[0])):
            return [path, *command[1:]]
    raise OSError("no C compiler: $CC, cc, gcc and clang are not there")


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join([platform.machine(), platform.processor(), *told])
