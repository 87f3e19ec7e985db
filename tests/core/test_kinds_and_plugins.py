"""Families of kinds: late registration, duplicates, and what installed packages offer."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from core_cases import MIXER, complaint, data, edited

from fusiontree import ModelSpec, build
from fusiontree import branches as branch_package
from fusiontree import encodings as encoding_package
from fusiontree import fusions as fusion_package
from fusiontree import gates as gate_package
from fusiontree.branches import Mlp
from fusiontree.core.contracts.encoding import encodings
from fusiontree.core.contracts.fusion import fusions, nodes
from fusiontree.core.contracts.gate import gates
from fusiontree.core.contracts.node import branches
from fusiontree.encodings import Rope
from fusiontree.fusions import Mean
from fusiontree.gates import Softmax

REGISTRIES = {"branch": branches, "fusion": fusions, "gate": gates, "encoding": encodings}


def late_kind(kind: str = "late") -> type[Mlp]:
    """A branch that registers after every model class was made."""
    body = {"__module__": __name__, "__annotations__": {"kind": Literal[kind]}, "kind": kind}
    return type(Mlp)("Late", (Mlp,), body)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """No kind outlives its test."""
    kinds = {name: dict(registry._kinds) for name, registry in REGISTRIES.items()}
    yield
    for name, registry in REGISTRIES.items():
        registry._kinds.clear()
        registry._kinds.update(kinds[name])


class TestRegistering:
    def test_a_late_kind_is_found_everywhere(self) -> None:
        written = edited("layers.0.mixer.branches.mamba", {"kind": "late", "hidden": 8})
        complaint(lambda: ModelSpec.parse(written), "'late'")
        assert not jsonschema.Draft202012Validator(ModelSpec.model_json_schema()).is_valid(written)
        late = branches.register(late_kind())
        assert "late" in branches.names()
        assert "late" in nodes.names()
        assert isinstance(ModelSpec.parse(written).node("layers.0.mixer.branches.mamba"), late)
        assert jsonschema.Draft202012Validator(ModelSpec.model_json_schema()).is_valid(written)
        assert ModelSpec.from_yaml(ModelSpec.parse(written).to_yaml()) == ModelSpec.parse(written)
        assert build(ModelSpec.parse(written), device="meta")

    def test_the_same_class_may_be_registered_again(self) -> None:
        branches.register(late_kind())
        again = branches.register(late_kind())
        assert branches.get("late") is again

    @pytest.mark.parametrize(("registry", "taken"), [(branches, "mamba2"), (branches, "gated")], ids=["own", "sibling"])
    def test_a_kind_that_is_taken_names_both(self, registry: Any, taken: str) -> None:
        first = nodes.get(taken)
        with pytest.raises(ValueError, match=taken) as caught:
            registry.register(late_kind(taken))
        for both in (f"{first.__module__}.{first.__qualname__}", "Late"):
            assert both in str(caught.value)
        assert nodes.get(taken) is first

    @pytest.mark.parametrize("registry", REGISTRIES)
    def test_a_class_of_another_family_is_refused(self, registry: str) -> None:
        others = {"branch": Mean, "fusion": Softmax, "gate": Rope, "encoding": Mlp}
        with pytest.raises(TypeError, match=registry):
            REGISTRIES[registry].register(others[registry])

    def test_a_class_without_a_kind_is_refused(self) -> None:
        class Nameless(Mlp.__base__):
            """No kind of its own."""

        with pytest.raises(TypeError, match=r"Nameless.*kind"):
            branches.register(Nameless)

    @pytest.mark.parametrize("registry", REGISTRIES)
    def test_an_unknown_kind_is_answered_with_the_nearest(self, registry: str) -> None:
        known = REGISTRIES[registry].names()
        complaint(lambda: REGISTRIES[registry].get(f"{known[0]}x"), registry, f"'{known[0]}'", *known)


class FakeDistribution:
    """What an entry point knows of the package that offers it."""

    def __init__(self, name: str) -> None:
        self.name = name


Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    """Write modules and offer kinds from them, as installed packages do."""
    points: list[EntryPoint] = []
    written: list[str] = []

    def add(kind: str, code: str, module: str = "fake_plugin") -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        written.append(module)
        points.append(EntryPoint(kind, f"{module}:Thing", "fusiontree.branch"))
        branches.__dict__.pop("plugins", None)

    def found(**wanted: str) -> list[EntryPoint]:
        return [point for point in points if all(getattr(point, key) == value for key, value in wanted.items())]

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("fusiontree.core.spec.registry.entry_points", found)
    yield add
    branches.__dict__.pop("plugins", None)
    for module in written:
        sys.modules.pop(module, None)


GOOD = """
    from typing import Literal
    from fusiontree.branches import Mlp, register

    @register
    class Thing(Mlp):
        kind: Literal["offered"] = "offered"
