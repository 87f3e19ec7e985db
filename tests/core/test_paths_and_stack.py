"""Paths into the expanded form, repeats, what varies over them, and folding back."""

import keyword
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
from core_cases import MIXER, MLP, complaint, data, spec

from fusiontree import LayerSpec, Repeat, build
from fusiontree.core.contracts.registries import REGISTRIES
from fusiontree.core.model.layers import expand, fold
from fusiontree.core.spec import paths
from fusiontree.core.spec.base import OrderedMap
from fusiontree.testing.check import models

TREE = {"a": [{"x": 1, "y": {}}, {"x": 2}], "b": "text"}
LAYERS = {letter: LayerSpec.parse({"ffn": MLP | {"hidden": 8 + index}}) for index, letter in enumerate("ABC")}
LAYERS["."] = LayerSpec()
MAPS = {"branches", "encodings", "shared", "multipliers", "values"}
"""Fields that hold parts or values by name, and are none themselves."""


def layers(word: str) -> list[LayerSpec]:
    return [LAYERS[letter] for letter in word]


class TestPaths:
    @pytest.mark.parametrize(
        ("pattern", "found"),
        [
            ("a.0.x", [("a", "0", "x")]),
            ("a.*.x", [("a", "0", "x"), ("a", "1", "x")]),
            ("*.1", [("a", "1")]),
            ("*", [("a",), ("b",)]),
            ("a.*.y", [("a", "0", "y")]),
        ],
    )
    def test_find(self, pattern: str, found: list[tuple[str, ...]]) -> None:
        assert paths.find(TREE, pattern) == found

    @pytest.mark.parametrize("pattern", ["", "c", "a.2", "a.-1", "a.0.x.0", "b.0", "a.*.z", "a..x"])
    def test_nothing_found(self, pattern: str) -> None:
        complaint(lambda: paths.find(TREE, pattern), pattern, "matches nothing")

    @pytest.mark.parametrize(
        "pattern", ["widht", "layer.0.mixr.gate", "layers.*.mixer.brnches.*.widow", "norms.kind", "layers.0.*.branch"]
    )
    def test_the_nearest_is_a_path_that_there_is(self, pattern: str) -> None:
        whole = spec().expand().data()
        text = complaint(lambda: paths.find(whole, pattern), "the nearest is ")
        assert paths.find(whole, text.rsplit("'", 2)[1])

    @pytest.mark.parametrize(
        ("pattern", "known"),
        [
            ("tokenizer", "known here: a, b"),
            ("c.0.z", "known here: a, b"),
            ("a.9.x", "known in 'a': 0 to 1"),
            ("a.0.t", "known in 'a.0': x, y"),
            ("a.0.y.z", "a.0.y is "),
            ("*.*.z", "known in '*.*': x, y"),
            ("b.0", "b is null, which holds nothing further; give it as a whole"),
        ],
    )
    def test_where_nothing_is_near_what_is_known_is_listed(self, pattern: str, known: str) -> None:
        assert "nearest" not in complaint(lambda: paths.find({**TREE, "b": None}, pattern), known)

    def test_every_place_is_found_by_its_own_path(self) -> None:
        whole = spec().expand().data()
        for path, value in paths.walk(whole):
            assert paths.find(whole, ".".join(path)) == [path]
            assert paths.get(whole, path) is value

    def test_put_changes_one_place(self) -> None:
        changed = {"a": [{"x": 1}, {"x": 2}]}
        paths.put(changed, ("a", "1", "x"), 5)
        assert changed == {"a": [{"x": 1}, {"x": 5}]}


class TestRepeat:
    def test_it_expands_period_by_period(self) -> None:
        entry = Repeat(repeat=3, layers=tuple(layers("AB")))
        assert list(expand([LAYERS["C"], entry, LAYERS["."]])) == layers("CABABAB.")
        assert entry.size == 6

    def test_vary_gives_each_time_its_value(self) -> None:
        entry = {"repeat": 3, "layers": [{"mixer": MIXER}], "vary": {"0.mixer.branches.*.heads": [2, 4, 8]}}
        found = spec(layers=[entry])
        heads = [
            found.node(f"layers.{i}.mixer.branches.{b}").data()["heads"]
            for i in range(3)
            for b in ("mamba", "attention")
        ]
        assert heads == [2, 2, 4, 4, 8, 8]

    def test_vary_takes_nodes_and_null(self) -> None:
        found = spec(layers=[{"repeat": 3, "layers": [{"ffn": MLP}], "vary": {"0.ffn": [None, MLP, MIXER]}}])
        kinds = [getattr(layer.ffn, "kind", None) for layer in found.expanded_layers()]
        assert kinds == [None, "mlp", "gated"]

    def test_it_reads_back_as_written(self) -> None:
        entry = {"repeat": 2, "layers": [{"ffn": MLP}, {}], "vary": {"0.ffn.hidden": [3, 4]}}
        written = spec(layers=[entry, {"ffn": MLP}])
        assert isinstance(written.layers[0], Repeat)
        assert dict(written.layers[0].vary) == {"0.ffn.hidden": (3, 4)}
        assert "repeat: 2" in written.to_yaml()
        assert len(written.expanded_layers()) == 5


