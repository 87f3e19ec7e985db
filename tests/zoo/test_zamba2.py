"""Zamba2's configs, and its files, in which a shared block may stand once or in every layer that uses it."""

import json

import pytest
import torch
import transformers
from public import MORE_OF_ZAMBA2, ZAMBA2, pair
from safetensors.torch import load_file, save_file

import fusiontree as ft
from fusiontree.errors import FusionTreeError, WeightsError
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model, import_model
from fusiontree.zoo.hf import FusionTreeConfig, FusionTreeForCausalLM

HYBRID = [6, 12, 18, 24, 30, 36, 42, 47, 51]
ZAMBA2_2B = {
    **{"architectures": ["Zamba2ForCausalLM"], "model_type": "zamba2", "torch_dtype": "bfloat16"},
    **{"adapter_rank": 128, "add_bias_linear": False, "attention_dropout": 0.0, "attention_head_dim": 160},
    **{"attention_hidden_size": 5120, "bos_token_id": 1, "chunk_size": 256, "eos_token_id": 2, "hidden_act": "gelu"},
    **{"hidden_size": 2560, "hybrid_layer_ids": HYBRID, "initializer_range": 0.02, "intermediate_size": 10240},
    **{"kv_channels": 80, "layers_block_type": ["hybrid" if n in HYBRID else "mamba" for n in range(54)]},
    **{"mamba_d_conv": 4, "mamba_d_state": 64, "mamba_expand": 2, "mamba_headdim": 64, "mamba_ngroups": 1},
    **{"max_position_embeddings": 4096, "n_mamba_heads": 80, "num_attention_heads": 32, "num_hidden_layers": 54},
    **{"num_key_value_heads": 32, "num_logits_to_keep": 1, "num_mem_blocks": 2, "num_query_groups": 32},
    **{"pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_theta": 10000, "time_step_floor": 1e-4, "time_step_max": 0.1},
    **{"time_step_limit": None, "time_step_min": 0.001, "use_cache": True, "use_conv_bias": True, "vocab_size": 32000},
    **{"use_long_context": False, "use_mamba_kernels": True, "use_mem_eff_path": False, "use_mem_rope": False},
    "use_shared_attention_adapter": False,
}
"""In the form of Zyphra/Zamba2-2.7B."""


