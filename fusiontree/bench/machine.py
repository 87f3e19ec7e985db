"""What computes here: the processor and its matrix units."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
"""What bfloat16 and float32 products are fast with, the fastest first."""


def processor() -> str:
    """What the system calls the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def matrix_units() -> list[str] | None:
    """Which of `UNITS` the processor has; None where the system does not tell."""
    flags = _cpuinfo().get("flags")
    return None if flags is None else [unit for unit in UNITS if unit in flags.split()]


def device_name(device: torch.device) -> str:
    """What the system calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def about(device: torch.device) -> dict[str, Any]:
    """What figures depend on, as plain data."""
    return {
        "device": device_name(device),
        "matrix_units": matrix_units(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": load(),
        "torch": torch.__version__,
    }


def load() -> float | None:
    """How many threads wanted to run in the last minute, on average; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpuinfo() -> dict[str, str]:
    """The fields that Linux gives for one core; elsewhere none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    fields = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in fields}
