"""Text as packed rows of tokens. This package does not depend on models or on training."""

from fusiontree.data.batches import Batches
from fusiontree.data.corpus import Corpus
from fusiontree.data.held_out import EvaluationBatch, HeldOut
from fusiontree.data.jsonl import JsonLines
from fusiontree.data.rows import IGNORED, PADDING, Batch
from fusiontree.data.source import DataError, Document, Source, SourceSpec, Split, sources, split_of
from fusiontree.data.spec import DataSpec, Size
from fusiontree.data.stdlib import StandardLibrary
from fusiontree.data.tokenizer import ByteTokenizer

__all__ = [
    "IGNORED",
    "PADDING",
    "Batch",
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "DataError",
    "DataSpec",
    "Document",
    "EvaluationBatch",
    "HeldOut",
    "JsonLines",
    "Size",
    "Source",
    "SourceSpec",
    "Split",
    "StandardLibrary",
    "sources",
    "split_of",
]
