"""Bad specs: one line that says where, what was found, what is allowed, and the nearest right answer."""

from typing import Any

import pytest
from core_cases import ATTENTION, MAMBA, MIXER, MLP, complaint, data, edited

from fusiontree import LayerSpec, ModelSpec, Norm, Repeat, build
from fusiontree.branches import Attention, Mamba1, Mlp
from fusiontree.core.spec.base import OrderedMap, Spec
from fusiontree.errors import FusionTreeError, SpecError
from fusiontree.fusions import Gated

BRANCH = "layers.0.mixer.branches.attention"
GATE = "layers.0.mixer.gate"

CASES: list[tuple[str, str, Any, list[str]]] = [
    ("unknown top key", "widht", 3, ["widht: ", "'width'", "known: ", "vocab_size"]),
    ("unknown key", f"{BRANCH}.head", 3, [f"{BRANCH}.head: ", "'heads'", "known: ", "kv_heads"]),
    ("unknown kind", f"{BRANCH}.kind", "atention", [f"{BRANCH}.kind: ", "'atention'", "'attention'", "mamba2"]),
    ("unknown gate", f"{GATE}.kind", "softmx", [f"{GATE}.kind: ", "'softmax'", "hard_concrete"]),
    ("a kind of another family", f"{BRANCH}.kind", "sigmoid", [f"{BRANCH}.kind: ", "'sigmoid'", "known: "]),
    ("no kind", BRANCH, {"heads": 4}, [f"{BRANCH}: ", "'kind'", "attention"]),
    ("text for a node", BRANCH, "attention", [f"{BRANCH}: ", "'kind'", "found 'attention'"]),
    ("text for a number", f"{BRANCH}.heads", "4", [f"{BRANCH}.heads: ", "integer", "'4'"]),
    ("yes for a number", f"{BRANCH}.heads", True, [f"{BRANCH}.heads: ", "integer", "True"]),
    ("1 for yes", f"{BRANCH}.bias", 1, [f"{BRANCH}.bias: ", "true or false", "found 1"]),
    ("a real head count", f"{BRANCH}.heads", 4.0, [f"{BRANCH}.heads: ", "integer", "4.0"]),
    ("heads that do not divide", f"{BRANCH}.kv_heads", 3, [f"{BRANCH}.kv_heads: ", "4 ", "3 "]),
    ("more global heads than heads", f"{BRANCH}.global_heads", 5, [f"{BRANCH}.global_heads: ", "found 5", "4"]),
    ("more global kv heads", f"{BRANCH}.global_kv_heads", 3, [f"{BRANCH}.global_kv_heads: ", "found 3", "2"]),
    ("window 0", f"{BRANCH}.window", 0, [f"{BRANCH}.window: ", "1", "found 0"]),
    ("negative width", "width", -16, ["width: ", "1", "found -16"]),
    ("no layers at all", "layers", {}, ["layers: ", "found {}"]),
    ("groups that do not divide", "layers.0.mixer.branches.mamba.groups", 3, ["mamba.groups: ", "3 ", "4 "]),
    ("an infinite limit", "layers.0.mixer.branches.mamba.dt_limit", [float("inf"), None], ["dt_limit.0: ", "inf"]),
    ("a limit as text", "layers.0.mixer.branches.mamba.dt_limit", ["0.1", None], ["dt_limit.0: ", "'0.1'"]),
    ("limits the wrong way", "layers.0.mixer.branches.mamba.dt_limit", [0.5, 0.1], ["dt_limit: ", "0.5", "0.1"]),
    ("not a number", "embedding", {"multiplier": float("nan")}, ["embedding.multiplier: ", "finite", "nan"]),
    ("a number beyond floats", "embedding", {"multiplier": 10**400}, ["embedding.multiplier: "]),
    ("a width beyond memory", "width", 10**30, ["width: ", "found 1000"]),
    ("encoding nobody defined", f"{BRANCH}.encodings", ["tiem"], [f"{BRANCH}.encodings: ", "'tiem'", "'time'", "rope"]),
    ("encoding without a hook", "layers.1.ffn.encodings", ["rope"], ["layers.1.ffn.encodings: ", "rotate", "input"]),
    ("two rotations", f"{BRANCH}.encodings", ["rope", "turn"], [f"{BRANCH}.encodings: ", "rope, turn"]),
    ("rotation too wide", "encodings.rope.dim", 3, ["encodings.rope.dim: ", "2", "found 3"]),
    ("a word of a few", f"{GATE}.granularity", "chanel", [f"{GATE}.granularity: ", "'chanel'", "mean 'channel'"]),
    ("a gate on one branch", "layers.0.mixer.branches", {"mamba": MAMBA}, [f"{GATE}: ", "single branch"]),
    ("no gate for two", GATE, None, [f"{GATE}: ", "2 branches", "sigmoid"]),
    (
        "sigmoid over three",
        "layers.0.mixer.branches",
        {"a": MLP, "b": MLP, "c": MLP},
        [f"{GATE}.kind: ", "'sigmoid'", "found 3", "softmax"],
    ),
    (
        "head groups that do not divide",
        GATE,
        {"kind": "sigmoid", "granularity": "head", "heads": 3},
        [f"{GATE}.heads: ", "3 ", "16"],
    ),
    (
        "a constant for a stranger",
        GATE,
        {"kind": "constant", "values": {"mambo": 0.5, "attention": 0.5}},
        [f"{GATE}.values.mambo: ", "'mamba'", "attention"],
    ),
    (
        "a constant missing",
        GATE,
        {"kind": "constant", "values": {"mamba": 1.0}},
        [f"{GATE}.values: ", "none for attention"],
    ),
    (
        "constants that do not sum to 1",
        GATE,
        {"kind": "constant", "values": {"mamba": 0.5, "attention": 0.6}},
        [f"{GATE}.values: ", "sum to 1", "0.5", "0.6"],
    ),
    (
        "a negative constant",
        GATE,
        {"kind": "constant", "values": {"mamba": 1.5, "attention": -0.5}},
        [f"{GATE}.values: ", "at least 0", "-0.5"],
    ),
    ("heads of no head gate", f"{GATE}.heads", 4, [f"{GATE}.heads: ", "'channel'"]),
    ("no branches", "layers.0.mixer.branches", {}, ["layers.0.mixer.branches: ", "at least one"]),
    ("a name that is a path", "layers.0.mixer.branches", {"a.b": MLP}, ["a.b: ", "'a.b'"]),
    (
        "a layer of inner width",
        "layers.1.ffn",
        ATTENTION | {"heads": 6, "project": False},
        ["layers.1.ffn: ", "16", "24"],
    ),
    (
        "no branch for a multiplier",
        "layers.1.ffn",
        {"kind": "sum", "branches": {"a": MLP}, "multipliers": {"b": 1.0}},
        ["b: "],
    ),
    (
        "normed and post",
        "layers.1",
        {"placement": "post", "residual": {"from": "normed"}},
        ["residual.from: ", "sandwich"],
    ),
    ("another format", "format", 2, ["format: ", "1", "found 2"]),
    ("a key with a line break", "wi\ndth", 3, ["known: "]),
]


