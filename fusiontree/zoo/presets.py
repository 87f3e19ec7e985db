"""Specs by name: those that come with the library, and files."""

import os
from importlib.resources import files
from pathlib import Path

from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.spec import yaml
from fusiontree.errors import SpecError, suggest


def _directory() -> Path:
    return Path(str(files("fusiontree.zoo") / "specs"))


def presets() -> list[str]:
    """The names that `load_spec` knows, sorted."""
    return sorted(path.stem for path in _directory().glob("*.yaml"))


def named(what: str, name_or_path: str | Path) -> Path:
    """A name as a path.

    Raises:
        SpecError: the name is empty, which as a path would be the working directory.
    """
    if not str(name_or_path).strip():
        raise SpecError(f"expected the name of a {what}, found {str(name_or_path)!r}")
    return Path(name_or_path)


def load_spec(name_or_path: str | Path) -> ModelSpec:
    """A preset by its name, or the spec in a YAML or JSON file, or in a saved model's directory.

    Raises:
        SpecError: neither a preset nor a file, or not a valid spec.
    """
    path = named("preset or file", name_or_path)
    if os.path.isfile(path / "spec.yaml"):  # Path.is_file raises where a name is too long
        return ModelSpec.from_file(path / "spec.yaml")
    if path.suffix in (".yaml", ".yml", ".json") or os.path.isfile(path):
        return ModelSpec.from_file(path)
    if str(name_or_path) not in presets():
        inside = path / "model"
        hint = f"; did you mean {inside}?" if os.path.isfile(inside / "spec.yaml") else ""
        known = hint or suggest(str(name_or_path), presets())
        raise SpecError(f"{name_or_path}: neither a file nor a preset{known}")
    return ModelSpec.parse(yaml.read_file(_directory() / f"{name_or_path}.yaml"))
