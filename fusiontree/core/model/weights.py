"""A model on disk: `spec.yaml` and `model.safetensors`, read strictly and written all or nothing."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fusiontree.core.model import memory
from fusiontree.core.model.formats import WEIGHTS, migrated
from fusiontree.core.model.model import LanguageModel, build
from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import WeightsError, suggest

SPEC_FILE = "spec.yaml"
WEIGHTS_FILE = "model.safetensors"
FORMAT_KEY = "weights"
"""Where in a file's metadata the number of its format stands."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored in, by the names that safetensors has for them."""


def save(model: nn.Module, directory: Path | str, *, beside: Iterable[Path | str] = ()) -> None:
    """Write a model. An existing model is replaced only after the new one is complete and was read back.

    Args:
        model: a `LanguageModel`, or one inside `torch.compile`, DistributedDataParallel or AveragedModel.
        beside: files to copy beside it, a tokenizer's say.

    Raises:
        WeightsError: no such model, one that is not what its spec says, the directory holds something else, two tensors
            share memory, a file to copy is none or has a name that is taken, or the disk is full (nothing is left
            behind).
    """
    found = _language_model(model)
    save_weights(found.spec, found.state_dict(), directory, beside=beside)


def _language_model(model: nn.Module) -> LanguageModel:
    """The model inside torch's wrappers."""
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    if isinstance(inner, nn.Module):
        return _language_model(inner)
    if not isinstance(model, LanguageModel):
        hint = "; save its `model`" if isinstance(getattr(model, "model", None), LanguageModel) else ""
        raise WeightsError(f"save: expected a LanguageModel, found {type(model).__name__}{hint}")
    return model


def save_weights(
    spec: ModelSpec, weights: Mapping[str, Tensor], directory: Path | str, *, beside: Iterable[Path | str] = ()
) -> None:
    """`save`, from a spec and its tensors."""
    target, files = Path(directory), _beside(beside)
    with complete_directory(target) as new:
        if not may_be_replaced(target):
            raise WeightsError(f"{target}: exists and is not a model of ours; choose a new directory")
        (new / SPEC_FILE).write_text(spec.to_yaml(), encoding="utf-8")
        save_file(_to_write(target, weights), new / WEIGHTS_FILE, metadata={"format": "pt", FORMAT_KEY: WEIGHTS})
        _order_metadata(new / WEIGHTS_FILE)
        for name, file in files.items():
            shutil.copyfile(file, new / name)
        _read_back(target, new)


def _order_metadata(path: Path) -> None:
    """Equal weights are equal files: safetensors writes several keys of metadata in no fixed order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _to_write(target: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor on the CPU, in memory of its own."""
    for name, tensor in weights.items():
        if tensor.is_meta or hasattr(tensor, "full_tensor"):
            why = "has no values here" if tensor.is_meta else "is spread over processes: gather it (`full_tensor`)"
            raise WeightsError(f"{target}: not saved: tensor {name!r} {why}")
    whole = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    _check_apart(whole)
    alone = {name: tensor.untyped_storage().nbytes() == tensor.nbytes for name, tensor in whole.items()}
    return {name: tensor.cpu() if alone[name] else tensor.cpu().clone() for name, tensor in whole.items()}


def _read_back(target: Path, new: Path) -> None:
    """Refuse to put what `load` would refuse in the target's place."""
    spec = ModelSpec.from_file(new / SPEC_FILE)
    try:
        with _opened(new / WEIGHTS_FILE) as file:
            check_shapes(target, _declared(spec), _shapes(file))
            for name in file.keys():  # noqa: SIM118
                _checked(target, name, file.get_tensor(name))
    except WeightsError as error:
        raise WeightsError(f"{error}; it was not saved") from None


def _check_apart(weights: Mapping[str, Tensor]) -> None:
    """Check that tensors share no memory: neither a file nor the spec could say that they do.

    Raises:
        WeightsError: two tensors share memory.
    """
    placed = [(str(t.device), t.data_ptr(), t.nbytes, name) for name, t in weights.items()]
    spans = sorted((device, start, start + size, name) for device, start, size, name in placed if start and size)
    for (here, _, end, one), (there, start, _, other) in pairwise(spans):
        if here == there and start < end:
            text = "share memory; the spec does not tie them, so that a model that is loaded would not either"
            raise WeightsError(f"weights: {one!r} and {other!r} {text}; give one of them a copy, or use a shared node")


def _beside(given: Any) -> dict[str, Path]:
    """Files to copy by their names."""
    files: dict[str, Path] = {}
    if isinstance(given, str | Path) or not isinstance(given, Iterable):
        raise WeightsError(f"beside: expected a list of files, found {given!r:.80}")
    for file in given:
        if not isinstance(file, str | Path) or not os.path.isfile(file):
            raise WeightsError(f"beside: expected the path of a file, found {file!r:.80}")
        name = Path(file).name
        if name in (SPEC_FILE, WEIGHTS_FILE, *files):
            raise WeightsError(f"beside: {file}: a file called {name} is written already")
        files[name] = Path(file)
    return files


def may_be_replaced(target: Path) -> bool:
    """Whether a model may be written there: where nothing is, over another model, or into an empty directory."""
    if not target.exists():
        return True
    names = {file.name for file in target.iterdir()} if target.is_dir() else {"a file"}
    return not names or {SPEC_FILE, WEIGHTS_FILE} <= names


@contextmanager
def complete_directory(target: Path) -> Generator[Path]:
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
    """Move the files of a directory into another. If one move fails, all replaced files are restored."""
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
    spec = ModelSpec.from_file(source / SPEC_FILE)
    target = memory.usable(device or "cpu")
    with _opened(source / WEIGHTS_FILE) as file:
        declared, found, number = _declared(spec), _shapes(file), _format(file)
        empty = {name: torch.empty(shape, device="meta") for name, shape in found.items()}
        try:
            shapes = {name: tuple(t.shape) for name, t in migrated(spec, empty, declared, number).items()}
        except WeightsError as error:
            raise WeightsError(f"{source / WEIGHTS_FILE}: {error}") from None
        check_shapes(source, declared, shapes)
        memory.check_room(_bytes(file, dtype), target)
        stored = {name: _checked(source, name, file.get_tensor(name)).to(target, dtype) for name in found}
        tensors = migrated(spec, stored, declared, number)
    model = build(spec, device="meta")
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(True).eval()


@contextmanager
def _opened(path: Path):  # noqa: ANN202
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: truncated or not safetensors: {error}") from None


def _declared(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a spec's model."""
    return {name: tuple(tensor.shape) for name, tensor in build(spec, device="meta").state_dict().items()}


def _format(file: Any) -> str:
    """The number of the format of a file's weights; files that other tools write have none."""
    return (file.metadata() or {}).get(FORMAT_KEY, "1")


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file; only the header is read."""
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


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
    """The bytes of a file's tensors, in `dtype` if given; reads only the header."""
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
