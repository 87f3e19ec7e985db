"""One word a thing, the field's: names that were ours alone stay away (`docs/glossary.md` has those that are ours), and
no class name is given twice."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusiontree

ROOT = Path(fusiontree.__file__).parent
EVERYWHERE = {
    "Told",
    "Binds",
    "Shelf",
    "Loans",
    "Ledger",
    "Sight",
    "Falling",
    "Normalise",
    "lends",
    "borrows",
    "lender_field",
}
PRIVATE = {
    "core": {"stands", "around", "placed", "running", "closed", "told", "begun", "all_begun", "wide", "sole", "most"},
    "core/contracts": {"held", "room", "fresh", "tail", "seen", "after", "before"},
    "branches": {"held", "room", "fresh", "tail", "seen", "after", "before", "carried", "lent"},
    "fusions": {"sole", "passes", "edit_rule", "without", "closed"},
    "gates": {"closed", "shared", "told"},
    "kernels": {"falling", "wide", "share_of_heads"},
    "pruning": {"sole", "without"},
    "testing": {"far", "grown"},
    "zoo": {"Same", "Joined", "Either", "Once"},
}
"""Names of definitions, arguments and attributes that stay away, by the room that had them."""


def named(path: Path) -> Iterator[str]:
    """Every name that a file defines: of classes, functions, arguments, fields and attributes."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.arg(arg=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name


@pytest.mark.parametrize("room", ["", *PRIVATE])
def test_private_words_stay_away(room):
    words = PRIVATE.get(room, EVERYWHERE)
    found = [(str(path.relative_to(ROOT)), name) for path in (ROOT / room).rglob("*.py") for name in named(path)]
    assert found
    assert not [(path, name) for path, name in found if name in words]


def test_no_class_name_is_given_twice():
    trees = (ast.parse(path.read_text()) for path in ROOT.rglob("*.py"))
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]