"""
USE = {"kind": "offered", "hidden": 8}


class TestPlugins:
    def test_a_kind_is_imported_when_it_is_used(self, offer: Offer) -> None:
        offer("offered", GOOD)
        assert "offered" in branches.names()
        ModelSpec.parse(data())
        assert "fake_plugin" not in sys.modules
        found = ModelSpec.parse(edited("layers.1.ffn", USE))
        assert "fake_plugin" in sys.modules
        assert build(found, device="meta")

    @pytest.mark.parametrize(
        ("code", "parts"),
        [
            ("raise RuntimeError('two\\nlines')", ["failed", "RuntimeError", "two lines"]),
            ("import a_package_that_is_not_there", ["failed", "a_package_that_is_not_there"]),
            ("def f(:", ["failed", "SyntaxError"]),
            ("Thing = 3", ["registered no branch", "'offered'"]),
            ("", ["failed", "AttributeError"]),
            (GOOD.replace('"offered"', '"other"'), ["registered no branch", "'offered'"]),
            (GOOD.replace('"offered"', '"mamba2"'), ["failed", "mamba2", "Thing"]),
        ],
        ids=["raises", "needs another", "syntax", "registers nothing", "no such name", "another kind", "a taken kind"],
    )
    def test_a_broken_one_fails_only_whoever_uses_it(self, offer: Offer, code: str, parts: list[str]) -> None:
        offer("offered", code)
        assert ModelSpec.parse(data()).digest()
        assert "offered" in branches.names()
        jsonschema.Draft202012Validator(ModelSpec.model_json_schema()).validate(data())
        complaint(lambda: ModelSpec.parse(edited("layers.1.ffn", USE)), "layers.1.ffn.kind: ", "fake_plugin", *parts)

    def test_two_packages_with_one_kind_are_both_named(self, offer: Offer) -> None:
        offer("offered", GOOD, "one_plugin")
        offer("offered", GOOD, "two_plugin")
        complaint(lambda: branches.get("offered"), "'offered'", "one_plugin", "two_plugin")

    def test_the_nearest_name_may_be_a_plugin_s(self, offer: Offer) -> None:
        offer("offered", GOOD)
        complaint(lambda: ModelSpec.parse(edited("layers.1.ffn.kind", "offerd")), "'offered'")


def test_a_kind_is_data_and_never_an_import() -> None:
    """A dotted path where a kind stands is an unknown kind, and nothing is imported for it."""
    job = f"""
        import json, sys
        from fusiontree import ModelSpec
        from fusiontree.errors import SpecError
        written = json.loads({json.dumps(json.dumps(edited("layers.0.mixer", MIXER | {"kind": "antigravity:Spec"})))})
        try:
            ModelSpec.parse(written)
        except SpecError as error:
            print(error)
        assert "antigravity" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(job)], capture_output=True, text=True, check=True)
    assert "layers.0.mixer.kind: no node is called 'antigravity:Spec'" in done.stdout


@pytest.mark.parametrize("family", REGISTRIES)
def test_a_package_is_its_registry_s_public_face(family: str) -> None:
    package = {"branch": branch_package, "fusion": fusion_package, "gate": gate_package, "encoding": encoding_package}
    assert package[family].names() == REGISTRIES[family].names()
    for kind in package[family].names():
        spec = package[family].get(kind)
        assert getattr(package[family], spec.__name__) is spec
