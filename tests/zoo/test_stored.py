"""Nothing in a checkpoint's files is left unread: what we compute, or know by another name, has to be the same there,
and what cannot be kept is refused before anything is written."""

import json
import re

import pytest
import torch
import transformers
from public import CONFIGS, config_of, pair
from safetensors.torch import load_file, save_file

import fusiontree as ft
from fusiontree.errors import FusionTreeError, WeightsError
from fusiontree.zoo import family_of
from fusiontree.zoo.computed import check_computed
from fusiontree.zoo.directory import import_model, left_behind

HEAD = "lm_head.weight"
TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE_OF_EACH = {family: name for name, (family, _) in reversed(CONFIGS.items())}
SPECS = {name: family_of(family).spec_of(config_of(name).to_dict()) for name, (family, _) in CONFIGS.items()}
ROTATED = {(CONFIGS[name][0], str(spec.encodings)): name for name, spec in SPECS.items() if spec.encodings}
"""A name for each kind of rotation of each family."""
TIED = {CONFIGS[name][0]: name for name, spec in SPECS.items() if spec.head.tied and CONFIGS[name][0] != "zamba2"}
"""Of each family that can have a head of its own where its config says that it has none."""


def frequencies(both):
    """What transformers computes, under the names that files before 4.30 have: one for each attention module."""
    here = {name: tensor for name, tensor in both.theirs.named_buffers() if name.endswith("inv_freq")}
    found = {}
    for name in both.theirs.state_dict():
        module = re.fullmatch(r"(.*\.(\d+)\.(?!linear_attn).*)k_proj\.weight", name)
        if module and here:
            kind = f"{both.config['layer_types'][int(module[2])]}_" if both.family.name == "gemma3_text" else ""
            own = here.get(f"{module[1]}rotary_emb.inv_freq", here.get(f"model.rotary_emb.{kind}inv_freq"))
            found[f"{module[1]}rotary_emb.inv_freq"] = own
    return found


@pytest.mark.parametrize("name", ROTATED.values())
def test_stored_frequencies_are_those_that_are_computed(name):
    both = pair(name)
    stored = frequencies(both)
    assert stored
    wanted = both.family.weights_of(both.config, both.theirs.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        rounded = {key: tensor.to(dtype) for key, tensor in stored.items()}
        found = both.family.weights_of(both.config, both.theirs.state_dict() | rounded)
        assert found.keys() == wanted.keys()
    for key, tensor in stored.items():
        for other in (tensor * 1.001, tensor[:-1], torch.zeros_like(tensor), tensor.long()):
            with pytest.raises(WeightsError, match=re.escape(f"{key!r} has other frequencies than the rotation")):
                both.family.weights_of(both.config, both.theirs.state_dict() | stored | {key: other})


def test_frequencies_belong_to_their_layer():
    both = pair("gemma3_text")
    stored = frequencies(both)
    local, whole = (next(key for key in stored if f".{index}." in key) for index in (0, 5))
    assert not torch.equal(stored[local], stored[whole])
    with pytest.raises(WeightsError, match="other frequencies"):
        both.family.weights_of(both.config, both.theirs.state_dict() | {local: stored[whole]})


@pytest.mark.parametrize("name", ["jamba", "granitemoehybrid", "nemotron_h", "kimi_linear"])
def test_frequencies_where_nothing_rotates_are_refused(name):
    both = pair(name)
    module = next(key for key in both.theirs.state_dict() if "q_proj.weight" in key).removesuffix("q_proj.weight")
    with pytest.raises(WeightsError, match="inv_freq' is not one that the config asks for"):
        both.family.weights_of(both.config, both.theirs.state_dict() | {f"{module}rotary_emb.inv_freq": torch.ones(4)})


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_a_tensor_that_nobody_reads_is_refused_in_every_family(name):
    both = pair(name)
    for extra in ("model.layers.0.extra", "lm_head.bias", "extra"):
        with pytest.raises(WeightsError, match=f"tensor '{extra}' is not one that the config asks for"):
            both.family.weights_of(both.config, both.theirs.state_dict() | {extra: torch.ones(2)})


@pytest.mark.parametrize("name", ["slope_rate", "query_decay", "key_decay", "diagonal_decay"])
def test_decays_that_transformers_stores_are_those_that_follow_from_the_config(name):
    both = pair("minimax")
    theirs = both.theirs.state_dict()
    key = next(key for key in theirs if key.endswith(name))
    for other in (theirs[key] * 1.01, theirs[key][None]):
        with pytest.raises(WeightsError, match=f"{name}' has other values than those that follow from the config"):
            both.family.weights_of(both.config, theirs | {key: other})


def test_decays_of_real_sizes():
    family = pair("minimax").family
    types = ["linear_attention"] * 80
    sizes = {"hidden_size": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 1}
    config = transformers.MiniMaxConfig(**sizes, num_hidden_layers=80, layer_types=types)
    computed = family.computed(family.options(config.to_dict()))
    for layer in (0, 79):
        module = transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention(config, layer)
        for name, tensor in module.named_buffers():
            wanted = computed[f"model.layers.{layer}.self_attn.{name}"]()
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-3, atol=1e-44)