def test_a_published_config():
    family = family_of("zamba2")
    spec = family.spec_of(ZAMBA2_2B)
    uses = {path: node.of for path, node in spec.nodes() if isinstance(node, ft.branches.Use)}
    assert list(uses) == [f"layers.{n}.mixer.branches.block" for n in HYBRID]
    assert list(uses.values()) == ["block0", "block1"] * 4 + ["block0"]
    assert not spec.encodings
    assert 2.6e9 < sum(p.numel() for p in ft.build(spec, device="meta").parameters()) < 2.7e9
    assert family.spec_of(family.config_of(spec)) == spec
    assert family.spec_of(transformers.AutoConfig.for_model(**ZAMBA2_2B).to_dict()) == spec


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_mem_blocks": 0}, "num_mem_blocks: expected a whole number of at least 1, found 0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: found False, zamba2 is known with True"),
        (
            {"use_mem_rope": True, "use_long_context": True},
            "use_long_context: found True, zamba2 is known with False",
        ),
        ({"use_mem_rope": "no"}, "use_mem_rope: found 'no', zamba2 is known with False or True"),
        ({"layers_block_type": ["hybrid", "attention"]}, "layers_block_type: zamba2 knows no layer 'attention'"),
        ({"num_hidden_layers": 7}, "num_hidden_layers: found 7, zamba2 is known with 6"),
        ({"hybrid_layer_ids": [1]}, "hybrid_layer_ids: found [1], zamba2 is known with [1, 2, 4, 5]"),
        ({"mamba_headdim": 16}, "mamba_headdim: found 16, zamba2 is known with 8"),
        ({"n_mamba_heads": 7}, "n_mamba_heads: 7 heads do not divide 96 features"),
        ({"attention_head_dim": 8}, "attention_head_dim: found 8, zamba2 is known with 16"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number of at least 1, found 0"),
        ({"hidden_act": "silu"}, "hidden_act: found 'silu', zamba2 is known with 'gelu'"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit: found [0.0, 0.1], zamba2 is known with None"),
        (
            {"use_shared_attention_adapter": True, "num_key_value_heads": 2},
            "use_shared_attention_adapter: needs as many key-value heads as there are heads",
        ),
        ({"sliding_window": 8}, "sliding_window: zamba2 is not known to have it, found 8"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_config_that_does_not_fit_is_one_line(changes, line):
    with pytest.raises(FusionTreeError) as caught:
        family_of("zamba2").spec_of(ZAMBA2 | changes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_block_that_serves_once_needs_no_tied_head():
    spec = family_of("zamba2").spec_of(ZAMBA2 | {"tie_word_embeddings": False, "num_mem_blocks": 4})
    assert not spec.head.tied


@pytest.mark.parametrize(
    ("edits", "line"),
    [
        ({"layers.2.mixer.branches.block.of": "block0"}, r"layers\.2\.mixer\.branches\.block\.of: zamba2 has 'block1'"),
        (
            {"layers.4.mixer.branches.block.adapters.gate_up.rank": 6},
            r"layers\.4\.mixer\.branches\.block\.adapters\.gate_up\.rank: zamba2 has 5 there, found 6",
        ),
        ({"shared.block1.links.attention.window": 8}, r"shared\.block1\.links\.attention\.window: zamba2 has nothing"),
        ({"layers.2.mixer": None}, r"layers\.2\.mixer: zamba2 has mamba2 there, found nothing"),
        ({"layers.2.placement": "pre"}, r"layers\.2\.placement: zamba2 has 'none' there, found 'pre'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_the_family_cannot_express_names_the_node(edits, line):
    family = family_of("zamba2")
    with pytest.raises(FusionTreeError, match=line):
        family.config_of(family.spec_of(ZAMBA2).replace(edits))


BOTH = "zamba2, three blocks, adapted attention, rope, another width, limit, biases"
LATER = "model.layers.5.shared_transformer."
FIRST = "model.layers.1.shared_transformer."
"""The first of three blocks is also the fourth."""


def whole(both, directory):
    """Theirs with a tensor for every name."""
    tensors = {name: tensor.clone() for name, tensor in both.theirs.state_dict().items()}
    both.theirs.config.save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors")
    return tensors


def imported(both, directory, tensors, target):
    save_file(tensors, directory / "model.safetensors")
    import_model(directory, target)
    ours = ft.load(target).state_dict()
    wanted = both.ours.state_dict()
    return list(ours) == list(wanted) and all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


def test_a_shared_block_may_stand_under_any_of_its_names_or_all(tmp_path):
    both = pair(BOTH)
    every = whole(both, tmp_path)
    assert every.keys() > load_like_transformers(both, tmp_path / "theirs").keys()
    once = {name: tensor for name, tensor in every.items() if not name.startswith((LATER, "lm_head"))}
    renamed = {name.replace(FIRST, LATER): tensor for name, tensor in once.items()}
    assert renamed.keys() != once.keys()
    for number, tensors in enumerate((every, once, renamed)):
        assert imported(both, tmp_path, tensors, tmp_path / str(number))


def load_like_transformers(both, directory):
    both.theirs.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        *(f"{LATER}self_attn.q_proj.weight", f"{LATER}pre_ff_layernorm.weight", "lm_head.weight"),
        f"{LATER}feed_forward.gate_up_proj_adapter_list.0.1.weight",  # of another use
    ],
)
def test_copies_that_differ_are_one_line(tmp_path, name):
    tensors = whole(pair(BOTH), tmp_path)
    tensors[name].flatten()[-1] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        import_model(tmp_path, tmp_path / "out")
    first = "model.embed_tokens.weight" if name == "lm_head.weight" else name.replace(LATER, FIRST)
    assert {str(caught.value)} <= {
        f"tensor {one!r} has other values than {other!r}, which is the same one"
        for one, other in ((name, first), (first, name))
    }
    assert not (tmp_path / "out").exists()


def test_a_block_that_is_not_there_and_an_adapter_of_another_block_are_one_line(tmp_path):
    both = pair("zamba2")
    theirs = dict(both.theirs.state_dict())
    with pytest.raises(WeightsError, match=rf"'{FIRST}self_attn\.q_proj\.weight' is missing"):
        both.family.weights_of(both.config, {k: v for k, v in theirs.items() if not k.endswith("q_proj.weight")})
    strange = f"{FIRST}feed_forward.gate_up_proj_adapter_list.1.0.weight"
    with pytest.raises(WeightsError, match=rf"'{strange}' is not one that the config asks for"):
        both.family.weights_of(both.config, theirs | {strange: torch.zeros(5, 48)})


@torch.no_grad()
@pytest.mark.parametrize("name", ["zamba2", BOTH])
def test_files_of_transformers_are_read_and_ours_by_transformers(name, tmp_path):
    both = pair(name)
    before = load_like_transformers(both, tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", both.family)
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    tokens = torch.arange(60).reshape(2, 30)
    wanted = both.theirs(tokens, use_cache=False).logits
    for found in (ft.load(tmp_path / "ours")(tokens), again(tokens, use_cache=False).logits):  # chunks differ
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max())))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_mem_blocks"] in (2, 3)


@torch.no_grad()
def test_our_class_of_transformers_keeps_shared_blocks_once(tmp_path):
    ours, tokens = pair("zamba2").ours, torch.arange(40).reshape(2, 20)
    model = FusionTreeForCausalLM(FusionTreeConfig(ours.spec))
    model.model.load_state_dict(ours.state_dict())
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) == len(ours.state_dict())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, ours(tokens))


def test_uses_of_a_block_are_counted_over_all_blocks():
    """Rotated by one, the adapters would be those of other uses."""
    family = family_of("zamba2")
    names = {theirs for part in family.tensors(family.spec_of(ZAMBA2)) for theirs in part.names()}
    found = sorted(name for name in names if "adapter_list" in name and name.endswith(".0.weight"))
    inside = "feed_forward.gate_up_proj_adapter_list"
    assert found == [f"model.layers.{layer}.shared_transformer.{inside}.{use}.0.weight" for layer, use in USES]
    more = family.spec_of(ZAMBA2 | MORE_OF_ZAMBA2)
    assert len([part for part in family.tensors(more) if "adapter" in part.names()[0]]) == 4 * 4 * 2


USES = [(1, 0), (1, 2), (2, 1), (2, 3)]
"""The layer under whose name a block stands, and the use."""
