"""Paths into plain data, such as `layers.3.mixer.branches.mamba`; in patterns `*` matches any one step."""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fusiontree.errors import SpecError

Steps = tuple[str, ...]


def split(path: str) -> Steps:
    """The steps of a dotted path."""
    return tuple(path.split(".")) if path else ()


def steps(data: Any) -> Iterator[tuple[str, Any]]:
    """The values directly inside: the items of a mapping, or of a list by index."""
    if isinstance(data, Mapping):
        yield from ((str(key), value) for key, value in data.items())
    elif isinstance(data, Sequence) and not isinstance(data, str):
        yield from ((str(index), value) for index, value in enumerate(data))


def walk(data: Any, prefix: Steps = ()) -> Iterator[tuple[Steps, Any]]:
    """Yields (path, value) of every value inside, outermost first."""
    for step, value in steps(data):
        yield (*prefix, step), value
        yield from walk(value, (*prefix, step))


def leaves(data: Any) -> dict[str, Any]:
    """The values with nothing inside (scalars, empty mappings and lists), by path."""
    return {".".join(path): value for path, value in walk(data) if not any(True for _ in steps(value))}


def find(data: Any, pattern: str) -> list[Steps]:
    """The paths that match a pattern.

    Raises:
        SpecError: nothing matches; the text has the nearest path that exists.
    """
    found = matches(data, pattern)
    if not found:
        raise SpecError(f"{pattern or repr(pattern)}: matches nothing{_nearest(data, pattern)}")
    return found


def matches(data: Any, pattern: str) -> list[Steps]:
    """The places that a pattern matches; an empty list if nothing matches."""
    return list(_followed(data, split(pattern), ())) if pattern else []


def _followed(data: Any, pattern: Steps, prefix: Steps) -> Iterator[Steps]:
    if not pattern:
        yield prefix
        return
    for step, value in steps(data):
        if pattern[0] in (step, "*"):
            yield from _followed(value, pattern[1:], (*prefix, step))


def _nearest(data: Any, pattern: str) -> str:
    """The hint for a pattern without a match: the nearest names, or the known ones."""
    places, done = [data], []
    for step in split(pattern):
        names = list(dict.fromkeys(name for place in places for name, _ in steps(place)))
        if step not in names and (step != "*" or not names):
            near = get_close_matches(step, names, n=1)
            if not near:
                return _allowed(".".join(done), names, places)
            step = near[0]
        places = [value for place in places for name, value in steps(place) if step in (name, "*")]
        done.append(step)
    return f"; the nearest is {'.'.join(done)!r}" if done else ""


def _allowed(above: str, names: Sequence[str], places: Sequence[Any]) -> str:
    """The end of an error: the names at the last place that the pattern reaches; list indices as a range."""
    where = f"in {above!r}" if above else "here"
    if not names:
        return f"; {above or 'it'} is {json.dumps(places[0])}, which holds nothing further; give it as a whole"
    indices = len(names) > 1 and names[-1] == str(len(names) - 1)
    listed = f"0 to {names[-1]}" if indices else ", ".join(names)
    return f"; known {where}: {listed}"


def get(data: Any, path: Steps) -> Any:
    """The value at a path that exists."""
    for step in path:
        data = data[int(step)] if isinstance(data, Sequence) else data[step]
    return data


def put(data: Any, path: Steps, value: Any) -> None:
    """Set the value at a path, in place; all steps before the last must exist."""
    inside = get(data, path[:-1])
    inside[int(path[-1]) if isinstance(inside, list) else path[-1]] = value
