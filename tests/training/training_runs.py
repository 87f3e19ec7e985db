"""A tiny hybrid, a small corpus, and ways to start runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fusiontree.training import RunSpec, metrics

STEPS = 20
UNTIMED = ("tokens_per_second", "memory")
MODULE = "fusiontree.recipes.train"


def hybrid(gate: dict[str, Any]) -> dict[str, Any]:
    """Two gated layers of one head each; the second gate is one learned value."""
    branches = {
        "mamba": {"kind": "mamba2", "heads": 2, "head_dim": 8, "state": 4, "encodings": ["time"]},
        "attention": {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 8, "window": 8},
    }
    layers = [
        {"mixer": {"kind": "gated", "branches": branches, "gate": gate}, "ffn": {"kind": "swiglu", "hidden": 24}},
        {"mixer": {"kind": "gated", "branches": branches, "gate": {"kind": "softmax", "granularity": "layer"}}},
    ]
    encodings = {"time": {"kind": "srte_learned", "max_length": 64}}
    return {"vocab_size": 257, "width": 16, "encodings": encodings, "layers": layers}


def write_corpus(path: Path) -> Path:
    """Some 80 documents of a few words each, some of them empty."""
    pick = random.Random(0)
    words = ["tree", "of", "branches", "gate", "the", "state", "window", "and", "attention"]
    texts = [" ".join(pick.choices(words, k=pick.randrange(0, 24))) for _ in range(80)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run_data(corpus: Path) -> dict[str, Any]:
    """A run of 20 steps with every kind of objective, a checkpoint every 8 steps and a measurement every 10."""
    return {
        "model": hybrid({"kind": "sigmoid", "granularity": "channel", "rank": 4}),
        "data": {"source": {"kind": "jsonl", "train": str(corpus), "held_out_share": 0.2}, "length": 32},
        "training": {"steps": STEPS, "rows": 4, "threads": 1, "precision": "float32", "compile": False},
        "optimizer": {"learning_rate": 0.01, "warmup": 3},
        "objectives": {"balance": 0.1, "entropy": 0.05},
        "validation": {"every": 10, "rows": 3},
        "monitor": {"every": 3},
        "log": {"every": 1},
        "checkpoint": {"every": 8, "keep": 2},
    }


def write_run(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


def command(file: Path, *overrides: str, processes: int = 1) -> list[str]:
    """A training command; torchrun's where there are several processes."""
    start = ["-m", MODULE]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *start]
    return [sys.executable, *start, str(file), *overrides]


def start(arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """A process in a group of its own, so that all of it can be killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        return subprocess.Popen(
            arguments, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def wait_for_step(process: "subprocess.Popen[bytes]", directory: Path, step: int, log: Path) -> None:
    """Until a step is in the run's metrics."""
    path = directory / "metrics.jsonl"
    while not (path.exists() and any(record["step"] >= step for record in metrics.read(path))):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """kill -9, the whole group."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def records(directory: Path) -> list[dict[str, Any]]:
    """What a run recorded, without what depends on the clock."""
    return [{k: v for k, v in r.items() if k not in UNTIMED} for r in metrics.read(directory / "metrics.jsonl")]


def losses(directory: Path) -> torch.Tensor:
    """The training loss of every step, then every measurement."""
    found = metrics.read(directory / "metrics.jsonl")
    values = [r["loss"] for r in found if "loss" in r]
    return torch.tensor(values + [r["validation_loss"] for r in found if "validation_loss" in r], dtype=torch.float64)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whichever process wrote it (shards by their number)."""
    files = sorted(directory.glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def spec(data: dict[str, Any], output: Path, *overrides: str) -> RunSpec:
    return RunSpec.parse(data | {"output": str(output)}).override(overrides)


def kill_workers(process: "subprocess.Popen[bytes]") -> None:
    """kill -9 torchrun, then its processes, each of which leads a group of its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    kill(process)
    for child in children:
        os.kill(int(child), signal.SIGKILL)
