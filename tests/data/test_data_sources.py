"""Sources: which documents they give, to which split, and what they say of bad input."""

import gzip
import json
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data import ByteTokenizer, DataError, DataSpec, JsonLines, StandardLibrary, sources, split_of
from fusiontree.data.contents import Contents
from fusiontree.errors import SpecError


def names(source: StandardLibrary | JsonLines, split: str) -> list[str]:
    return [document.name for document in source.documents("train" if split == "train" else "held_out")]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "os.py": b"import sys\n",
        "email/header.py": b"caf\xe9 \xff",
        "email/test/test_header.py": b"no",
        "idlelib/idle_test/test_run.py": b"no",
        "lib2to3/tests/data/bom.py": b"no",
        "site-packages/torch/nn.py": b"no",
        "pydoc_data/topics.py": b"no",
        "readme.txt": b"no",
        "contest.py": b"",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    return tmp_path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"id": n, "text": f"text {n} \u00e9"}) + "\n" for n in range(200)))
    return path


def test_the_library_gives_its_own_sources_as_they_are(library: Path) -> None:
    documents = list(StandardLibrary(held_out_share=0.0).documents("train"))
    assert [(document.name, document.text) for document in documents] == [
        ("contest.py", b""),
        ("email/header.py", b"caf\xe9 \xff"),
        ("os.py", b"import sys\n"),
    ]


def test_the_real_library_splits_into_two() -> None:
    train, held_out = (names(StandardLibrary(), split) for split in ("train", "held_out"))
    assert not set(train) & set(held_out)
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= {*train, *held_out}
    assert train == sorted(train) and held_out == sorted(held_out)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1
    assert not [name for name in train + held_out if "test" in name.split("/")[:-1]]


def test_an_empty_library_is_an_error_that_names_it(library: Path) -> None:
    for path in library.rglob("*.py"):
        path.unlink()
    data = DataSpec(source=StandardLibrary(), length=8)
    with pytest.raises(DataError, match=r"^source 'stdlib': the train split has no text: found 0 documents"):
        data.corpus("train")


def test_splits_are_pinned() -> None:
    """The hash is part of the data's definition: held-out text must stay held out in every version."""
    held_out = [name for name in map("doc.jsonl:{}".format, range(1, 101)) if split_of(name, 0.05) == "held_out"]
    assert held_out == ["doc.jsonl:3", "doc.jsonl:32"]


