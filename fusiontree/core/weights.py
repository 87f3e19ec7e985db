"""A model on disk: `spec.yaml` and `model.safetensors`, read strictly and written all or nothing."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusiontree.core import memory
from fusiontree.core.model import LanguageModel, build
from fusiontree.core.model_spec import ModelSpec
from fusiontree.errors import WeightsError, suggest

SPEC_FILE = "spec.yaml"
WEIGHTS_FILE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored in, by the names that safetensors has for them."""


def save(model: LanguageModel, directory: Path | str, *, beside: Iterable[Path] = ()) -> None:
    """Write a model; an existing one there is replaced only when the new one is complete.

    Args:
        beside: files to copy beside it, a tokenizer's say.

    Raises:
        WeightsError: the directory holds something else, or the disk is full (nothing is left behind).
    """
    save_weights(model.spec, model.state_dict(), directory, beside=beside)


def save_weights(
    spec: ModelSpec, weights: Mapping[str, Tensor], directory: Path | str, *, beside: Iterable[Path] = ()
) -> None:
    """`save`, from a spec and its tensors."""
    target = Path(directory)
    with complete_directory(target) as new:
        if not may_be_replaced(target):
            raise WeightsError(f"{target}: exists and is not a model of ours; choose a new directory")
        (new / SPEC_FILE).write_text(spec.to_yaml(), encoding="utf-8")
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()}
        # one key, because several are written in no fixed order, and equal weights should be equal files
        save_file(tensors, new / WEIGHTS_FILE, metadata={"format": "pt"})
        for file in beside:
            shutil.copyfile(file, new / file.name)


def may_be_replaced(target: Path) -> bool:
    """Whether a model may be written there: where nothing is, over another model, or into an empty directory."""
    if not target.exists():
        return True
    names = {file.name for file in target.iterdir()} if target.is_dir() else {"a file"}
    return not names or {SPEC_FILE, WEIGHTS_FILE} <= names


@contextmanager
def complete_directory(target: Path) -> Iterator[Path]:
    """A directory to write into that takes its place, or replaces the files there, when the block ends well.

    Raises:
        WeightsError: writing failed; the target is as it was.
    """
    new: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        yield new
        if target.exists():
            _exchange(new, target)
        else:
            new.chmod(0o755)
            os.replace(new, target)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{target}: cannot be written: {error}") from None
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _exchange(new: Path, target: Path) -> None:
    """Move the files of a directory into another; if one cannot be, all that were there before are put back."""
    with ExitStack() as undo:
        for file in list(new.iterdir()):
            place, aside = target / file.name, new / f"{file.name}.old"
            if place.exists():
                os.replace(place, aside)
                undo.callback(os.replace, aside, place)
            else:
                undo.callback(place.unlink, missing_ok=True)
            os.replace(file, place)
        undo.pop_all()


def load(
    directory: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Read a model, in evaluation mode: call `train()` to go on training.

    Raises:
        FusionTreeError: there is no such device here.
        SpecError: the spec is not valid.
        WeightsError: not a model of ours, a truncated file, a tensor missing, extra, of another shape or not
            finite, or weights larger than the device's free memory.
    """
    source = Path(directory)
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if not (source / name).is_file():
            hint = f"; did you mean {source / 'model'}?" if (source / "model" / name).is_file() else ""
            raise WeightsError(f"{source}: not a model of ours, it has no {name}{hint}")
    model = build(ModelSpec.from_file(source / SPEC_FILE), device="meta")
    target = memory.usable(device or "cpu")
    with _opened(source / WEIGHTS_FILE) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_shapes(source, {n: tuple(p.shape) for n, p in model.state_dict().items()}, shapes)
        memory.check_room(_bytes(file, dtype), target)
        tensors = {name: _checked(source, name, file.get_tensor(name)).to(target, dtype) for name in shapes}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(True).eval()


@contextmanager
def _opened(path: Path):  # noqa: ANN202
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: truncated or not safetensors: {error}") from None


def check_shapes(source: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the shapes of tensors by name.

    Raises:
        WeightsError: one is missing, extra, or has another shape.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise WeightsError(f"{source}: tensor {name!r} is missing")
        if found[name] != shape:
            raise WeightsError(f"{source}: tensor {name!r} has the shape {found[name]}, the spec says {shape}")
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise WeightsError(f"{source}: tensor {extra[0]!r} is not in the spec{suggest(extra[0], wanted):.200}")


def _bytes(file: Any, dtype: torch.dtype | None) -> int:
    """What the tensors of a file take, in another type if one is given; only the header is read."""
    parts = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
    return sum(
        math.prod(part.get_shape()) * (dtype or DTYPES.get(part.get_dtype(), torch.uint8)).itemsize for part in parts
    )


def _checked(source: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES.values():
        found = str(tensor.dtype).removeprefix("torch.")
        raise WeightsError(f"{source}: tensor {name!r} holds {found}, allowed are {', '.join(DTYPES)}")
    if not bool(torch.isfinite(tensor).all()):
        raise WeightsError(f"{source}: tensor {name!r} holds a value that is not finite")
    return tensor
