"""The functions of c/, compiled by this machine's C compiler on first use and run on torch's number of threads.

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
from pathlib import Path

import torch

from .panels import spans

#: A thread that would get fewer weights costs more than it saves.
VALUES_PER_THREAD = 1 << 19
COMPILE_SECONDS = 60

SOURCES = Path(__file__).with_name("c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
X86_FLAGS = ("-mprefer-vector-width=512",)

Pointer, Long, Int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_PRODUCT = (Pointer, Int, Pointer, Int, Pointer, Long, Long, Long)
SIGNATURES: dict[str, tuple[type, ...]] = {
    "octets_product": _PRODUCT,
    "octets_decode": (Pointer, Int, Pointer, Long, Long),
    "nibbles_product": _PRODUCT,
    "nibbles_decode": (Pointer, Pointer, *[Long] * 4),
    "nibbles_pack": (Pointer, Long, Long),
    "nibbles_unpack": (Pointer, Long, Long),
    "words_turn": (Pointer, Pointer, *[Long] * 5),
    "find_nan": (Pointer, Long, Long),
}
RESULTS = {"octets_product": Int, "nibbles_product": Int, "find_nan": Long}

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether the compiled functions are there and wanted; the first call compiles them, for some seconds."""
    return os.environ.get("SGLANG_MIXED_NATIVE") != "0" and _library() is not None


def function(name: str) -> Callable[..., int]:
    """One of SIGNATURES; ask `available` first."""
    library = _library()
    assert library is not None, "ask available() first"
    return getattr(library, name)  # type: ignore[no-any-return]


def split(part: Callable[[int, int], object], start: int, stop: int, unit: int, columns: int) -> None:
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
        return f"{platform.machine()} {platform.processor()}"
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join([platform.machine(), *told])
