"""The functions of c/, compiled by this machine's C compiler on first use; without one, torch's kernels run.

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

from .panels import linear_by_panels, spans

#: Rows of x that one call takes; the C source has the same.
MAX_ROWS = 32
#: Kinds of 8-bit weights.
FP8, INT8 = 0, 1
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TILE, DEPTH, BLOCK = 64, 32, 4
#: A thread that would get fewer weights costs more than it saves.
VALUES_PER_THREAD = 1 << 19
#: Decoded weights of a GEMM, in the second-level cache.
PANEL_BYTES = 2 << 20
COMPILE_SECONDS = 60

SOURCES = Path(__file__).with_name("c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
X86_FLAGS = ("-mprefer-vector-width=512",)

Pointer, Long, Int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class _Octets(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("codes", "scales")),
        *((name, Long) for name in ("out", "in", "height", "width")),
        *((name, Int) for name in ("kind", "type", "inverse")),
    ]


class _Nibbles(ctypes.Structure):
    _fields_ = [
        *((name, Pointer) for name in ("codes", "scales", "zeros")),
        *((name, Long) for name in ("out", "in", "size")),
        ("type", Int),
        ("offset", ctypes.c_float),
    ]


_PRODUCT = (Pointer, Int, Pointer, Int, Pointer, Long, Long, Long)
SIGNATURES: dict[str, tuple[type, ...]] = {
    "octets_product": _PRODUCT,
    "octets_decode": (Pointer, Int, Pointer, Long, Long),
    "nibbles_product": _PRODUCT,
    "nibbles_decode": (Pointer, Pointer, *[Long] * 4),
    "find_nan": (Pointer, Long, Long),
}
RESULTS = {"octets_product": Int, "nibbles_product": Int, "find_nan": Long}

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether the compiled products are there and wanted; the first call compiles them, for some two seconds."""
    return os.environ.get("SGLANG_MIXED_NATIVE") != "0" and _library() is not None


def takes(x: torch.Tensor) -> bool:
    """Whether to run x [rows, in] here: bf16, or few rows of any dtype."""
    return x.shape[0] > 0 and (x.dtype == torch.bfloat16 or x.shape[0] <= MAX_ROWS) and available()


