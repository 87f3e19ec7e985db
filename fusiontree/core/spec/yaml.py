"""Read and write YAML 1.2 (with ruamel.yaml): no duplicate keys, no alias bombs, no tags that run code.

JSON is YAML, so JSON files can be read too.
"""

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from fusiontree.errors import SpecError

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_NODES = 100_000
LINE = 100


def read(text: str) -> Any:
    """The plain data in a YAML document.

    Raises:
        SpecError: not YAML, a duplicate key, a custom tag, or over a limit on size, depth or nodes (aliases followed).
    """
    if len(text) > MAX_BYTES:
        raise SpecError(f"YAML: {len(text)} characters, at most {MAX_BYTES} are allowed")
    try:
        return _reader().load(text)
    except SpecError:
        raise
    except MarkedYAMLError as error:
        raise SpecError(f"YAML: {_problem(error)}") from None
    except (YAMLError, RecursionError, ValueError, LookupError) as error:
        raise SpecError(f"YAML: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def read_file(path: Path) -> Any:
    """The plain data in a YAML file; errors begin with the name of the file."""
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


class _Composer(Composer):
    """Counts nodes and levels while it composes a document, and stops at the limits."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.nodes = self.levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise SpecError(f"YAML: more than {MAX_NODES} nodes")
        if self.levels > MAX_DEPTH:
            raise SpecError(f"YAML: nested deeper than {MAX_DEPTH}")
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


class _Constructor(SafeConstructor):
    """Checks the whole document, merge keys included, before it builds any object. Dates stay text, as in YAML 1.2."""

    def construct_document(self, node: Node) -> Any:
        _measure(node, {}, ())
        return super().construct_document(node)


_TAG = "tag:yaml.org,2002:"
_TAGS = {f"{_TAG}{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "timestamp")}
_Constructor.add_constructor(f"{_TAG}timestamp", SafeConstructor.construct_yaml_str)


def _reader() -> YAML:
    reader = YAML(typ="safe", pure=True)
    reader.Composer = _Composer
    reader.Constructor = _Constructor
    return reader


def _measure(node: Node, known: dict[int, tuple[int, int]], above: tuple[int, ...]) -> tuple[int, int]:
    """The nodes and levels of a document, with aliases followed. A shared part counts every time; it is walked once."""
    if node.tag not in _TAGS:
        found = f"the tag {node.tag.replace(_TAG, '!!')!r}"
        raise SpecError(f"YAML: line {node.start_mark.line + 1}: {found} is not plain data")
    if id(node) in above or len(above) > MAX_DEPTH:
        raise SpecError(f"YAML: nested deeper than {MAX_DEPTH}")
    if isinstance(node, ScalarNode):
        return 1, 0
    if id(node) not in known:
        inside = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
        sizes = [_measure(part, known, (*above, id(node))) for part in inside]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
    size, levels = known[id(node)]
    if size > MAX_NODES:
        raise SpecError(f"YAML: more than {MAX_NODES} nodes once aliases are followed")
    if len(above) + levels > MAX_DEPTH:
        raise SpecError(f"YAML: nested deeper than {MAX_DEPTH}")
    return size, levels


def write(data: Mapping[str, Any]) -> str:
    """A YAML document: block style, small mappings and lists on one line."""
    writer = YAML()
    writer.width = LINE
    writer.representer.add_representer(type(None), _null)
    writer.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    writer.dump(_styled(data, top=True), stream)
    return stream.getvalue()


def _null(representer: Any, value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


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
    """Whether no value directly inside is a mapping."""
    inside = list(data.values()) if isinstance(data, Mapping) else list(data)
    return not any(isinstance(item, Mapping) for item in inside)


def assignments(texts: Iterable[str] | str) -> dict[str, Any]:
    """Parses one or more `path=value` arguments; values are YAML.

    >>> assignments(["training.steps=20", "layers.*.mixer.gate.granularity=token"])
    {'training.steps': 20, 'layers.*.mixer.gate.granularity': 'token'}

    Raises:
        SpecError: an argument without "=", or a value that is not YAML.
    """
    pairs = [text.partition("=") for text in ([texts] if isinstance(texts, str) else texts)]
    for path, sign, _ in pairs:
        if not path.strip() or not sign:
            raise SpecError(f"{path + sign!r}: an override is path=value")
    return {path.strip(): _value(path, value) for path, _, value in pairs}


def _value(path: str, text: str) -> Any:
    try:
        return read(text)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
