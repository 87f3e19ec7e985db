"""Reading and writing transformers' directories: bitwise, and one line for what is wrong with one."""

import json
import shutil

import pytest
import torch
import transformers
from public import pair
from safetensors.torch import load_file, save_file

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model, import_model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A model in one file, and in several."""
    folder = tmp_path_factory.mktemp("theirs")
    model = pair("falcon_h1").theirs
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="100KB")
    return folder


@pytest.fixture
def copy(theirs, tmp_path):
    """A copy to damage."""
    return shutil.copytree(theirs / "one", tmp_path / "copy")


def edit(directory, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@torch.no_grad()
def test_one_file_and_many_give_the_same_model_and_it_is_theirs(theirs, tmp_path):
    specs = [import_model(theirs / name, tmp_path / name) for name in ("one", "many")]
    assert len(list((theirs / "many").glob("*.safetensors"))) > 1
    assert specs[0] == specs[1]
    assert specs[0].lineage[0].edit == "imported from falcon_h1"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "many")]
    assert files[0] == files[1]
    tokens = torch.arange(60).reshape(2, 30)
    wanted = pair("falcon_h1").theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(ft.load(tmp_path / "one")(tokens), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


def test_import_and_export_give_back_every_bit(theirs, tmp_path):
    import_model(theirs / "one", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", family_of("falcon_h1"))
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs / "one", tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.ssm_in_multiplier == 1.2


@torch.no_grad()
@pytest.mark.parametrize("name", ["jamba, experts", "granitemoehybrid, experts", "nemotron_h, experts"])
def test_tensors_that_are_named_otherwise_in_files(name, tmp_path):
    family, _, ours, theirs = pair(name)
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    assert load_file(tmp_path / "theirs" / "model.safetensors").keys() != theirs.state_dict().keys()
    state = ft.load(tmp_path / "ours").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in ours.state_dict().items())
    export_model(tmp_path / "ours", tmp_path / "back", family)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in theirs.state_dict().items())


def test_bfloat16_stays_bfloat16(theirs, copy, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors")
    import_model(copy, tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", family_of("falcon_h1"))
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def refused(directory, tmp_path):
    """The one line that importing answers with; nothing is written."""
    with pytest.raises(FusionTreeError) as caught:
        import_model(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "falcon_h2"}, "model_type: no family is called 'falcon_h2', did you mean 'falcon_h1'?"),
        ({"model_type": ...}, "model_type: no family is called None"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act: found 'gelu', falcon_h1 is known with 'silu'"),
        ({"mamba_n_heads": ...}, "config.json: falcon_h1 needs 'mamba_n_heads'"),
        ({"sliding_window": 5}, "config.json: sliding_window: falcon_h1 is not known to have it, found 5"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "config.json: rope_parameters.rope_type: found 'dynamic', falcon_h1 is known with 'default' or 'linear'",
        ),
        ({"mamba_d_state": 17}, "tensor 'model.layers.0.mamba.in_proj.weight': found 268 rows, the config says 272"),
        ({"intermediate_size": 81}, "tensor 'layers.0.ffn.gate.weight' has the shape (80, 48), the spec says (81, 48)"),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 1}, "is not one that the config asks for"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"mlp_multipliers": 3}, "config.json: mlp_multipliers: falcon_h1 cannot read 3"),
        (
            {"num_attention_heads": 0},
            "config.json: num_attention_heads: expected a whole number of at least 1, found 0",
        ),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"ssm_multipliers": [1, 2]}, "config.json: ssm_multipliers: falcon_h1 cannot read [1, 2]"),
        ({"time_step_limit": 3}, "config.json: time_step_limit: falcon_h1 cannot read 3"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_one_line(copy, tmp_path, changes, line):
    edit(copy, **changes)
    found = refused(copy, tmp_path)
    assert line in found
    assert "\n" not in found


def test_code_beside_the_weights_is_passed_over(copy, tmp_path):
    edit(copy, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    import_model(copy, tmp_path / "out")


@pytest.mark.parametrize("name", ["../one/model.safetensors", "/etc/passwd", "sub/x.safetensors", 3])
def test_an_index_that_points_elsewhere_is_refused(theirs, tmp_path, name):
    many = shutil.copytree(theirs / "many", tmp_path / "copy")
    index = many / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(data))
    assert f"'lm_head.weight': expected a file in the directory, found {name!r}" in refused(many, tmp_path)


def test_damaged_directories_are_one_line(theirs, copy, tmp_path):
    assert "it has no config.json" in refused(tmp_path, tmp_path)
    many = shutil.copytree(theirs / "many", tmp_path / "many")
    next(many.glob("*.safetensors")).unlink()
    assert "missing, truncated or not safetensors" in refused(many, tmp_path)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "missing, truncated or not safetensors" in refused(copy, tmp_path)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickled weights (.bin) could run code and are not read" in refused(copy, tmp_path)
    (copy / "config.json").write_text("{")
    assert "not JSON" in refused(copy, tmp_path)
    (copy / "config.json").write_text("[]")
    assert "expected an object, found list" in refused(copy, tmp_path)


def test_a_spec_that_a_family_cannot_express_names_the_node(theirs, tmp_path):
    import_model(theirs / "one", tmp_path / "ours")
    with pytest.raises(FusionTreeError, match=r"layers\.0\.mixer: llama has attention there, found sum"):
        export_model(tmp_path / "ours", tmp_path / "out", family_of("llama"))
    model = ft.load(tmp_path / "ours")
    odd = model.spec.replace({"layers.1.mixer.branches.attention.window": 7})
    with pytest.raises(FusionTreeError, match=r"layers\.1\.mixer\.branches\.attention\.window: falcon_h1 has nothing"):
        family_of("falcon_h1").config_of(odd)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FusionTreeError, match="is not an empty directory"):
        export_model(tmp_path / "ours", tmp_path / "full", family_of("falcon_h1"))
