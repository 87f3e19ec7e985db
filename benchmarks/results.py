"""Results with the machine and the day that they belong to, in `benchmarks/results/`."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fusiontree.machine import matrix_units, processor

FOLDER = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """What figures depend on besides the code."""
    units = ", ".join(unit for unit in matrix_units() or [] if unit != "avx2")
    return {
        "processor": f"{processor()} ({units})",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
    }


def write(name: str, data: dict[str, Any]) -> None:
    """Replace the results of that name."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read(prefix: str) -> list[dict[str, Any]]:
    """All results whose names start so."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob(f"{prefix}*.json"))]
