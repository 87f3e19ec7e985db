"""Text as packed rows of tokens. Nothing here knows of a model, of training, or of who asks for the rows."""

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
