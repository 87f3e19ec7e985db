"""Models on disk as transformers keeps them: `config.json` and safetensors, one file or several with an index.

Only data is read: no pickle, no code (`auto_map`, which points to code, is passed over), nothing outside the directory.
Tokenizer files are copied; for a byte model, which has none, export writes some. Config fields that do not change the
function go into the lineage, and export writes them back. No tensor is dropped silently: tensors that FusionTree
computes, or has under another name, must have the same values in the file.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusiontree.core.model import weights
from fusiontree.core.model.model import build
from fusiontree.core.model.spec import Lineage, ModelSpec
from fusiontree.data.tokenizer import ByteTokenizer
from fusiontree.data.tokenizer_files import tokenizer_files, write_byte_tokenizer
from fusiontree.errors import FusionTreeError, WeightsError
from fusiontree.zoo.carried import carried, carried_by
from fusiontree.zoo.families import family_of
from fusiontree.zoo.family import HEAD, Config, Family

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
OLD_TIES = ("tie_embedding",)
"""Other keys than `tie_word_embeddings` by which configs tie the head to the embedding."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def import_model(source: Path | str, target: Path | str, *, ignore: Iterable[str] = ()) -> ModelSpec:
    """Read a public model and write it as a FusionTree model; tensors keep their dtype.

    If the config ties the head to the embedding but the files hold another head, the head of the files is used, as in
    transformers 5. The lineage notes it.

    Args:
        ignore: unknown keys of the config to pass over; the lineage notes them.

    Raises:
        FusionTreeError: no such model, an unknown family, an option that is not expressed, or tensors that are
            missing, extra, of another shape, of a dtype that weights cannot have, or not finite. Nothing has been
            written.
    """
    source, ignore = Path(source), sorted(set(ignore))
    config = read_config(source)
    family = family_of(config.get("model_type")).in_files()
    family.spec_of(config, ignore=ignore)  # reports errors in the config before a large file is opened
    _refuse_adapters(source)
    with Tensors(source) as theirs:
        stored, notes = _as_stored(family, config, theirs, ignore)
        notes += [f"passing over the config's {key}" for key in ignore]
        notes += [f"without {part}* ({len(names)} tensors)" for part, names in family.left_out(theirs).items()]
        spec = family.spec_of(stored, ignore=ignore)
        ours = family.weights_of(stored, theirs, ignore=ignore)
        wanted = {name: tuple(tensor.shape) for name, tensor in build(spec, device="meta").state_dict().items()}
        weights.check_shapes(source, wanted, {name: tuple(tensor.shape) for name, tensor in ours.items()})
        _refuse_not_finite(source, ours)
        spec = spec.model_copy(update={"lineage": (*spec.lineage, _lineage(config, family, notes))})
        beside = tokenizer_files(source)
        weights.save_weights(spec, ours, target, beside=beside)
    for file in tokenizer_files(Path(target)):
        if file.name not in {each.name for each in beside}:
            file.unlink()  # of the model that was replaced
    return spec


def export_model(source: Path | str, target: Path | str, family: Family) -> None:
    """Read a FusionTree model and write it as a model of the family; tensors keep their dtype.

    Raises:
        FusionTreeError: the family cannot express the spec (names the node), or the target is not empty.
    """
    target = Path(target)
    model = weights.load(source)
    config = family.config_of(model.spec)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FusionTreeError(f"{target}: exists and is not an empty directory; choose a new one")
    tensors = family.in_files().weights_to(
        config, {name: tensor.detach() for name, tensor in model.state_dict().items()}
    )
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    config |= carried_by(model.spec)
    with weights.complete_directory(target) as new:
        text = json.dumps(_finite({**config, "dtype": dtype}), indent=2, allow_nan=False) + "\n"
        (new / CONFIG).write_text(text, encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / SINGLE, {"format": "pt"})
        _write_tokenizer(Path(source), model.spec, new)


def _write_tokenizer(source: Path, spec: ModelSpec, new: Path) -> None:
    """Copy the tokenizer files beside our weights. If there are none, write the files of a byte tokenizer for bytes."""
    found = tokenizer_files(source)
    for file in found:
        shutil.copyfile(file, new / file.name)
    if not found and spec.vocab_size == ByteTokenizer.vocab_size:
        write_byte_tokenizer(new)


def left_behind(source: Path) -> list[str]:
    """The names in a directory of transformers that are not read, sorted; names of directories end in `/`."""
    read = {CONFIG, SINGLE, INDEX, *(file.name for file in tokenizer_files(source))}
    if not (source / SINGLE).is_file() and (source / INDEX).is_file():
        read |= set(_json(source / INDEX, "").get("weight_map", {}).values())
    return sorted(f"{file.name}/" if file.is_dir() else file.name for file in source.iterdir() if file.name not in read)


