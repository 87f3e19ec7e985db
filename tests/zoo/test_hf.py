"""Any spec as a model of transformers: the same function, generation, saving, training, LoRA, export."""

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import fusiontree as ft
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model, import_model
from fusiontree.zoo.hf import FusionTreeCache, FusionTreeConfig, FusionTreeForCausalLM

ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "window": 6, "encodings": ["rope"]}
ATTENTION |= {"global_heads": 2, "global_kv_heads": 1}
MAMBA = {"kind": "mamba2", "heads": 4, "head_dim": 8, "state": 8, "encodings": ["rope"]}
MIXER = {"kind": "gated", "branches": {"mamba": MAMBA, "attention": ATTENTION}, "gate": {"kind": "sigmoid"}}
LAYERS = [{"repeat": 2, "layers": [{"mixer": MIXER, "ffn": {"kind": "swiglu", "hidden": 48}}]}]
PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11]]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}


def spec(**head: Any) -> ft.ModelSpec:
    rope = {"rope": {"kind": "rope"}}
    return ft.ModelSpec.parse({"vocab_size": 61, "width": 32, "encodings": rope, "layers": LAYERS, "head": head})


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "head of its own"])
def both(request) -> tuple[ft.LanguageModel, FusionTreeForCausalLM]:
    shape = spec(tied=request.param)
    config = FusionTreeConfig(shape, seed=3)
    return ft.build(shape, seed=3).eval(), transformers.AutoModelForCausalLM.from_config(config).eval()


def ids(rows: int, time: int) -> Tensor:
    return torch.randint(1, 61, (rows, time), generator=torch.Generator().manual_seed(0))


def padded() -> tuple[Tensor, Tensor]:
    """The prompts behind padding, and its mask."""
    longest = max(map(len, PROMPTS))
    rows = [
        ([0] * (longest - len(prompt)) + prompt, [0] * (longest - len(prompt)) + [1] * len(prompt))
        for prompt in PROMPTS
    ]
    return torch.tensor([row for row, _ in rows]), torch.tensor([mask for _, mask in rows])


@torch.no_grad()
def test_it_is_the_same_function(both):
    ours, theirs = both
    assert torch.equal(theirs(ids(2, 20)).logits, ours(ids(2, 20)))
    torch.testing.assert_close(theirs(ids(2, 20), logits_to_keep=3).logits, ours(ids(2, 20))[:, -3:])


def test_the_loss_is_that_of_shifted_labels(both):
    ours, theirs = both
    tokens = ids(2, 20)
    labels = tokens.masked_fill(tokens > 50, -100)
    found = theirs(tokens, labels=labels).loss
    targets = labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(ours(tokens)[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_unequal_prompts_continue_as_each_alone(both):
    ours, theirs = both
    rows, mask = padded()
    found = theirs.generate(rows, attention_mask=mask, **GREEDY)[:, rows.shape[1] :]
    alone = ours.generate(PROMPTS, max_new_tokens=12)
    assert found.tolist() == [row[len(prompt) :] for row, prompt in zip(alone, PROMPTS, strict=True)]


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prefill_chunk_size": 4}, {"num_return_sequences": 2, "num_beams": 2}], ids=str
)
@torch.no_grad()
def test_ways_of_generating_do_not_depend_on_the_cache(both, options):
    _, theirs = both
    rows, mask = padded()
    bare = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    found = theirs.generate(rows, attention_mask=mask, **GREEDY, **options)
    assert torch.equal(found, theirs.generate(rows, attention_mask=mask, use_cache=False, **GREEDY, **bare))


@torch.no_grad()
def test_sampling_draws_the_same_with_and_without_a_cache(both):
    _, theirs = both
    rows, mask = padded()
    options = GREEDY | {"do_sample": True, "temperature": 0.9, "top_k": 20}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(theirs.generate(rows, attention_mask=mask, use_cache=use_cache, **options))
    assert torch.equal(*drawn)


@torch.no_grad()
def test_positions_that_restart_are_documents(both):
    ours, theirs = both
    tokens = ids(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    parts = [ours(part) for part in tokens.split([12, 8], 1)]
    torch.testing.assert_close(theirs(tokens, position_ids=positions).logits, torch.cat(parts, 1))


def test_checkpointing_gives_the_same_gradients(both):
    _, theirs = both
    tokens, found = ids(2, 20), []
    theirs.train()
    for change in (theirs.gradient_checkpointing_enable, theirs.gradient_checkpointing_disable):
        change()
        assert theirs.is_gradient_checkpointing == (change == theirs.gradient_checkpointing_enable)
        theirs.zero_grad()
        theirs(tokens, labels=tokens).loss.backward()
        found.append([parameter.grad for parameter in theirs.parameters()])
    theirs.eval().zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(both, tmp_path):
    ours, theirs = both
    theirs.save_pretrained(tmp_path / "theirs")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert again.model.spec == ours.spec
    assert torch.equal(again(ids(2, 20)).logits, ours(ids(2, 20)))
    assert import_model(tmp_path / "theirs", tmp_path / "ours") == ours.spec
    assert torch.equal(ft.load(tmp_path / "ours")(ids(2, 20)), ours(ids(2, 20)))
    export_model(tmp_path / "ours", tmp_path / "back", family_of("fusiontree"))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(back(ids(2, 20)).logits, ours(ids(2, 20)))
    native = FusionTreeForCausalLM.from_directory(tmp_path / "ours")
    assert torch.equal(native(ids(2, 20)).logits, ours(ids(2, 20)))


def test_lora_adapts_every_linear_map(both):
    _, theirs = both
    tokens = ids(2, 20)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(theirs.config).eval(), config)
    with torch.no_grad():
        assert torch.equal(adapted(tokens).logits, theirs(tokens).logits)
    names = {name.split(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert len(names) == sum(isinstance(part, torch.nn.Linear) for part in theirs.modules())
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        losses.append(adapted(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        wanted = adapted(tokens).logits
        torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lora_reaches_shared_nodes_where_they_are_used():
    adapter = {"both": {"maps": ["gate", "up"], "rank": 2}}
    uses = [{"ffn": {"kind": "use", "of": "block", "adapters": found}} for found in (adapter, {})]
    shared = {"block": {"kind": "swiglu", "hidden": 8}}
    spec = ft.ModelSpec.parse({"vocab_size": 11, "width": 16, "shared": shared, "layers": uses})
    model = transformers.AutoModelForCausalLM.from_config(FusionTreeConfig(spec)).eval()
    tokens, config = torch.arange(11)[None], peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = model(tokens).logits
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "shared" in name and "lora_B" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    found = adapted(tokens).logits
    assert not torch.allclose(found, plain)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.model(tokens), found, rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_one_line(both):
    _, theirs = both
    with pytest.raises(FusionTreeError, match="inputs_embeds: models of FusionTree read input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(FusionTreeError, match="past_key_values: a FusionTreeCache is needed, found DynamicCache"):
        theirs(ids(1, 3), past_key_values=transformers.DynamicCache())
    assert FusionTreeCache().get_seq_length() == 0
