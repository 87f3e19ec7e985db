"""Fields of the old kind that remain when an edit changes only the `kind` of a part."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from fusiontree.core.spec import paths
from fusiontree.core.spec.base import located
from fusiontree.errors import FEW

Problem = tuple[tuple[str, ...], str]


def removes(pattern: str, edits: Mapping[str, Any]) -> bool:
    """Whether an edit removes a field: its value is null, and the same call edits the `kind` of the part."""
    above, _, last = pattern.rpartition(".")
    return edits[pattern] is None and last != "kind" and f"{above}.kind" in edits


def explain(error: ValidationError, edits: Mapping[str, Any], data: Any) -> list[str]:
    """Problems of edited data, one line each; a part with fields that its new kind lacks gets one line in all."""
    kinds = [pattern.removesuffix(".kind") for pattern in edits if pattern.endswith(".kind")]
    edited = {place: part for part in kinds for place in paths.matches(data, part)}
    found: dict[str | None, list[Problem]] = {}
    for place, text in located(error):
        part = next((edited[place[:depth]] for depth in range(len(place), 0, -1) if place[:depth] in edited), None)
        found.setdefault(part, []).append((place, text))
    return [line for part, faults in found.items() for line in _lines(part, faults, edits)]


def _lines(part: str | None, faults: list[Problem], edits: Mapping[str, Any]) -> list[str]:
    depth = -1 if part is None else len(paths.split(part))
    kept = [text.startswith("unknown key") and len(place) == depth + 1 for place, text in faults]
    if part is None or not any(kept):
        return [f"{'.'.join(place)}: {text}" for place, text in faults]
    names = list(dict.fromkeys(place[-1] for (place, _), stays in zip(faults, kept, strict=True) if stays))
    kind, some = edits[f"{part}.kind"], names[:FEW]
    listed = ", ".join(some) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
    whole = f"replace the whole part ({part}={{kind: {kind}, ...}})"
    removals = " ".join(f"{part}.{name}=null" for name in names)
    way = f"take away what stays in the same call ({removals}), or {whole}" if all(kept) and names == some else whole
    return [f"{part}.kind: the fields of the old kind stay, and {kind!r} has no {listed}; {way}"]