def _refuse_adapters(source: Path) -> None:
    """Refuse adapters, because transformers applies them to the weights beside them without being asked."""
    if (source / ADAPTERS).is_file():
        text = "adapters beside the weights are not read; merge them (peft's merge_and_unload), or take them away"
        raise FusionTreeError(f"{source / ADAPTERS}: {text}")


def _as_stored(family: Family, config: Config, theirs: "Tensors", ignore: Iterable[str]) -> tuple[Config, list[str]]:
    """The config, untied if the files hold a head that differs from the embedding, and notes for the lineage. A family
    without an untied head keeps its config and refuses such a head later."""
    embedding = family.all_copies(config, ignore=ignore).get(HEAD)
    if embedding is None or not {HEAD, embedding} <= theirs.keys() or torch.equal(theirs[HEAD], theirs[embedding]):
        return config, []
    untied = {**config, **dict.fromkeys(("tie_word_embeddings", *(key for key in OLD_TIES if key in config)), False)}
    with suppress(FusionTreeError):
        family.spec_of(untied, ignore=ignore)
        return untied, ["with the head of its files, which its config ties to another embedding"]
    return config, []


def _refuse_not_finite(source: Path, ours: Mapping[str, Tensor]) -> None:
    """Refuse values that are not finite, because `load` would refuse the model."""
    for name, tensor in ours.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{source}: tensor {name!r} holds a value that is not finite")


def read_config(source: Path) -> dict[str, Any]:
    """The config of a directory.

    Raises:
        FusionTreeError: there is none, or it is not a JSON object.
    """
    return _json(source / CONFIG, f"{source}: not a model of transformers, it has no {CONFIG}")


class Tensors(Mapping[str, Tensor]):
    """The tensors of a directory by name, read on access. A context manager, because the files stay open."""

    def __init__(self, source: Path) -> None:
        self._source, self._open = source, ExitStack()
        self._files = {name: self._opened(source / name) for name in sorted(set(self._place().values()))}
        self._of: dict[str, Any] = {}
        for name, file in self._files.items():
            for key in file.keys():  # noqa: SIM118
                self._add(name, key, file)

    def _add(self, place: str, name: str, file: Any) -> None:
        kind = file.get_slice(name).get_dtype()
        if name in self._of:
            raise WeightsError(f"{self._source / place}: tensor {name!r} stands in another file too")
        if kind not in weights.DTYPES:
            text = f"allowed are {', '.join(weights.DTYPES)}; quantised weights have to be dequantised first"
            raise WeightsError(f"{self._source / place}: tensor {name!r} holds {kind}, {text}")
        self._of[name] = file

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _place(self) -> dict[str, str]:
        """The file of each tensor, from the index; for a single file, only its name under an empty key."""
        if (self._source / SINGLE).is_file():
            return {"": SINGLE}
        if not (self._source / INDEX).is_file():
            pickles = any(self._source.glob("*.bin")) and "; pickled weights (.bin) could run code and are not read"
            raise WeightsError(f"{self._source}: has neither {SINGLE} nor {INDEX}{pickles or ''}")
        found = _json(self._source / INDEX, "").get("weight_map")
        if not isinstance(found, dict) or not found:
            raise WeightsError(f"{self._source / INDEX}: has no weight_map")
        for tensor, file in found.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise WeightsError(
                    f"{self._source / INDEX}: {tensor!r}: expected a file in the directory, found {file!r}"
                )
        return found

    def _opened(self, path: Path) -> Any:
        try:
            return self._open.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: missing, truncated or not safetensors: {error}") from None


def _finite(value: Any) -> Any:
    """Replace infinity, which JSON cannot hold, by the object that transformers writes for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {"__float__": "Infinity"} if value == float("inf") else value


def _number(found: dict[str, Any]) -> Any:
    """The reverse of `_finite` for one JSON object."""
    return float("inf") if found == {"__float__": "Infinity"} else found


def _json(path: Path, absent: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except FileNotFoundError:
        raise FusionTreeError(absent) from None
    except (OSError, ValueError, RecursionError) as error:
        raise FusionTreeError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise FusionTreeError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _lineage(config: Config, family: Family, notes: list[str]) -> Lineage:
    text, edit = json.dumps(config, sort_keys=True), ", ".join([f"imported from {family.name}", *notes])
    parent = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Lineage.parse({"parent": parent, "edit": edit, "config": carried(config)})
