"""YAML 1.2 in and out: what values mean, what is refused, and before how much work."""

from pathlib import Path
from typing import Any

import pytest
from core_cases import complaint, spec
from ruamel.yaml.scanner import Scanner

from fusiontree import ModelSpec, load_spec
from fusiontree.core.spec import yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("y", "y"),
        ("True", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("010", 10),
        ("0o10", 8),
        ("0x1f", 31),
        ("12:30:45", "12:30:45"),
        ("2020-01-01", "2020-01-01"),
        ("2020-13-45", "2020-13-45"),
        ("'1'", "1"),
        ("1.5", 1.5),
        ("{a: [1, {b: no}]}", {"a": [1, {"b": "no"}]}),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = yaml.read(f"x: {text}")["x"]
    assert found == value
    assert type(found) is type(value)


def test_json_is_yaml() -> None:
    assert yaml.read('{"a": [1, 2.5, null, true, "no"], "b": {}}') == {"a": [1, 2.5, None, True, "no"], "b": {}}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: 2\na: 3", ["line 3", '"a"']),
        ("x: {a: 1, a: 2}", ["line 1", '"a"']),
        ('{"a": 1, "a": 2}', ['"a"']),
        ("a: [1", ["line 1"]),
        ("a: 1\n---\nb: 2", ["document"]),
        ("a: *x", ["'x'"]),
        ("\ta: 1", ["line 1"]),
        ("a: \x00", ["ReaderError"]),
        ("a: " + "9" * 5000, ["digits"]),
        ("a: !!int x", ["'x'"]),
        ("a: !!bool x", ["'x'"]),
        ("a: !!int ''", []),
    ],
)
def test_what_is_not_yaml_is_named(text: str, parts: list[str]) -> None:
    complaint(lambda: yaml.read(text), "YAML: ", *parts)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!mine", "!!binary", "!!set"]
)
def test_tags_other_than_those_of_plain_data_are_refused(tag: str) -> None:
    complaint(lambda: yaml.read(f"a: 1\nb: {tag} [x]"), "line 2", tag, "plain data")


def laughs(rows: int, start: str, row: str) -> str:
    return start + "".join(row.format(i=i, below=", ".join([f"*a{i - 1}"] * 10)) for i in range(1, rows))


