"""Report of the installation: versions, memory, the kernel backend of each request, and why others are refused."""

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
from fusiontree.kernels.common.cases import Case

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
    """The whole report, as plain data."""
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
    """The version of a package; None if it is not installed. The package is not imported."""
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
    """Kinds that installed packages offer, each with the result of loading it."""
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
    """The requests of training, packed training, prefill in chunks and decoding to each operator."""
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    for op in OPS.values():
        for name, case in op.cases.items():
            request = case.inputs(64, kind, "meta").request._replace(device=device)
            yield from ((label, op.name, one) for label, one in _uses(name.removeprefix(op.name), case, request))


def _uses(detail: str, case: Case, request: Any) -> Iterator[tuple[str, Any]]:
    """Requests with their users. Cases with segments are skipped: they equal the plain case with segments added."""
    if not case.learns:
        yield "decoding", request
    elif not request.segments:
        training = request._replace(**{field: True for field in ("gradients",) if field in request._fields})
        yield f"training{detail}", training
        yield f"packed documents{detail}", training._replace(segments=True)
        if "past" in request._fields:
            yield f"prefill in chunks{detail}", request._replace(past=True)
