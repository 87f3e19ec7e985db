"""What is here and what it means: versions, memory, and which kernel backend serves what and why not the others."""

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fusiontree
from fusiontree import machine
from fusiontree.core.contracts.registries import REGISTRIES
from fusiontree.errors import FusionTreeError
from fusiontree.kernels import OPS
from fusiontree.kernels.attention import AttentionRequest, StepRequest
from fusiontree.kernels.causal_conv1d import ConvRequest
from fusiontree.kernels.gated_delta import GatedDeltaRequest
from fusiontree.kernels.linear_recurrence import LinearRecurrenceRequest
from fusiontree.kernels.selective_scan import SelectiveScanRequest
from fusiontree.kernels.ssd import SSDRequest

PACKAGES = {
    "torchtitan": "training (fusiontree[train])",
    "tensorboard": "training curves (fusiontree[train])",
    "matplotlib": "figures (fusiontree[plot])",
    "lm_eval": "tasks of lm-evaluation-harness (fusiontree[eval])",
    "triton": "what compiled models, fla-core and mamba-ssm run on GPUs",
    "mamba-ssm": "ssd and selective_scan on GPUs",
    "fla-core": "ssd, causal_conv1d and attention on GPUs",
    "causal-conv1d": "causal_conv1d on GPUs",
    "flash-attn": "attention on GPUs",
    "flash-attn-3": "attention on GPUs (Hopper)",
    "flash-attn-4": "attention on GPUs (Hopper, Blackwell)",
    "xformers": "attention on GPUs",
}


def report() -> dict[str, Any]:
    """Everything, as plain data."""
    return {
        "versions": {
            "fusiontree": fusiontree.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "packages": {name: {"version": installed(name), "for": use} for name, use in PACKAGES.items()},
        "device": _device(),
        "compiler": machine.compiler(),
        "plugins": list(_plugins()),
        "kernels": list(_kernels()),
    }


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed; it is not imported to find out."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    device = torch.device(machine.device_type())
    return {
        "type": device.type,
        "name": machine.device_name(device),
        "processor": machine.processor(),
        "matrix_units": machine.matrix_units(),
        "native_products": [name for name in ("bfloat16", "float16") if machine.multiplies(getattr(torch, name))],
        "cores": machine.cores(),
        "threads": machine.threads(),
        "free_bytes": machine.free_bytes(device),
    }


def _plugins() -> Iterator[dict[str, str]]:
    """Kinds that installed packages offer, with what happens when each is loaded."""
    for family, registry in REGISTRIES.items():
        for kind, point in registry.plugins.items():
            try:
                registry.get(kind)
                state = "loads"
            except FusionTreeError as error:
                state = str(error)
            yield {"family": family, "kind": kind, "from": point.value, "state": state}


def _kernels() -> Iterator[dict[str, Any]]:
    for label, op, request in _requests(machine.device_type()):
        choices = OPS[op].explain(request)
        picked = next((choice.backend for choice in choices if choice.picked), None)
        refused = {choice.backend: choice.refusal or "slower here" for choice in choices if not choice.picked}
        yield {"op": op, "request": label, "picked": picked, "others": refused}


def _requests(device: str) -> Iterator[tuple[str, str, Any]]:
    """What training, packed training and decoding ask of each operator."""
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    scan = SSDRequest(device, kind, segments=False, gradients=True, even=True)
    yield "training", "ssd", scan
    yield "packed documents", "ssd", scan._replace(segments=True)
    selective = SelectiveScanRequest(device, kind, segments=False, state=16)
    yield "training", "selective_scan", selective
    yield "packed documents", "selective_scan", selective._replace(segments=True)
    delta = GatedDeltaRequest(device, kind, segments=False)
    yield "training", "gated_delta", delta
    yield "packed documents", "gated_delta", delta._replace(segments=True)
    linear = LinearRecurrenceRequest(device, kind, segments=False)
    yield "training", "linear_recurrence", linear
    yield "packed documents", "linear_recurrence", linear._replace(segments=True)
    conv = ConvRequest(device, kind, segments=False, taps=4, eights=True)
    yield "training", "causal_conv1d", conv
    yield "packed documents", "causal_conv1d", conv._replace(segments=True)
    plain = AttentionRequest(
        device,
        kind,
        windowed=False,
        softcap=False,
        segments=False,
        past=False,
        prefix=False,
        head_dim=64,
        value_dim=64,
        gradients=True,
    )
    yield "training, global", "attention", plain
    yield "training, windowed", "attention", plain._replace(windowed=True)
    yield "packed documents, windowed", "attention", plain._replace(windowed=True, segments=True)
    yield "prefill in chunks", "attention", plain._replace(windowed=True, past=True, gradients=False)
    yield "decoding", "attention_step", StepRequest(device, kind, softcap=False, equal_widths=True)
