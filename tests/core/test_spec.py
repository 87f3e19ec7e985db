"""A spec is data: round trips, equality, digests, edits, differences, and a JSON Schema."""

import json
import re
from typing import Any

import jsonschema
import pytest
from core_cases import ATTENTION, ENCODINGS, MAMBA, MIXER, MLP, complaint, data, edited, spec

from fusiontree import ModelSpec, load_spec, presets
from fusiontree.branches import SwiGLU
from fusiontree.core.model.layers import Repeat
from fusiontree.core.spec import yaml

VARIED = {
    "repeat": 3,
    "layers": [{"mixer": MIXER}, {"ffn": MLP}],
    "vary": {"0.mixer.branches.attention.window": [2, 4, 8]},
}
RICH: dict[str, dict[str, Any]] = {
    "plain": {},
    "repeat": {"layers": [{"repeat": 3, "layers": [{"mixer": MIXER}, {}]}, {"ffn": MLP}]},
    "varied": {"layers": [VARIED]},
    "nulls and tiny numbers": {
        "layers": [
            {
                "mixer": MAMBA | {"norm": None, "dt_limit": [1e-7, None]},
                "placement": "sandwich",
                "norm": {"eps": 1e-12},
            },
            {
                "ffn": {"kind": "mean", "branches": {"no": MLP, "e1": MAMBA}},
                "residual": {"from": "normed", "keep": 0.5},
            },
        ],
        "lineage": [{"parent": "1e5", "edit": "no: 'x'\n- #y"}, {"parent": "0123", "edit": "2020-01-01"}],
    },
}


def named(name: str) -> ModelSpec:
    return spec(**RICH[name]) if name in RICH else load_spec(name)


@pytest.mark.parametrize("name", [*RICH, *presets()])
class TestRoundTrip:
    def test_yaml_as_written(self, name: str) -> None:
        written = named(name)
        again = ModelSpec.from_yaml(written.to_yaml())
        assert again.data() == written.data()
        assert again.to_yaml() == written.to_yaml()

    def test_yaml_expanded(self, name: str) -> None:
        expanded = named(name).expand()
        assert ModelSpec.from_yaml(expanded.to_yaml()).data() == expanded.data()

    def test_json_as_written_and_expanded(self, name: str) -> None:
        for written in (named(name), named(name).expand()):
            text = json.dumps(written.data(), allow_nan=False)
            assert ModelSpec.parse(json.loads(text)).data() == written.data()
            assert ModelSpec.from_yaml(text) == written

    def test_forms_are_equal(self, name: str) -> None:
        written = named(name)
        for form in (written.expand(), written.fold(), written.expand().fold()):
            assert form == written
            assert hash(form) == hash(written)
            assert form.digest() == written.digest()

    def test_the_schema_accepts_it(self, name: str) -> None:
        written = named(name)
        validator = jsonschema.Draft202012Validator(ModelSpec.model_json_schema())
        for form in (written.data(), written.data(short=True), written.expand().data()):
            validator.validate(json.loads(json.dumps(form)))


def test_a_digest_is_12_hex_digits_and_stays() -> None:
    assert len(spec().digest()) == 12
    assert int(spec().digest(), 16) >= 0
    assert spec().digest() == ModelSpec.from_yaml(spec().to_yaml()).digest()


@pytest.mark.parametrize("place", ["layers.0.mixer.branches", "encodings"])
def test_order_of_names_counts(place: str) -> None:
    original = {"layers.0.mixer.branches": MIXER["branches"], "encodings": ENCODINGS}[place]
    swapped = ModelSpec.parse(edited(place, dict(reversed(original.items()))))
    assert swapped != spec()
    assert swapped.digest() != spec().digest()
    assert hash(swapped) != hash(spec())


def test_order_of_keys_that_are_not_names_does_not_count() -> None:
    assert ModelSpec.parse(dict(reversed(data().items()))).digest() == spec().digest()


def test_values_count_in_equality_whatever_their_depth() -> None:
    assert ModelSpec.parse(edited("layers.0.mixer.gate.rank", 5)) != spec()
    assert ModelSpec.parse(edited("layers.0.mixer.branches.mamba.conv", 4)).digest() != spec().digest()