def test_decays_of_a_model_that_was_built_in_half_precision():
    family = pair("minimax").family
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    config = transformers.MiniMaxConfig(**sizes, num_hidden_layers=4, layer_types=["linear_attention"] * 4)
    wanted, previous = family.computed(family.options(config.to_dict())), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = transformers.models.minimax.modeling_minimax.MiniMaxLightningAttention(config, 3)
    finally:
        torch.set_default_dtype(previous)
    theirs = {f"model.layers.3.self_attn.{name}": tensor for name, tensor in module.named_buffers()}
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    assert check_computed(theirs, wanted) == set(theirs)
    key = "model.layers.3.self_attn.query_decay"
    with pytest.raises(WeightsError, match="query_decay"):
        check_computed({key: theirs[key] * 1.1}, wanted)


def test_a_part_that_predicts_further_tokens_is_left_out_with_a_note(tmp_path):
    both = pair("qwen3_next")
    both.theirs.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": torch.ones(2, 2), "mtp.norm.weight": torch.ones(2)}, file)
    spec = import_model(tmp_path / "theirs", tmp_path / "ours")
    assert spec.lineage[-1].edit == "imported from qwen3_next, without mtp.* (2 tensors)"
    with pytest.raises(WeightsError, match=r"'mtp\.x' is not one"):
        pair("llama").family.weights_of(
            pair("llama").config, pair("llama").theirs.state_dict() | {"mtp.x": torch.ones(1)}
        )


@pytest.fixture
def theirs(tmp_path):
    """A tiny Llama whose config ties its head."""
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=4, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def change(directory, **tensors):
    """Other tensors in the file; returns all of them."""
    file = directory / "model.safetensors"
    found = load_file(file) | tensors
    save_file(found, file, {"format": "pt"})
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", TIED.values())
def test_a_head_in_the_files_of_a_tied_model_is_read(name, tmp_path):
    """As transformers 5 reads it: the embedding where they are equal, a head of its own where they are not."""
    both = pair(name)
    both.theirs.save_pretrained(tmp_path / "theirs")
    embedding = both.theirs.get_input_embeddings().weight
    change(tmp_path / "theirs", **{HEAD: embedding.clone()})
    same = import_model(tmp_path / "theirs", tmp_path / "same")
    assert same == both.ours.spec
    assert same.lineage[-1].edit == f"imported from {both.family.name}"
    other = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    change(tmp_path / "theirs", **{HEAD: other})
    spec = import_model(tmp_path / "theirs", tmp_path / "own")
    assert "with the head of its files, which its config ties to another embedding" in spec.lineage[-1].edit
    ours = ft.load(tmp_path / "own")
    assert torch.equal(ours.head.weight, other)
    assert torch.equal(ours.embedding.weight, embedding)
    tokens = torch.arange(12)[None]
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager")
    torch.testing.assert_close(ours(tokens), wanted.eval()(tokens, use_cache=False).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantised", [False, True], ids=["", "with a quantization_config"])
@pytest.mark.parametrize(
    ("dtype", "called"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
    ],
    ids=str,
)
def test_quantised_tensors_are_one_line_and_nothing_is_written(theirs, tmp_path, dtype, called, quantised):
    change(theirs, **{name: tensor.to(dtype) for name, tensor in load_file(theirs / "model.safetensors").items()})
    ignore = ["quantization_config"] if quantised else []
    if quantised:
        config = json.loads((theirs / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
        (theirs / "config.json").write_text(json.dumps(config))
        with pytest.raises(FusionTreeError, match=r"quantization_config: .* dequantise them first"):
            import_model(theirs, tmp_path / "out")
    with pytest.raises(WeightsError) as caught:
        import_model(theirs, tmp_path / "out", ignore=ignore)
    assert f"holds {called}, allowed are F64, F32, BF16, F16; quantised weights have to be" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_load_would_refuse_is_refused_at_import(theirs, tmp_path, value):
    weight = load_file(theirs / "model.safetensors")["model.norm.weight"]
    weight[3] = value
    change(theirs, **{"model.norm.weight": weight})
    with pytest.raises(WeightsError, match=r"'norm\.weight' holds a value that is not finite"):
        import_model(theirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_files_is_refused(theirs, tmp_path):
    tensors = load_file(theirs / "model.safetensors")
    (theirs / "model.safetensors").unlink()
    save_file(tensors, theirs / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, theirs / "b.safetensors")
    index = {name: "a.safetensors" for name in tensors} | {"model.norm.weight": "b.safetensors"}
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(WeightsError, match=r"b\.safetensors: tensor 'model\.norm\.weight' stands in another file too"):
        import_model(theirs, tmp_path / "out")


def test_adapters_beside_the_weights_are_refused_as_transformers_would_add_them(theirs, tmp_path):
    (theirs / "adapter_config.json").write_text("{}")
    with pytest.raises(FusionTreeError, match=r"adapter_config\.json: adapters beside the weights are not read; merge"):
        import_model(theirs, tmp_path / "out")


def test_what_is_not_carried_along_is_known(theirs):
    for name in ("README.md", "tokenizer.json", "modeling.py"):
        (theirs / name).write_text("{}")
    (theirs / "original").mkdir()
    assert left_behind(theirs) == ["README.md", "modeling.py", "original/"]


def test_ignored_keys_stand_in_the_lineage(theirs, tmp_path):
    config = json.loads((theirs / "config.json").read_text()) | {"novel": 1, "other": 2}
    (theirs / "config.json").write_text(json.dumps(config))
    spec = import_model(theirs, tmp_path / "out", ignore=["other", "novel"])
    edit = "imported from llama, passing over the config's novel, passing over the config's other"
    assert spec.lineage[-1].edit == edit
    assert ft.load(tmp_path / "out").spec.lineage == spec.lineage
