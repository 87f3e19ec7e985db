"""Results with the machine and the day that they belong to, in a folder for each class of processors.

`benchmarks/results/avx2/` is what processors with AVX2 and nothing better gave, `avx512_bf16/` those with that unit: a
newer result replaces one of its own class alone.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fusiontree.machine import UNITS, matrix_units, processor

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """What figures depend on besides the code."""
    units = ", ".join(matrix_units() or [])
    return {
        "processor": f"{processor()} ({units})",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
    }


def write(name: str, data: dict[str, Any]) -> None:
    """Replace this class of machines' results of that name."""
    folder = FOLDER / next(iter(matrix_units() or []), "other")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def classes() -> list[str]:
    """The classes of machines that there are results of, the fastest first."""
    order = [*UNITS, "other"]
    return sorted((path.name for path in FOLDER.iterdir() if path.is_dir()), key=order.index)


def read(units: str, prefix: str) -> list[dict[str, Any]]:
    """All results of a class of machines whose names start so."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / units).glob(f"{prefix}*.json"))]
