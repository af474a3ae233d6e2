"""The functions of c/, compiled by this machine's C compiler on first use and run on torch's number of threads.

The library is kept in the user's cache folder under a hash of all that shaped it. SGLANG_MIXED_NATIVE=0 turns it off.
"""

from __future__ import annotations

import contextlib
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .panels import spans

#: A thread that would get fewer weights costs more than it saves.
VALUES_PER_THREAD = 1 << 19
COMPILE_SECONDS = 60

SOURCES = Path(__file__).with_name("c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
X86_FLAGS = ("-mprefer-vector-width=512",)

Pointer, Long, Int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
#: A structure by reference, or an address.
Job = Any
#: All take a job and which part of it, and return a flag.
FUNCTIONS = (
    *(f"{kind}_{verb}" for kind in ("octets", "nibbles") for verb in ("product", "decode")),
    *("nibbles_pack", "nibbles_unpack", "words_turn", "find_nan"),
)

OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether the compiled functions are there and wanted; the first call compiles them, for some seconds."""
    return os.environ.get("SGLANG_MIXED_NATIVE") != "0" and _library() is not None


def run(name: str, job: Job, start: int, stop: int, unit: int, columns: int) -> bool:
    """One of FUNCTIONS over [start, stop) on torch's number of threads, whose parts begin at whole units.

    `columns` tells how much work each is. Returns the flag that one of the parts raised. Ask `available` first.
    """
    library = _library()
    assert library is not None, "ask available() first"
    function, units = getattr(library, name), -(-(stop - start) // unit)
    threads = min(torch.get_num_threads(), (stop - start) * columns // VALUES_PER_THREAD, units)
    if threads <= 1:
        return bool(function(job, start, stop))
    step = -(-units // threads) * unit
    if (runtime := _openmp()) is not None:
        return bool(library.run_shared(function, job, start, stop, step, threads, *runtime))
    futures = [_pool(torch.get_num_threads()).submit(function, job, *span) for span in spans(start, stop, step)]
    flags = [future.result() for future in futures]  # of all, since they write into the caller's tensors
    return any(flags)


@functools.cache
def _openmp() -> list[Any] | None:
    """The OPENMP functions of the runtime that torch has loaded."""
    home = Path(torch.__file__).parent
    for path in (*home.glob("lib/lib*omp*"), *home.parent.glob("torch.libs/lib*omp*")):
        with contextlib.suppress(OSError, AttributeError):  # not the one that is loaded, or of another kind
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return [getattr(library, name) for name in OPENMP]
    return None


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
    for name in FUNCTIONS:
        getattr(library, name).argtypes = [Pointer, Long, Long]
    library.run_shared.argtypes = [Pointer, Pointer, *[Long] * 4, *[Pointer] * len(OPENMP)]
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