@dataclass(frozen=True, slots=True)
class Octets:
    """An 8-bit weight [out, in] in the file's layout, with scales in blocks of height x width.

    `scales` has ceil(out / height) x ceil(in / width) values in rows; with `inverse` they are 1 / scale.
    """

    kind: int
    weight: torch.Tensor
    scales: torch.Tensor
    height: int
    width: int
    inverse: bool = False

    def __post_init__(self) -> None:
        (out, columns), height, width = self.weight.shape, self.height, self.width
        fits = self.kind in (FP8, INT8) and self.weight.is_contiguous() and self.weight.itemsize == 1
        fits = fits and height > 0 < width and self.scales.numel() == -(-out // height) * -(-columns // width)
        fits = fits and self.scales.is_contiguous() and self.scales.dtype in FLOAT_TYPES
        assert fits, "weight and scales must be contiguous and of one shape"

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out] in x's dtype."""
        (out, columns), rows = self.weight.shape, len(x)
        assert rows > 0 and x.shape[1] == columns
        if rows <= MAX_ROWS:
            return _product("octets_product", self._struct(), x, out, BLOCK)
        height = max(1, PANEL_BYTES // (2 * columns))
        scaled = self.width < columns
        y = linear_by_panels(x, (out, columns), lambda low, _, panel: self.decode(panel, low, scaled), height)
        return y if scaled else y.float().mul_(self._row_scales()).to(x.dtype)

    def decode(self, target: torch.Tensor, start: int, scaled: bool = True) -> None:
        """Rows from `start` on to `target` bf16 [some rows, in]."""
        (out, columns), stop = self.weight.shape, start + len(target)
        assert start >= 0 and stop <= out and target.shape[1] == columns
        assert target.is_contiguous() and target.dtype == torch.bfloat16
        function, weight, address = _function("octets_decode"), ctypes.byref(self._struct()), target.data_ptr()

        def part(low: int, high: int) -> None:
            function(weight, scaled, address + (low - start) * columns * target.itemsize, low, high)

        _split(part, start, stop, BLOCK, columns)

    def _row_scales(self) -> torch.Tensor:
        scales = self.scales.float().reshape(-1)
        scales = scales if self.height == 1 else scales.repeat_interleave(self.height)[: len(self.weight)]
        return scales.reciprocal() if self.inverse else scales

    def _struct(self) -> _Octets:
        type_ = FLOAT_TYPES[self.scales.dtype]
        addresses = self.weight.data_ptr(), self.scales.data_ptr()
        return _Octets(*addresses, *self.weight.shape, self.height, self.width, self.kind, type_, self.inverse)


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
        fits = fits and self.scales.dtype in FLOAT_TYPES and out % 16 == 0 and self.nibbles.itemsize == 1
        fits = fits and all(one.is_contiguous() for one in (self.nibbles, self.scales))
        if self.qzeros is not None:
            fits = fits and self.qzeros.is_contiguous() and self.qzeros.nbytes == groups * out // 2
        assert fits, "nibbles, scales and zero points must be of one contiguous weight"

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.nibbles.shape[0], self.nibbles.shape[1] * 2

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, out] in x's dtype."""
        (out, columns), rows = self.shape, len(x)
        assert rows > 0 and x.shape[1] == columns
        if rows <= MAX_ROWS:
            return _product("nibbles_product", self._struct(), x, out, TILE)
        width = max(1, PANEL_BYTES // (2 * columns * TILE)) * TILE
        panel, y = torch.empty(columns * min(width, out), dtype=torch.bfloat16), x.new_empty(rows, out)
        for start, stop in spans(0, out, width):
            part = panel[: columns * (stop - start)].view(columns, -1)
            self.decode(part, start)
            y[:, start:stop] = x @ part
        return y

    def decode(self, target: torch.Tensor, start: int) -> None:
        """Rows from `start`, whole tiles of them, to `target` bf16 [in, some rows], which is Wᵀ."""
        (out, columns), stop = self.shape, start + target.shape[1]
        assert start >= 0 and stop <= out and start % TILE == 0 and (stop % TILE == 0 or stop == out)
        assert target.is_contiguous() and target.dtype == torch.bfloat16 and len(target) == columns
        given = ctypes.byref(self._struct()), target.data_ptr(), start, stop - start
        function = _function("nibbles_decode")
        _split(lambda low, high: function(*given, low, high), start, stop, TILE, columns)

    def _struct(self) -> _Nibbles:
        (out, columns), zeros = self.shape, None if self.qzeros is None else self.qzeros.data_ptr()
        addresses, size = (self.nibbles.data_ptr(), self.scales.data_ptr(), zeros), columns // len(self.scales)
        return _Nibbles(*addresses, out, columns, size, FLOAT_TYPES[self.scales.dtype], self.zero_offset)


def _product(name: str, weight: ctypes.Structure, x: torch.Tensor, out: int, unit: int) -> torch.Tensor:
    x, (rows, columns) = x.contiguous(), x.shape
    # C writes bf16 or float32.
    y = torch.empty(rows, out, dtype=x.dtype if x.dtype == torch.bfloat16 else torch.float32)
    given = ctypes.byref(weight), FLOAT_TYPES[x.dtype], x.data_ptr(), FLOAT_TYPES[y.dtype], y.data_ptr(), rows
    function = _function(name)

    def part(low: int, high: int) -> None:
        if function(*given, low, high):
            raise MemoryError(f"no memory for {rows} rows of {columns} values")

    _split(part, 0, out, unit, columns)
    return y if y.dtype == x.dtype else y.to(x.dtype)


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
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, RESULTS.get(name)
    return library


def _build() -> Path:
    """The shared library, from the cache or compiled. Raises OSError or SubprocessError."""
    if sys.byteorder != "little":
        raise OSError("the C sources read little-endian words")
    compiler = _compiler()
    flags = FLAGS + (X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())
    binary = Path(compiler[0]).resolve().stat()
    sources = sorted(SOURCES.glob("*.[ch]"))
    texts = [source.read_bytes() for source in sources]
    key = (texts, compiler, binary.st_size, binary.st_mtime_ns, flags, _cpu())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-mixed"
    target = folder / f"native-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # renamed whole: another process may do the same
            built = Path(temporary, "native.so")
            files = [str(source) for source in sources if source.suffix == ".c"]
            command = [*compiler, *flags, "-o", str(built), *files, "-lm"]
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