def test_lineage_takes_no_part_in_equality_but_is_kept() -> None:
    child = spec(lineage=[{"parent": "abc", "edit": "drop layers.1"}])
    assert child == spec()
    assert hash(child) == hash(spec())
    assert child.digest() == spec().digest()
    assert child.diff(spec()) == {}
    assert ModelSpec.from_yaml(child.to_yaml()).lineage == child.lineage
    assert child.replace({"width": 32}).lineage == child.lineage


def test_specs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec().width = 3
    with pytest.raises(TypeError):
        spec().encodings["more"] = None  # type: ignore[index]


PYRAMID = {"repeat": 3, "layers": [{"mixer": MIXER}, {"ffn": MLP}], "vary": {"0.mixer.branches.*.heads": [2, 4, 8]}}


class TestReplace:
    def test_one_value(self) -> None:
        changed = spec().replace({"layers.0.mixer.gate.rank": 2})
        assert changed == ModelSpec.parse(edited("layers.0.mixer.gate.rank", 2))
        repeated = spec(layers=[{"repeat": 4, "layers": [{"ffn": MLP}]}])
        assert len(repeated.replace({"layers.*.ffn.hidden": 4}).layers) == 1, "it is written as shortly as before"
        assert spec() == ModelSpec.parse(data()), "the original is as it was"

    def test_a_star_reaches_every_layer_of_a_repeat(self) -> None:
        wide = spec(layers=[{"repeat": 3, "layers": [{"mixer": MIXER}]}])
        changed = wide.replace({"layers.*.mixer.branches.attention.window": 2, "layers.1.mixer.gate.rank": 1})
        nodes = [layer.mixer.data() for layer in changed.expanded_layers() if layer.mixer]
        assert [node["branches"]["attention"]["window"] for node in nodes] == [2, 2, 2]
        assert [node["gate"]["rank"] for node in nodes] == [4, 1, 4]

    def test_a_new_branch_an_old_one_gone_and_another_gate_at_once(self) -> None:
        changed = spec().replace(
            {
                "layers.0.mixer.branches.feed": SwiGLU(hidden=8),
                "layers.0.mixer.branches.mamba": None,
                "layers.0.mixer.gate": {"kind": "softmax", "granularity": "token"},
            }
        )
        node = changed.expanded_layers()[0].data()["mixer"]
        assert list(node["branches"]) == ["attention", "feed"]
        assert node["branches"]["feed"]["kind"] == "swiglu"
        assert node["gate"]["kind"] == "softmax"

    def test_a_new_encoding_and_an_old_one_gone(self) -> None:
        changed = spec().replace({"encodings.far": {"kind": "rope", "theta": 1e6}, "encodings.turn": None})
        assert list(changed.encodings) == ["time", "rope", "far"]

    def test_every_mapping_of_any_names_is_open_and_no_other(self) -> None:
        """By the type of its field, and not by the name: links and norms of a chain, adapters, multipliers of a sum."""
        chain = {"kind": "chain", "links": {"a": MLP}, "norms": {"a": {}}}
        use = {"kind": "use", "of": "block", "adapters": {"r": {"maps": ["up"], "rank": 2}}}
        both = {"kind": "sum", "branches": {"a": MLP, "b": MLP}, "multipliers": {"a": 2.0}}
        whole = spec(shared={"block": MLP}, layers=[{"mixer": chain, "ffn": use}, {"mixer": both}])
        edits = {
            "layers.0.mixer.links.b": SwiGLU(hidden=8),
            "layers.0.mixer.norms.b": {"gain": "none"},
            "layers.0.ffn.adapters.more": {"maps": ["down"], "rank": 1},
            "layers.1.mixer.multipliers.b": 0.5,
            "layers.1.mixer.multipliers.a": None,
            "shared.other": MLP,
        }
        changed = whole.replace(edits)
        first, second = (layer.data() for layer in changed.expanded_layers())
        assert list(first["mixer"]["links"]) == list(first["mixer"]["norms"]) == ["a", "b"]
        assert list(first["ffn"]["adapters"]) == ["r", "more"]
        assert second["mixer"]["multipliers"] == {"b": 0.5}
        assert list(changed.shared) == ["block", "other"]
        complaint(lambda: whole.replace({"layers.0.mixer.residual": {}}), "matches nothing")
        complaint(lambda: whole.replace({"layers.0.residual.more": 1.0}), "matches nothing")

    def test_what_came_with_the_same_edits_is_open(self) -> None:
        both = {"kind": "sum", "branches": {"a": MLP}}
        changed = spec().replace({"layers.0.mixer": both, "layers.0.mixer.branches.b": MLP})
        assert list(changed.node("layers.0.mixer").data()["branches"]) == ["a", "b"]

    @pytest.mark.parametrize(
        ("edits", "vary"),
        [
            ({"encodings.far": {"kind": "rope"}}, {"0.mixer.branches.*.heads": (2, 4, 8)}),
            ({"layers.*.ffn.hidden": 4}, {"0.mixer.branches.*.heads": (2, 4, 8)}),
            ({"layers.1.mixer.branches.*.heads": 16}, {"0.mixer.branches.*.heads": (16, 4, 8)}),
            ({"layers.*.mixer.branches.*.heads": 4}, {}),
            ({"layers.*.mixer": None}, {}),
        ],
    )
    def test_repeats_stay_with_what_they_vary(self, edits: dict[str, Any], vary: dict[str, Any]) -> None:
        whole = spec(layers=[{"ffn": MLP}, PYRAMID, {"ffn": MLP}])
        changed = whole.replace(edits)
        _, repeat, _ = changed.layers
        assert isinstance(repeat, Repeat)
        assert (repeat.repeat, len(repeat.layers), dict(repeat.vary)) == (3, 2, vary)
        assert ModelSpec.from_yaml(changed.to_yaml()) == changed == whole.expand().replace(edits)

    def test_a_repeat_goes_where_its_times_differ_elsewhere(self) -> None:
        whole = spec(layers=[PYRAMID, {"repeat": 2, "layers": [{"ffn": MLP}]}])
        changed = whole.replace({"layers.1.ffn.hidden": 4})
        assert len(changed.layers) == 7
        assert changed == whole.expand().replace({"layers.1.ffn.hidden": 4})
        assert isinstance(changed.layers[-1], Repeat)
        assert whole.replace({}).layers == whole.layers

    def test_one_of_a_branch_s_encodings(self) -> None:
        changed = spec().replace({"layers.0.mixer.branches.attention.encodings.0": "rope"})
        assert changed.node("layers.0.mixer.branches.attention").data()["encodings"] == ["rope"]

    def test_none_is_a_value_outside_branches_and_encodings(self) -> None:
        changed = spec().replace({"layers.0.mixer.branches.attention.window": None, "layers.1.ffn": None})
        assert changed.node("layers.0.mixer.branches.attention").data()["window"] is None
        assert changed.expanded_layers()[1].ffn is None

    @pytest.mark.parametrize(
        ("path", "value", "nearest"),
        [
            ("layers.0.mixer.gate.granularty", "token", "'layers.0.mixer.gate.granularity'"),
            ("layer.0.mixr.gate.kind", "softmax", "'layers.0.mixer.gate.kind'"),
            ("layers.9.ffn", None, "known in 'layers': 0 to 1"),
            ("layers.*.mixer.branches.mamba2.heads", 4, "'layers.*.mixer.branches.mamba.heads'"),
            ("layers.0.mixer.branches.mambo", None, "'layers.0.mixer.branches.mamba'"),
            ("encodings.tiem", None, "'encodings.time'"),
            ("width.more", 3, "width is 16, which holds nothing further"),
            ("layers.0.mixer.branches.attention.encodings.7", "rope", "attention.encodings': 0"),
            ("", 3, "''"),
        ],
    )
    def test_a_path_that_matches_nothing(self, path: str, value: Any, nearest: str) -> None:
        complaint(lambda: spec().replace({path: value}), path, "matches nothing", nearest)

    def test_fields_of_an_old_kind_stay_and_the_edit_that_works_is_said(self) -> None:
        text = complaint(
            lambda: spec().replace({"layers.0.mixer.kind": "mean"}),
            "layers.0.mixer.kind: the fields of the old kind stay, and 'mean' has no gate; ",
            "(layers.0.mixer={kind: mean, ...})",
        )
        removal = re.search(r"same call \((.*?)\)", text)
        assert removal is not None
        edits = {"layers.0.mixer.kind": "mean"} | yaml.assignments(removal[1].split())
        mean = {key: value for key, value in spec().canonical()["layers"][0]["mixer"].items() if key != "gate"}
        assert spec().replace(edits) == spec().replace({"layers.0.mixer": mean | {"kind": "mean"}})

    def test_where_a_new_kind_has_other_fields_the_whole_part_is_asked_for(self) -> None:
        edits = {"layers.0.mixer.branches.mamba.kind": "attention"}
        text = complaint(lambda: spec().replace(edits), "has no state, groups, ", "replace the whole part")
        assert "more)" not in text and "null" not in text

    def test_null_takes_nothing_away_where_the_kind_stays(self) -> None:
        complaint(lambda: spec().replace({"layers.0.mixer.gate": None}), "layers.0.mixer.gate: ", "sigmoid")

    def test_what_results_is_validated(self) -> None:
        complaint(lambda: spec().replace({"layers.0.mixer.branches.mamba": None}), "layers.0.mixer.gate", "single")
        complaint(lambda: spec().replace({"encodings.time": None}), "attention.encodings", "'time'")


