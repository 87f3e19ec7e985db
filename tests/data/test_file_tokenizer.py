"""Tokenizers beside models: what is read, how text comes out piece by piece, and what is refused."""

import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fusiontree.cli.runs import _until
from fusiontree.data import ByteTokenizer
from fusiontree.data.file_tokenizer import FileTokenizer, tokenizer_in
from fusiontree.errors import FusionTreeError

TEXTS = ["the cat sat on the mat", "a dog and a cat", "h\u00e9 \u4e16\u754c \U0001f600!"]
SPECIAL = ["<s>", "</s>"]


def made(special=SPECIAL) -> Tokenizer:
    """Byte-level BPE that was trained on a few words."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    found.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return found


@pytest.fixture
def folder(tmp_path):
    made().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", [*TEXTS, ""])
def test_text_comes_back_whole_and_piece_by_piece(folder, text):
    read = FileTokenizer(folder)
    tokens = read.encode(text)
    assert read.decode(tokens) == text
    for cut in range(len(tokens) + 1):
        if not read.decode(tokens[:cut]).endswith("\ufffd"):
            pieces = list(read.pieces(tokens[:cut].tolist(), tokens[cut:].tolist()))
            assert read.decode(tokens[:cut]).encode() + b"".join(pieces) == text.encode()
            assert all("\ufffd" not in piece.decode() for piece in pieces)


def test_half_a_character_is_not_swallowed(folder):
    read = FileTokenizer(folder)
    tokens = read.encode("\U0001f601").tolist()
    assert b"".join(read.pieces([], tokens[:-1])).decode() == "\ufffd"


@pytest.mark.parametrize(
    ("files", "special", "ends", "start"),
    [
        ({}, SPECIAL, (1,), 0),
        ({}, ["<x>", "<|endoftext|>"], (1,), None),
        ({}, ["<x>", "<y>"], (), None),
        ({"generation_config.json": {"eos_token_id": [3, 1]}}, ["<x>", "<y>"], (3, 1), None),
        ({"generation_config.json": {"eos_token_id": 5}}, SPECIAL, (5,), 0),
        ({"tokenizer_config.json": {"eos_token": "<y>", "bos_token": {"content": "<x>"}}}, ["<x>", "<y>"], (1,), 0),
        ({"special_tokens_map.json": {"eos_token": {"content": "<y>"}}}, ["<x>", "<y>"], (1,), None),
    ],
)
def test_where_texts_begin_and_end(tmp_path, files, special, ends, start):
    made(special).save(str(tmp_path / "tokenizer.json"))
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    read = FileTokenizer(tmp_path)
    assert (read.ends, read.start) == (ends, start)


def test_what_a_file_says_of_lengths_does_not_cut_and_what_it_adds_is_added(tmp_path):
    found = made()
    found.enable_truncation(max_length=2)
    found.enable_padding(length=50)
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found.save(str(tmp_path / "tokenizer.json"))
    read = FileTokenizer(tmp_path)
    tokens = read.encode(TEXTS[0])
    assert tokens[0] == 0 and read.decode(tokens) == TEXTS[0]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("tokenizer.json", "{", "its tokenizer cannot be read"),
        ("generation_config.json", "{", "generation_config.json: cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a mapping"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(folder, name, text, line):
    (folder / name).write_text(text)
    with pytest.raises(FusionTreeError, match=line) as caught:
        FileTokenizer(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(folder):
    for text in (b"a\xff", "a\udcff"):
        with pytest.raises(FusionTreeError, match="not UTF-8"):
            FileTokenizer(folder).encode(text)


def test_a_missing_package_is_one_line_that_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(FusionTreeError, match=r"tokenizers is not installed; pip install 'fusiontree\[data\]'"):
        tokenizer_in(folder, 280)


def test_the_one_beside_a_model_or_that_of_bytes(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert isinstance(tokenizer_in(empty, 257), ByteTokenizer)
    assert isinstance(tokenizer_in(folder, 280), FileTokenizer)
    with pytest.raises(FusionTreeError, match=r"holds no tokenizer.json, and 300 tokens are not the 257 of bytes"):
        tokenizer_in(empty, 300)
    (empty / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(
        FusionTreeError, match=r"holds no tokenizer.json, and found tokenizer.model, which AutoTokenizer"
    ):
        tokenizer_in(empty, 257)
    with pytest.raises(FusionTreeError, match=r"the tokenizer has \d+ tokens, the model has 99"):
        tokenizer_in(folder, 99)


@pytest.mark.parametrize(
    ("pieces", "endings", "written"),
    [
        (["ab", "cd"], [], "abcd"),
        (["ab", "cd", "ef"], ["bc"], "abc"),
        (["ab", "cd", "ef"], ["ef", "d"], "abcd"),
        (list("xxaab"), ["aab", "ab"], "xxaab"),
        (["abc"], ["c", "b"], "ab"),
        (list("aaa"), ["b"], "aaa"),
    ],
)
def test_a_text_ends_behind_its_first_ending(pieces, endings, written):
    found = _until([piece.encode() for piece in pieces], [ending.encode() for ending in endings])
    assert b"".join(found).decode() == written


def test_bytes_come_out_as_they_are():
    assert b"".join(ByteTokenizer().pieces([1], np.array([104, 256, 255]).tolist())) == b"h\xff"
