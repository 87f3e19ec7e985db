"""YAML 1.2 in and out (through ruamel.yaml): no duplicate keys, no bombs, nothing that runs code.

JSON is YAML, so files of either kind are read here.
"""

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from fusiontree.errors import SpecError

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_NODES = 100_000
LINE = 100


def read(text: str) -> Any:
    """The plain data in a YAML document.

    Raises:
        SpecError: not YAML, a key twice, or larger, deeper or (aliases followed) longer than a spec can be.
    """
    if len(text) > MAX_BYTES:
        raise SpecError(f"YAML: {len(text)} characters, at most {MAX_BYTES} are allowed")
    try:
        data = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        raise SpecError(f"YAML: {_problem(error)}") from None
    except (YAMLError, RecursionError, ValueError) as error:
        raise SpecError(f"YAML: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    _count(data, 0, {}, ())
    return data


def read_file(path: Path) -> Any:
    """The plain data in a YAML file; errors begin with its name."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SpecError(f"{path}: {size} bytes, at most {MAX_BYTES} are allowed")
        return read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not UTF-8 text") from None
    except SpecError as error:
        raise SpecError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _problem(error: MarkedYAMLError) -> str:
    mark = error.problem_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + " ".join(str(error.problem or error.context or "cannot be read").split())


def _count(data: Any, depth: int, known: dict[int, int], above: tuple[int, ...]) -> int:
    """The nodes of a document with every alias followed, each shared part counted but once walked."""
    if depth > MAX_DEPTH or id(data) in above:
        raise SpecError(f"YAML: nested deeper than {MAX_DEPTH}")
    if not isinstance(data, dict | list):
        return 1
    if id(data) not in known:
        inside = data.values() if isinstance(data, dict) else data
        known[id(data)] = 1 + sum(_count(item, depth + 1, known, (*above, id(data))) for item in inside)
    if known[id(data)] > MAX_NODES:
        raise SpecError(f"YAML: more than {MAX_NODES} nodes once aliases are followed")
    return known[id(data)]


def write(data: Mapping[str, Any]) -> str:
    """A YAML document: block style, small mappings and lists on one line."""
    writer = YAML()
    writer.width = LINE
    writer.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    writer.dump(_styled(data, top=True), stream)
    return stream.getvalue()


def _styled(data: Any, *, top: bool = False) -> Any:
    if isinstance(data, Mapping):
        styled: Any = CommentedMap((key, _styled(value)) for key, value in data.items())
    elif isinstance(data, Sequence) and not isinstance(data, str):
        styled = CommentedSeq(_styled(value) for value in data)
    else:
        return data
    if not top and len(repr(data)) < LINE - 20 and _is_small(data):
        styled.fa.set_flow_style()
    return styled


def _is_small(data: Any) -> bool:
    """Whether there are at most two levels and nothing that is a list of mappings."""
    inside = list(data.values()) if isinstance(data, Mapping) else list(data)
    return not any(isinstance(item, Mapping) for item in inside)


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """What `path=value` arguments say, the values read as YAML.

    >>> assignments(["training.steps=20", "layers.*.mixer.gate.granularity=token"])
    {'training.steps': 20, 'layers.*.mixer.gate.granularity': 'token'}

    Raises:
        SpecError: an argument without "=", or a value that is not YAML.
    """
    pairs = [text.partition("=") for text in texts]
    for path, sign, _ in pairs:
        if not path or not sign:
            raise SpecError(f"{path or '='}: an override is path=value")
    return {path: read(value) for path, _, value in pairs}