BOMBS = {
    "characters": ("a: " + "x" * yaml.MAX_BYTES, [str(yaml.MAX_BYTES)]),
    "levels": ("[" * 100 + "]" * 100, [str(yaml.MAX_DEPTH)]),
    "a great many levels": ("[" * 500_000, [str(yaml.MAX_DEPTH)]),
    "levels of mappings": ("{a: " * 200_000, [str(yaml.MAX_DEPTH)]),
    "levels of blocks": ("- " * 400_000, [str(yaml.MAX_DEPTH)]),
    "levels of keys": ("? " * 400_000, [str(yaml.MAX_DEPTH)]),
    "levels behind quotes and comments": ('a: "]]]" # [\nb: ' + "[" * 400_000, [str(yaml.MAX_DEPTH)]),
    "an alias inside itself": ("a: &a [1, *a]", [str(yaml.MAX_DEPTH)]),
    "the whole inside itself": ("&a {b: {c: *a}}", [str(yaml.MAX_DEPTH)]),
    "levels by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
        [str(yaml.MAX_DEPTH)],
    ),
    "lists by aliases": (laughs(12, "a0: &a0 [x, y]\n", "a{i}: &a{i} [{below}]\n"), [str(yaml.MAX_NODES)]),
    "mappings by merge keys": (
        laughs(12, "a0: &a0 {x: 1}\n", "a{i}: &a{i} {{<<: [{below}]}}\n"),
        [str(yaml.MAX_NODES)],
    ),
    "keys by aliases": (laughs(12, "a0: &a0 [x, y]\n", "a{i}: &a{i} {{? [{below}] : 1}}\n"), []),
}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An entry for each time that the scanner has looked for more."""
    found: list[object] = []
    fetch = Scanner.fetch_more_tokens
    monkeypatch.setattr(Scanner, "fetch_more_tokens", lambda scanner: (found.append(1), fetch(scanner))[1])
    return found


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_much_of_them_is_read(name: str, fetched: list[object]) -> None:
    """Of a deep document no more than what one key may be long beyond the deepest level."""
    text, parts = BOMBS[name]
    complaint(lambda: yaml.read(text), "YAML: ", *parts)
    assert len(fetched) < 5_000


def test_of_a_long_document_no_more_is_read_than_allowed(
    monkeypatch: pytest.MonkeyPatch, fetched: list[object]
) -> None:
    monkeypatch.setattr(yaml, "MAX_NODES", 100)
    complaint(lambda: yaml.read("[" + "a," * 100_000), "YAML: more than 100 nodes")
    assert len(fetched) < 5_000


def test_brackets_that_open_nothing_are_no_levels() -> None:
    brackets = "[" * 200
    text = f"# {brackets}\na: '{brackets}'\nb: \"{brackets}\\n\"\nc: |\n  {brackets}\nd: x{brackets} # {brackets}\n"
    found = yaml.read(text)
    assert found == {"a": brackets, "b": f"{brackets}\n", "c": f"{brackets}\n", "d": f"x{brackets}"}


def test_what_is_as_deep_and_as_shared_as_allowed_is_read() -> None:
    depth = yaml.MAX_DEPTH
    assert yaml.read("[" * depth + "]" * depth)
    assert yaml.read("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1},
        "b": [{"x": 1}, {"x": 1}],
        "c": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize(
    "value",
    [
        "no",
        "1e-3",
        "2020-01-01",
        "~",
        "null",
        "",
        " x",
        "a: b",
        "#",
        "é",
        "two\nlines",
        1e-3,
        1e300,
        -0.0,
        5e-324,
        3,
        True,
        None,
        [],
        {},
    ],
)
def test_what_is_written_reads_back(value: Any) -> None:
    whole = {"a": value, "b": [value, {"c": value}], "d": {"e": {"f": [value]}}}
    found = yaml.read(yaml.write(whole))
    assert found == whole
    assert type(found["a"]) is type(value)
    assert repr(found) == repr(whole)


class TestFiles:
    def test_a_spec_by_its_path(self, tmp_path: Path) -> None:
        file = tmp_path / "one.yaml"
        file.write_text(spec().to_yaml(), encoding="utf-8")
        assert load_spec(file) == spec()

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            (b"widht: 3", ["widht", "'width'"]),
            (b"\xff\xfe\x00", ["UTF-8"]),
            (b"a: [", ["line 1"]),
            (b"a: " + b"x" * yaml.MAX_BYTES, [str(yaml.MAX_BYTES)]),
            (b"", ["mapping|dictionary"]),
        ],
    )
    def test_errors_begin_with_the_file(self, tmp_path: Path, content: bytes, parts: list[str]) -> None:
        file = tmp_path / "one.yaml"
        file.write_bytes(content)
        text = complaint(lambda: ModelSpec.from_file(file), *(part for part in parts if "|" not in part))
        assert text.startswith(f"{file}: ")
        assert text.count(str(file)) == 1

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        complaint(lambda: load_spec(tmp_path / "none.yaml"), str(tmp_path / "none.yaml"), "No such file")

    def test_neither_a_file_nor_a_preset(self) -> None:
        complaint(lambda: load_spec("quickstrt"), "quickstrt", "'quickstart'", "known: ")


class TestAssignments:
    def test_values_are_yaml(self) -> None:
        found = yaml.assignments(["a.b=1e-3", "c=no", "d=[1, 2]", "e=x=y", "f="])
        assert found == {"a.b": 0.001, "c": "no", "d": [1, 2], "e": "x=y", "f": None}

    @pytest.mark.parametrize(
        ("text", "parts"), [("a.b", ["a.b", "path=value"]), ("=3", ["path=value"]), ("a.b=[1", ["a.b: "])]
    )
    def test_errors_name_the_path(self, text: str, parts: list[str]) -> None:
        complaint(lambda: yaml.assignments([text]), *parts)
        complaint(lambda: yaml.assignments(text), *parts)
