"""Tokenizer files as Hugging Face stores them beside weights: data files, copied along and never executed.

A model over bytes has no such files; `byte_tokenizer` writes `ByteTokenizer` in their format.
"""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from fusiontree.data.tokenizer import ByteTokenizer

NAMES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json", "tiktoken.model"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)
"""The files that define tokenisation and the end of generation. They hold no code and no pickles."""
END = "<|end|>"
"""The text form of the end token. These characters in a text do not become an end token."""


def tokenizer_files(directory: Path | str) -> list[Path]:
    """The tokenizer files in a directory."""
    return [Path(directory) / name for name in NAMES if (Path(directory) / name).is_file()]


def byte_tokenizer() -> dict[str, dict[str, Any]]:
    """The contents of `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` for bytes.

    The ids are those of `ByteTokenizer`. They use GPT-2's byte-level scheme without merges; the whole text is one word,
    because splitting it would change nothing.
    """
    end = ByteTokenizer.end
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "vocab": {letter: byte for byte, letter in enumerate(_letters())}, "merges": []}
    whole = {"version": "1.0", "added_tokens": [{"id": end, "content": END, **special}]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END}
    return {
        "tokenizer.json": {**whole, "pre_tokenizer": level, "decoder": level, "model": model},
        "tokenizer_config.json": {**config, "split_special_tokens": True, "clean_up_tokenization_spaces": False},
        "generation_config.json": {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
    }


def write_byte_tokenizer(directory: Path) -> None:
    """Write the files of `byte_tokenizer` to a directory."""
    for name, data in byte_tokenizer().items():
        (directory / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _letters() -> Iterator[str]:
    """The letter for each byte in GPT-2's scheme: its Latin-1 letter if printable, else the next code from 256."""
    others = count(256)
    for byte in range(256):
        shown = 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD)
        yield chr(byte if shown else next(others))