@given(st.text(), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_larger_share_holds_out_the_same_documents_and_more(name: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert split_of(name, 0.0) == "train"
    assert split_of(name, low) == "train" or split_of(name, high) == "held_out"


def test_jsonl_splits_by_file_and_line(lines: Path) -> None:
    source = JsonLines(train=str(lines), held_out_share=0.2)
    train, held_out = ({d.name: d.text for d in source.documents(split)} for split in ("train", "held_out"))
    expected = {f"text.jsonl:{n + 1}": f"text {n} \u00e9".encode() for n in range(200)}
    assert train | held_out == expected and not train.keys() & held_out.keys()
    assert 20 <= len(held_out) <= 60


def test_moving_a_folder_moves_no_document_to_the_other_split(lines: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / lines.name
    moved.parent.mkdir()
    moved.write_bytes(lines.read_bytes())
    assert names(JsonLines(train=str(lines)), "held_out") == names(JsonLines(train=str(moved)), "held_out")


def test_named_held_out_files_leave_the_training_files_whole(lines: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('\n{"text": "a"}\r\n\n{"text": ""}')
    source = JsonLines(train=(str(lines), str(lines)), held_out=str(other))
    assert len(names(source, "train")) == 400
    assert names(source, "held_out") == ["other.jsonl:2", "other.jsonl:4"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "is not JSON: Unterminated string starting at: column 10"),
        (b'{"text": "\xff"}', "is not UTF-8 at byte 10"),
        (b'\xef\xbb\xbf{"text": "bom"}', "is not JSON: Unexpected UTF-8 BOM"),
        (b'{"text": "\\ud800"}', '"text" holds a lone surrogate at character 0'),
        (b'["text"]', 'must be an object with a "text", found an array'),
        (b"null", "found null"),
        (b'{"content": "a", "id": 3}', "has no \"text\" (its keys: 'content', 'id')"),
        (b"{}", 'has no "text" (its keys: none)'),
        (b'{"text": null}', '"text" must be a string, found null'),
        (b'{"text": NaN}', '"text" must be a string, found a number'),
        (b'{"text": true}', '"text" must be a string, found a boolean'),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b"[" * 100_000, "is not JSON: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError) as caught:
        list(JsonLines(train=str(path), held_out_share=0.0).documents("train"))
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and problem in message
    assert "\n" not in message and len(message) < 300 + len(str(path))


def texts(path: Path) -> list[bytes]:
    return [document.text for document in JsonLines(train=str(path), held_out_share=0.0).documents("train")]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    assert texts(path) == [b"a"]
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf\n" + b'{"text": "a"}\n'))
    assert texts(path) == [b"a"]


def test_compressing_a_file_changes_nothing(lines: Path) -> None:
    compressed = lines.with_name(f"{lines.name}.gz")
    half = len(lines.read_bytes()) // 2
    parts = lines.read_bytes()[:half], lines.read_bytes()[half:]
    compressed.write_bytes(b"".join(map(gzip.compress, parts)))  # gzip's files may be put one after another
    for split in ("train", "held_out"):
        plain, packed = (
            [(d.name, d.text) for d in JsonLines(train=str(f)).documents(split)] for f in (lines, compressed)
        )
        assert plain == packed


@pytest.mark.parametrize("form", ["one", "frames", "a frame to skip"])
def test_zstd_is_read_to_its_end(lines: Path, form: str) -> None:
    """Several frames one after another too, as pzstd and `cat` make them: a reader of one would drop the others."""
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    whole, path = lines.read_bytes(), lines.with_name("text.jsonl.zst")
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path.write_bytes(
        {
            "one": compress(whole),
            "frames": compress(whole[:1000]) + compress(whole[1000:]),
            "a frame to skip": skipped + compress(whole) + skipped,
        }[form]
    )
    assert texts(path) == texts(lines)
    path.write_bytes(compress(whole)[:-5])
    with pytest.raises(DataError, match="damaged or cut"):
        texts(path)


def test_zstd_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = tmp_path / "text.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd and more")
    with pytest.raises(DataError, match=r"text\.jsonl\.zst: is compressed by zstd.*fusiontree\[data\]"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gzip.compress(b'{"text": "a"}\n' * 9)[:-3], "damaged or cut"),
        (gzip.compress(b'{"text": "a"}\n') + b"more", "damaged or cut"),
        (gzip.compress(b'{"text": "a"}\n')[:10] + b"\xff" * 9, "damaged or cut"),
        (b"BZh91AY&SY", "compressed by bzip2 or xz; gzip and zstd are read"),
        (b"\xfd7zXZ\x00", "compressed by bzip2 or xz; gzip and zstd are read"),
    ],
    ids=["cut", "something behind it", "damaged", "bzip2", "xz"],
)
def test_what_cannot_be_decompressed_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "text.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts(path)
    assert str(caught.value).startswith(f"{path}: ") and problem in str(caught.value)


def test_contents_tell_the_file_that_changed(tmp_path: Path) -> None:
    """What does not reach the model changes nothing: blank lines, other keys, what is beyond the limit."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"text": "first"}\n{"text": "second"}\n')
    two.write_text('{"text": "third", "id": 3}\n{"text": "fourth"}\n')

    def contents(folder: Path = tmp_path, limit: int | None = None) -> Contents:
        source = JsonLines(train=(str(folder / "one.jsonl"), str(folder / "two.jsonl")), held_out_share=0.0)
        return DataSpec(source=source, length=8, bytes=limit).corpus("train").contents

    before, limited = (json.loads(json.dumps(contents(limit=limit).data())) for limit in (None, 13))
    assert [(part["name"], part["documents"], part["bytes"]) for part in before] == [
        ("one.jsonl", 2, 11),
        ("two.jsonl", 2, 11),
    ]
    two.write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    assert contents().difference(before) is None
    two.write_text('{"text": "third"}\n{"text": "FOURTH"}\n')
    assert str(contents().difference(before)).startswith(f"{two}: was read as 2 documents of 11 bytes")
    assert contents(limit=13).difference(limited) is None
    two.write_text('{"text": "thir"}\n{"text": "dfourth"}\n')
    assert contents().difference(before), "the same bytes, cut elsewhere"
    two.write_text("\n")
    assert contents().difference(before) == f"two.jsonl: was read as {_part(before[1])}, is now nothing"


def _part(part: dict[str, object]) -> str:
    return f"2 documents of 11 bytes (sha256 {str(part['sha256'])[:12]})"


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    documents = JsonLines(train=str(path), held_out_share=0.0).documents("train")
    assert next(documents).text == b"good"
    with pytest.raises(DataError, match=r"bad\.jsonl:2: is not JSON"):
        next(documents)


@pytest.mark.parametrize(("name", "reason"), [("absent.jsonl", "No such file"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, reason: str) -> None:
    path = tmp_path / name
    with pytest.raises(DataError, match=f"^{path}: cannot be read: {reason}"):
        list(JsonLines(train=str(path)).documents("train"))


def test_a_file_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n')
    source = JsonLines(train="empty.jsonl", held_out_share=0.0).relative_to(tmp_path)
    data = DataSpec(source=source, length=8)
    with pytest.raises(DataError, match="train split has no text: found 1 documents with 0 bytes"):
        data.batches(rows=1)
    with pytest.raises(DataError, match="held_out split has no text: found 0 documents"):
        data.held_out()


def test_relative_paths_are_taken_from_a_folder(lines: Path) -> None:
    spec = {"kind": "jsonl", "train": [lines.name], "held_out": lines.name}
    data = DataSpec.parse({"source": spec, "length": 4}).relative_to(lines.parent)
    assert data.sizes()["train"] == data.sizes()["held_out"]
    assert data.sizes()["train"].documents == 200
    assert data.relative_to(Path("/elsewhere")) == data


def test_the_byte_limit_is_kept_in_both_splits(lines: Path) -> None:
    source = JsonLines(train=str(lines), held_out_share=0.2)
    whole, limited = (DataSpec(source=source, length=4, bytes=limit) for limit in (None, 101))
    for split in ("train", "held_out"):
        start = b"".join(document.text for document in whole.documents(split))[:101]
        assert b"".join(document.text for document in limited.documents(split)) == start
        assert limited.sizes()[split].bytes == limited.corpus(split).bytes == 101
        first = next(source.documents(split))
        exact = DataSpec(source=source, length=4, bytes=len(first.text))
        assert list(exact.documents(split)) == [first]


def test_sizes_are_those_of_the_corpora(lines: Path) -> None:
    data = DataSpec(source=JsonLines(train=str(lines)), length=4)
    for split, size in data.sizes().items():
        corpus = data.corpus(split)
        assert (size.documents, size.bytes) == (corpus.documents, corpus.bytes)
    assert data.held_out().length == 4 and data.held_out(9).length == 9


def test_specs_read_back_as_written() -> None:
    for source in (
        {"kind": "stdlib"},
        {"kind": "jsonl", "train": ["a", "b"]},
        {"kind": "jsonl", "train": "a"},
    ):
        data = DataSpec.parse({"source": source, "length": 16})
        assert DataSpec.parse(json.loads(json.dumps(data.data()))) == data
        assert data.data()["source"].items() >= source.items()
    assert set(sources.names()) >= {"stdlib", "jsonl"}
    assert "held_out_share" in json.dumps(DataSpec.model_json_schema())


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"kind": "jsonlines", "train": "a"}, "did you mean 'jsonl'"),
        ({"kind": "jsonl"}, "source.train"),
        ({"kind": "jsonl", "train": []}, "source.train"),
        ({"kind": "stdlib", "held_out_share": 1.0}, "source.held_out_share"),
    ],
)
def test_a_bad_spec_is_refused_with_its_path(source: dict[str, object], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        DataSpec.parse({"source": source, "length": 4})


@given(st.binary())
def test_tokens_decode_to_what_was_encoded(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(data)
    assert tokens.tolist() == list(data) and tokenizer.end == 256 < tokenizer.vocab_size
    assert tokenizer.decode_bytes(tokens) == data


@given(st.text())
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