class TestDiff:
    def test_values_by_path_here_and_there(self) -> None:
        other = spec().replace({"layers.0.mixer.gate.rank": 2, "layers.1.ffn": None})
        found = spec().diff(other)
        assert found["layers.0.mixer.gate.rank"] == (4, 2)
        assert found["layers.1.ffn"] == (spec().canonical()["layers"][1]["ffn"], None)
        assert all(path.startswith(("layers.0.mixer.gate.rank", "layers.1.ffn")) for path in found)

    def test_backwards_it_is_the_other_way_round(self) -> None:
        other = spec().replace({"layers.0.mixer.gate.rank": 2})
        assert other.diff(spec()) == {path: (b, a) for path, (a, b) in spec().diff(other).items()}

    def test_equal_specs_do_not_differ_in_whatever_form(self) -> None:
        varied = spec(layers=[VARIED])
        assert varied.diff(varied.expand()) == {}

    def test_another_order_is_a_difference(self) -> None:
        swapped = ModelSpec.parse(edited("layers.0.mixer.branches", {"attention": ATTENTION, "mamba": MAMBA}))
        expected = (["mamba", "attention"], ["attention", "mamba"])
        assert spec().diff(swapped) == {"layers.0.mixer.branches": expected}


class TestSchema:
    def test_it_is_draft_2020_12(self) -> None:
        jsonschema.Draft202012Validator.check_schema(ModelSpec.model_json_schema())

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("widht", 3),
            ("width", 0),
            ("width", "16"),
            ("layers.0.mixr", MIXER),
            ("layers.0.mixer.gates", None),
            ("layers.0.mixer.kind", "gaeted"),
            ("layers.0.mixer.gate.granularity", "chanel"),
            ("layers.0.mixer.branches.mamba.headz", 3),
            ("layers.0.mixer.branches.attention.window", 0),
            ("layers.1", {"repeat": 0, "layers": [{}]}),
            ("layers.1", {"repeat": 2, "layers": [{}], "vry": {}}),
            ("encodings.time.kind", "srte"),
            ("encodings.time", {}),
            ("layers.1.ffn", {"hidden": 8}),
            ("layers.0.mixer.gate", {"granularity": "token"}),
        ],
    )
    def test_it_rejects_typos(self, path: str, value: Any) -> None:
        validator = jsonschema.Draft202012Validator(ModelSpec.model_json_schema())
        assert validator.is_valid(data())
        assert not validator.is_valid(edited(path, value))