@pytest.mark.parametrize(("path", "value", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_value_is_named(path: str, value: Any, parts: list[str]) -> None:
    complaint(lambda: ModelSpec.parse(edited(path, value)), *parts)


@pytest.mark.parametrize("value", [None, [], 3, "spec"])
def test_a_spec_is_a_mapping(value: Any) -> None:
    complaint(lambda: ModelSpec.parse(value), "spec: ", repr(value))


def test_a_missing_key_is_named() -> None:
    whole = data()
    del whole["vocab_size"]
    complaint(lambda: ModelSpec.parse(whole), "vocab_size: ", "is needed")


def test_further_problems_are_counted() -> None:
    complaint(lambda: ModelSpec.parse(data(widht=3, dephth=4)), "widht", "1 more")


@pytest.mark.parametrize(
    "name", ["keys", "items", "type", "forward", "training", "float", "T_destination", "global", "lambda"]
)
@pytest.mark.parametrize("place", ["layers.0.mixer.branches", "encodings"])
def test_names_that_no_module_can_have_are_refused(name: str, place: str) -> None:
    mapping = {"encodings": {name: {"kind": "rope"}}}.get(place, {name: MAMBA, "attention": ATTENTION})
    complaint(lambda: ModelSpec.parse(edited(place, mapping)), f"{place}.{name}: ", "choose another")


@pytest.mark.parametrize("name", ["time", "branches", "mlp", "gate", "mixer", "kind", "A", "x_1"])
def test_other_names_build_whatever_they_are(name: str) -> None:
    branches = {name: MAMBA, "other": MLP}
    built = build(ModelSpec.parse(edited("layers.0.mixer", MIXER | {"branches": branches})), device="meta")
    assert any(key.startswith(f"layers.0.mixer.branches.{name}.") for key in built.state_dict())


def test_a_parameter_beyond_any_memory_is_refused() -> None:
    huge = ModelSpec.parse(data(width=2**30, encodings={}, layers=[{"ffn": MLP | {"hidden": 2**31 - 1}}]))
    complaint(lambda: build(huge), "weights: ", str(2**30))


REPEAT = {"repeat": 2, "layers": [{"mixer": MIXER}, {"ffn": MLP}]}
WINDOW = "0.mixer.branches.attention.window"
REPEATS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("never", {"repeat": 0}, ["layers.0.repeat: ", "1", "found 0"]),
    ("too few values", {"vary": {WINDOW: [3]}}, [f"vary.{WINDOW}: ", "2 values", "found 1"]),
    ("too many values", {"vary": {WINDOW: [3, 4, 5]}}, [f"vary.{WINDOW}: ", "2 values", "found 3"]),
    ("unknown path", {"vary": {"0.mixr.branches.attention.windw": [3, 4]}}, ["mixr", f"nearest is '{WINDOW}'"]),
    ("empty path", {"vary": {"": [3, 4]}}, ["vary: ", "matches nothing"]),
    ("bad value", {"vary": {WINDOW: [3, 0]}}, ["attention.window: ", "found 0"]),
    ("undefined encoding", {"vary": {"1.ffn.encodings": [[], ["tiem"]]}}, ["layers.3.ffn.encodings: ", "'time'"]),
    ("empty period", {"layers": []}, ["layers.0.layers: ", "found []"]),
    ("repeat in a repeat", {"layers": [REPEAT]}, ["repeat", "unknown key"]),
    ("unknown key", {"vry": {}}, ["layers.0.vry: ", "'vary'"]),
    ("more layers than any model", {"repeat": 10**9}, ["layers.0.repeat: ", str(2 * 10**9), "10000"]),
]


@pytest.mark.parametrize(("edits", "parts"), [case[1:] for case in REPEATS], ids=[case[0] for case in REPEATS])
def test_bad_repeat_is_named(edits: dict[str, Any], parts: list[str]) -> None:
    complaint(lambda: ModelSpec.parse(data(layers=[REPEAT | edits])), *parts)


def test_many_repeats_do_not_add_up_to_a_bomb() -> None:
    entry = {"repeat": 5000, "layers": [{}, {}]}
    complaint(lambda: ModelSpec.parse(data(layers=[entry] * 3)), "layers: ", "30000", "10000")


WRONG: list[tuple[type[Spec], dict[str, Any]]] = [
    (ModelSpec, data(width=0)),
    (ModelSpec, data(layerz=[])),
    (ModelSpec, {"width": 8}),
    (ModelSpec, data(layers=[{"mixer": {"kind": "attention", "heads": 0, "kv_heads": 1, "head_dim": 2}}])),
    (ModelSpec, data(layers=[{"mixer": {"kind": "atention"}}])),
    (ModelSpec, edited("layers.0.mixer.branches.mamba.groups", 3)),
    (LayerSpec, {"placement": "prr"}),
    (Repeat, {"repeat": 2, "layers": [{}], "vary": {"0.ffn": [1]}}),
    (Attention, {"heads": 4, "kv_heads": 3, "head_dim": 2}),
    (Norm, {"kind": "rmss"}),
    (Gated, {"branches": {"a": {"kind": "mlp", "hidden": True}}}),
]


@pytest.mark.parametrize(("kind", "fields"), WRONG)
def test_constructors_answer_with_the_line_that_files_get(kind: type[Spec], fields: dict[str, Any]) -> None:
    assert complaint(lambda: kind(**fields)) == complaint(lambda: kind.parse(fields))


def test_specs_inside_a_spec_keep_their_path() -> None:
    """Whether they were written as data or built in Python."""
    parts = {"mixer": {"kind": "mlp", "hidden": 0}}
    for layer in (parts, {"mixer": OrderedMap(kind="mlp", hidden=0)}):
        complaint(lambda layer=layer: ModelSpec(vocab_size=5, width=8, layers=(layer,)), "layers.0.mixer.hidden: ")
    complaint(
        lambda: ModelSpec(vocab_size=5, width=8, layers=(LayerSpec(mixer=Mlp(hidden=4, encodings=("no",))),)),
        "layers.0.mixer.encodings: ",
        "'no'",
    )


def test_a_missing_field_is_said_by_what_it_is() -> None:
    whole = edited(BRANCH, {"kind": "mamba1", "inner": 8, "state": 4})
    text = complaint(lambda: ModelSpec.parse(whole), f"{BRANCH}.rank: ", "expected the rank of the map that makes dt")
    assert text.endswith("found nothing")
    assert "makes dt" in str(Mamba1.model_json_schema()["properties"]["rank"])


def test_all_problems_are_kept_beside_the_first() -> None:
    whole = data() | {"widht": 3, "vocab_size": "x"}
    whole["layers"] = [{"repeat": 2, "layers": [{"mixer": {"kind": "mlp", "hiden": 8}, "fn": None}]}]
    with pytest.raises(SpecError) as caught:
        ModelSpec.parse(whole)
    starts = [problem.split(": ")[0] for problem in caught.value.problems]
    assert starts == ["widht", "vocab_size", "layers.0.fn", "layers.0.mixer.hiden", "layers.0.mixer.hidden"]
    assert str(caught.value) == f"{caught.value.problems[0]} (and 4 more)"


def test_names_and_texts_are_no_specs_and_no_edits() -> None:
    given: list[Any] = ["quickstart", "layers.0.ffn=null"]
    with pytest.raises(FusionTreeError, match="build: expected a ModelSpec, found 'quickstart'; load_spec reads"):
        build(given[0])
    complaint(lambda: ModelSpec.parse(data()).replace(given[1]), "replace: expected a mapping from paths to values")