class TestFold:
    @pytest.mark.parametrize(
        ("word", "shape"),
        [
            ("AAAA", [(4, "A")]),
            ("ABABAB", [(3, "AB")]),
            ("AABAABAAB", [(3, "AAB")]),
            ("AABAAB", [(2, "AAB")]),
            ("A", [(1, "A")]),
            ("ABC", [(1, "A"), (1, "B"), (1, "C")]),
            ("AAAB", [(3, "A"), (1, "B")]),
            ("ABABC", [(2, "AB"), (1, "C")]),
            ("....", [(4, ".")]),
            ("", []),
        ],
    )
    def test_runs_and_periods(self, word: str, shape: list[tuple[int, str]]) -> None:
        entries = fold(layers(word))
        found = [(entry.repeat, list(entry.layers)) if isinstance(entry, Repeat) else (1, [entry]) for entry in entries]
        assert found == [(times, layers(period)) for times, period in shape]

    def test_expanding_undoes_it(self) -> None:
        for word in product("AB.", repeat=5):
            assert list(expand(fold(layers("".join(word))))) == layers("".join(word))


class TestOnePath:
    def test_spec_module_and_state_dict_share_their_paths(self) -> None:
        written = spec(layers=[{"repeat": 2, "layers": [{"mixer": MIXER}, {"ffn": MLP}]}])
        built = build(written, device="meta")
        nodes = dict(written.nodes())
        assert list(nodes) == [path for path, _ in built.nodes()]
        assert nodes["layers.2.mixer.branches.mamba"].data()["kind"] == "mamba2"
        for path, node in nodes.items():
            assert built.get_submodule(path).path == path
            for name in node.axes():
                assert f"{path}.{name}" in built.state_dict()
            assert paths.get(written.expand().data(), paths.split(path)) == node.data()

    def test_a_node_that_is_not_there(self) -> None:
        complaint(lambda: spec().node("layers.0.mixer.branches.mambo"), "mambo", "'layers.0.mixer.branches.mamba'")

    def test_every_part_is_at_its_path(self) -> None:
        """Gates, norms, encodings, layers and shared nodes too: whatever has fields of its own."""
        written = spec(layers=[{"repeat": 2, "layers": [{"mixer": MIXER}, {"ffn": MLP}]}], shared={"part": MLP})
        found = {".".join(path): value for path, value in paths.walk(written.canonical()) if isinstance(value, dict)}
        found = {path: value for path, value in found.items() if path.split(".")[-1] not in MAPS}
        assert {"layers.2.mixer.gate", "layers.3", "layers.3.ffn", "norm", "encodings.rope", "shared.part"} <= {*found}
        for path, value in found.items():
            assert written.node(path).data() == value

    @pytest.mark.parametrize(
        ("path", "found"),
        [("layers.0.ffn", "None"), ("width", "16"), ("encodings", "{"), ("layers.*.mixer", "several"), ("", "''")],
    )
    def test_what_is_no_part(self, path: str, found: str) -> None:
        complaint(lambda: spec().node(path), path, found)

    def test_an_empty_layer_is_the_identity(self) -> None:
        assert spec(layers=[{}, *data()["layers"]]).expanded_layers()[0] == LayerSpec()


class TestOrderedMap:
    @pytest.mark.parametrize("other", [OrderedMap(b=2, a=1), {"b": 2, "a": 1}, OrderedMap(a=1), 3])
    def test_unequal(self, other: Any) -> None:
        assert OrderedMap(a=1, b=2) != other

    def test_equal_and_hashed_alike(self) -> None:
        assert OrderedMap(a=1, b=2) == OrderedMap({"a": 1, "b": 2}) == {"a": 1, "b": 2}
        assert hash(OrderedMap(a=1, b=2)) == hash(OrderedMap({"a": 1}, b=2))
        assert isinstance(OrderedMap(a=1), Mapping)


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f, registry in REGISTRIES.items() for k in registry.names()])
def test_no_step_of_a_path_is_a_word_of_python(family, kind):
    """What `torch.export` writes has the steps as attributes; `global` once was one."""
    for each in models(REGISTRIES[family].get(kind)):
        names = [name for name, _ in build(each, device="meta").named_modules()]
        assert not [name for name in names if any(keyword.iskeyword(step) for step in name.split("."))]
