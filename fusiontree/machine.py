"""Properties of this machine: processor, cores, memory, native products. No other module queries them.

The functions that need torch import it, so that importing this module is fast and `prepare` can be called before
torch is imported.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.errors import FusionTreeError

if TYPE_CHECKING:
    import torch

UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""What bfloat16 and float32 products are fast with, the fastest first."""
HALF_UNITS = {
    "bfloat16": {"amx_bf16", "avx512_bf16", "bf16", "svebf16"},
    "float16": {"amx_fp16", "avx512_fp16", "asimdhp"},
}
"""Processor flags (x86, then Arm) of units for half-precision products; any of the flags is enough."""
VECTOR_FUNCTIONS = (
    *("acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor"),
    *("lgamma", "log", "log10", "log1p", "log2", "rsqrt", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)
"""Functions that some builds of torch take from a vector library."""
SLOWER = 2.0
"""A half-precision product that takes this multiple of the float32 time has no unit. Products without a unit take 5 to
15 times as long as float32; products with one are faster than float32."""
SPINS = "5000"
"""How often a waiting thread of GNU OpenMP polls before it sleeps. Its default is millions. On busy cores, threads
that spin for long are ten times slower."""


def prepare() -> None:
    """Set variables that must be set before torch is imported, unless the user has. Only programs call this."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def processor() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def matrix_units() -> list[str] | None:
    """The units of `UNITS` that the processor has; None where the system does not tell."""
    flags = _flags()
    return None if flags is None else [unit for unit in UNITS if unit in flags]


def cores() -> int:
    """How many cores this process may use: the lower of its CPU affinity and the quotas of its control groups."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(int(quota) for quota in _core_quotas())]))


def threads() -> int:
    """How many threads torch should use in this process: its default, but at most this process's share of the cores.

    torch counts the cores of the machine and ignores the quota of a container. OMP_NUM_THREADS takes precedence.
    """
    import torch

    if threads_are_set():
        return torch.get_num_threads()
    return max(1, min(torch.get_num_threads(), cores() // launched("LOCAL_WORLD_SIZE", 1, least=1)))


def threads_are_set() -> bool:
    """Whether OMP_NUM_THREADS is set to a value that OpenMP obeys: integers of at least 1."""
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")
    return all(number.strip().isdecimal() and int(number) > 0 for number in said)


def launched(name: str, default: int, *, least: int = 0) -> int:
    """An integer from an environment variable that torchrun sets, or `default`.

    Raises:
        FusionTreeError: the variable is not an integer of at least `least`.
    """
    found = os.environ.get(name, str(default))
    if not found.isdecimal() or int(found) < least:
        raise FusionTreeError(f"environment: {name}: expected a whole number from {least} on, found {found!r}")
    return int(found)


def device_type() -> str:
    """The type of device that training uses: `cuda` if available, otherwise `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: "torch.device") -> str:
    """The name of a device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


@cache
def multiplies(dtype: "torch.dtype") -> bool:
    """Whether the processor multiplies matrices of a dtype natively: about as fast as float32, or faster.

    For bfloat16 and float16, the flags of the processor and torch must both allow it. A timed product of a few
    milliseconds, once per process, confirms it.
    """
    import torch

    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = str(dtype).removeprefix("torch.")
    flags = _flags()
    has_units = flags is None or bool(flags & HALF_UNITS[name])
    return has_units and _torch_has(name) and _product_seconds(dtype) < SLOWER * _product_seconds(torch.float32)


def resolve_vector_math() -> None:
    """Call each function of the vector library once with one number, before several threads call it.

    MKL selects the loops for the processor at the first call of a function. If the threads of one operation do this at
    the same time, one thread can use loops of half the precision for its part of the call. float64 results are then
    off by 1e-9 (https://github.com/pytorch/pytorch/issues/188792; MKL 2024.2, which torch's packages contain).
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            for function in VECTOR_FUNCTIONS:
                getattr(torch, function)(torch.full((1,), 0.5, dtype=dtype, device="cpu"))


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` would use on the processor; None where there is none."""
    names = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    return next((path for name in names if (path := shutil.which(name))), None)


@cache
def compile_refusal(device: str) -> str | None:
    """Why `torch.compile` fails for a type of device, or None. The trial compilation takes some seconds, once."""
    import torch

    if device == "cpu" and compiler() is None:
        return "there is no C++ compiler"
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return None


def free_bytes(device: "torch.device") -> int | None:
    """Memory that this process can still take on a device; None where the system does not tell.

    On the CPU: the minimum of the system's available memory, of the memory left in the process's control groups
    (containers, batch systems), and of the rest under `ulimit -v` and `ulimit -d`.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [*_available_bytes(), *_control_group_bytes(), *_limit_bytes()]
    return max(0, min(known)) if known else None


def about(device: "torch.device") -> dict[str, Any]:
    """The properties of the machine on which measured times depend, as plain data."""
    import torch

    return {
        "device": device_name(device),
        "matrix_units": matrix_units(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": load(),
        "torch": torch.__version__,
    }


def load() -> float | None:
    """The load average of the last minute: runnable threads; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _probe(x: "torch.Tensor") -> "torch.Tensor":
    return x.sin() + x


def _torch_has(name: str) -> bool:
    """Whether torch's oneDNN uses units for half precision; True where unknown. Without oneDNN: False on x86 only."""
    import torch

    asked = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[name]
    if not torch.backends.mkldnn.is_available():
        return platform.machine() not in ("x86_64", "AMD64")
    return bool(getattr(torch.ops.mkldnn, asked, lambda: True)())


def _product_seconds(dtype: "torch.dtype") -> float:
    """The best time of a product of 256 x 512 with 512 x 512; an active trace or autocast does not affect it."""
    from timeit import repeat

    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        a = torch.ones(256, 512, dtype=dtype, device="cpu")
        b = torch.ones(512, 512, dtype=dtype, device="cpu")
        return min(repeat(lambda: a @ b, repeat=5, number=1))


def _lines(path: str) -> list[str]:
    """The lines of a system file; an empty list if the file cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


@cache
def _cpuinfo() -> dict[str, str]:
    """The fields of /proc/cpuinfo for one core; empty on other systems than Linux."""
    fields = (line.split(":", 1) for line in _lines("/proc/cpuinfo") if ":" in line)
    return {name.strip(): value.strip() for name, value in fields}


def _flags() -> set[str] | None:
    found = _cpuinfo().get("flags") or _cpuinfo().get("Features")
    return None if found is None else set(found.split())


def _available_bytes() -> list[int]:
    """The bytes that the system can give without swapping; empty where the system does not tell."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return [int(line.split()[1]) * 1024]
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    known = all(name in getattr(os, "sysconf_names", {}) for name in names)
    return [os.sysconf(names[0]) * os.sysconf(names[1])] if known else []


def _limit_bytes() -> Iterator[int]:
    """The bytes left under the limits on address space and data (`man 2 getrlimit`, `man 5 proc`)."""
    try:
        import resource
    except ImportError:
        return
    pages = [int(number) for line in _lines("/proc/self/statm") for number in line.split()]
    for limit, field in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        most = resource.getrlimit(limit)[0]
        if pages and most != resource.RLIM_INFINITY:
            yield most - pages[field] * resource.getpagesize()


def _control_groups(controller: str) -> Iterator[str]:
    """The folders of the control groups (versions 2 and 1) that this process is in, the innermost first."""
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = f"/sys/fs/cgroup/{controllers}".rstrip("/")
            parts = [part for part in path.split("/") if part and part != ".."]
            for length in range(len(parts), -1, -1):
                yield "/".join([root, *parts[:length]])


def _control_group_bytes() -> Iterator[int]:
    """The bytes that each control group leaves; file pages that it can drop count as free."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in _control_groups("memory"):
        stats = dict(line.split() for line in _lines(f"{folder}/memory.stat"))
        droppable = int(stats.get("total_inactive_file", stats.get("inactive_file", 0)))
        for most, used in names:
            limit, taken = _lines(f"{folder}/{most}"), _lines(f"{folder}/{used}")
            if limit and taken and limit[0].isdigit():
                yield int(limit[0]) - int(taken[0]) + droppable


def _core_quotas() -> Iterator[float]:
    """The CPU quota of each control group, in cores; control groups without a quota are omitted."""
    for folder in _control_groups("cpu"):
        quota = " ".join(
            _lines(f"{folder}/cpu.max") or _lines(f"{folder}/cpu.cfs_quota_us") + _lines(f"{folder}/cpu.cfs_period_us")
        ).split()
        if len(quota) == 2 and quota[0].isdigit():
            yield int(quota[0]) / int(quota[1])
