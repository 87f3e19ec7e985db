"""Every registered component keeps every law."""

from typing import ClassVar

import pytest
import torch

from fusiontree.core.contracts.encoding import EncodingSpec
from fusiontree.core.contracts.registries import REGISTRIES
from fusiontree.testing import check, check_spec
from fusiontree.zoo.presets import load_spec

torch.set_num_threads(1)
COMPONENTS = [(family, kind) for family, registry in REGISTRIES.items() for kind in registry.names()]


@pytest.mark.parametrize(("family", "kind"), COMPONENTS)
def test_component_keeps_the_laws(family, kind):
    check(REGISTRIES[family].get(kind))


@pytest.mark.parametrize("name", ["quickstart", "v1", "v2", "v3"])
def test_presets_keep_the_laws_when_made_small(name):
    spec = load_spec(name)
    one = spec.expanded_layers()[:1]
    mixer = {"branches.mamba.heads": 2, "branches.mamba.head_dim": 4, "branches.mamba.state": 4, "gate.rank": 2}
    mixer |= {"branches.attention.head_dim": 4, "branches.attention.window": 4}
    if one[0].mixer.align is not None:
        mixer |= {"align.hidden": 8, "mlp.hidden": 8}
    small = spec.model_copy(update={"layers": one, "width": 16, "vocab_size": 11})
    check_spec(small.replace({f"layers.0.mixer.{path}": value for path, value in mixer.items()}))


class Without(EncodingSpec):
    """An encoding that says nothing of examples."""

    hooks: ClassVar[frozenset[str]] = frozenset()

    def build(self, width, channels):
        raise NotImplementedError


class Older(Without):
    """One that was written when a class had one example."""

    @classmethod
    def example(cls, width):
        return cls()


def test_a_class_with_one_example_works_on_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"Older\.example: define `examples`, which yields several"):
        assert list(Older.examples(16)) == [Older()]


def test_a_class_without_examples_says_what_to_define():
    with pytest.raises(NotImplementedError, match=r"Without: has no examples; define the class method `examples`"):
        check(Without)


class Odd(Without):
    """One whose examples the tests choose."""

    given: ClassVar[object] = None

    @classmethod
    def examples(cls, width):
        return cls.given


@pytest.mark.parametrize("given", [None, 3, [], iter(()), {"a": 1}, [Odd], [Older()], Odd()])
def test_examples_that_are_none_are_named(monkeypatch, given):
    monkeypatch.setattr(Odd, "given", given)
    with pytest.raises(
        TypeError, match=r"Odd\.examples: expected an iterator of instances of Odd, one at least, found"
    ):
        check(Odd)


def test_a_list_of_examples_will_do(monkeypatch):
    monkeypatch.setattr(Odd, "given", [Odd()])
    assert check(Odd, laws=()) == []


def test_examples_without_the_mark_of_a_class_method_say_so(monkeypatch):
    monkeypatch.setattr(Odd, "examples", lambda self, width: iter([self]))
    with pytest.raises(TypeError, match=r"Odd\.examples: expected a class method, found <function"):
        check(Odd)
