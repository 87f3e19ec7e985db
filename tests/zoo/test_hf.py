"""Any spec as a model of transformers: the same function, generation, saving, training, LoRA, export."""

from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import fusiontree as ft
from fusiontree.core.model.prefix import PrefixSpec
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model, import_model
from fusiontree.zoo.hf import FusionTreeConfig, FusionTreeForCausalLM
from fusiontree.zoo.hf_cache import FusionTreeCache
from fusiontree.zoo.presets import load_spec

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
    with pytest.raises(FusionTreeError, match="past_key_values: expected a FusionTreeCache, found DynamicCache"):
        theirs(ids(1, 3), past_key_values=transformers.DynamicCache())
    assert FusionTreeCache().get_seq_length() == 0


def fresh(**head: Any) -> FusionTreeForCausalLM:
    return transformers.AutoModelForCausalLM.from_config(FusionTreeConfig(spec(**head), seed=3)).eval()


class TestPackedSamples:
    MASK = torch.tensor([[1] * 5 + [2] * 7 + [3] + [0] * 2, [0] + [1] * 4 + [2] * 10])
    PIECES = ((0, 0, 5), (0, 5, 12), (0, 12, 13), (1, 1, 5), (1, 5, 15))

    @torch.no_grad()
    @pytest.mark.parametrize(
        "given",
        [
            {"attention_mask": MASK},
            {"attention_mask": MASK.double()},
            {"attention_mask": MASK.bool(), "position_ids": (MASK > 0).cumsum(1) - torch.tensor([[1], [1]])},
            {"attention_mask": MASK.bool(), "seq_idx": MASK - 1},
            {"seq_idx": MASK - 1},
        ],
        ids=["numbers", "floats", "positions that restart", "sample numbers beside a mask", "sample numbers"],
    )
    def test_each_sample_is_as_alone(self, both, given):
        ours, theirs = both
        if "position_ids" in given:
            starts = torch.tensor([[0] * 5 + [5] * 7 + [12] * 3, [0] * 5 + [4] * 10])
            given = given | {"position_ids": given["position_ids"] - starts}
        tokens = ids(2, 15)
        found = theirs(tokens, **given).logits
        for row, start, end in self.PIECES:
            alone = ours(tokens[row : row + 1, start:end])
            torch.testing.assert_close(found[row : row + 1, start:end], alone, msg=f"{row}, {start}")

    def test_the_loss_is_that_of_the_samples_alone(self, both):
        ours, theirs = both
        tokens = ids(2, 15)
        found = theirs(tokens, attention_mask=self.MASK, labels=tokens).loss
        sums, count = torch.zeros(()), 0
        for row, start, end in self.PIECES:
            part = tokens[row, start:end]
            logits = ours(part[None])[0, :-1]
            sums, count = (
                sums + torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"),
                count + end - start - 1,
            )
        torch.testing.assert_close(found, sums / count)
        by_items = theirs(tokens, attention_mask=self.MASK, labels=tokens, num_items_in_batch=7).loss
        torch.testing.assert_close(by_items, sums / 7)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            ([[1, 1, 2, 2, 1]], "number of a sample comes back"),
            ([[1, 1, -1, 1, 1]], "found other values"),
            ([[1.0, 1.0, 0.5, 1.0, 1.0]], "found other values"),
            ([[1, 1, 1]], r"expected \[1, at least 5\], found \[1, 3\]"),
            ([[[[1, 1, 1, 1, 1]]]], r"found \[1, 1, 1, 5\]"),
        ],
    )
    def test_what_is_no_mask(self, both, mask, message):
        with pytest.raises(FusionTreeError, match=f"attention_mask: .*{message}"):
            both[1](ids(1, 5), attention_mask=torch.tensor(mask))

    @pytest.mark.parametrize(
        "given", [{"attention_mask": torch.tensor([[1, 1, 2, 2]])}, {"position_ids": torch.tensor([[0, 1, 0, 1]])}]
    )
    def test_a_cache_goes_on_with_one_sample(self, both, given):
        with pytest.raises(FusionTreeError, match="several samples in a row; each row of a cache goes on with one"):
            both[1](ids(1, 4), use_cache=True, **given)


class TestArguments:
    @torch.no_grad()
    def test_hidden_states_are_what_layers_read_and_what_the_head_reads(self, both):
        ours, theirs = both
        rows, mask = padded()
        found = theirs(rows, attention_mask=mask, output_hidden_states=True)
        states = found.hidden_states
        assert len(states) == 3
        for row, prompt in enumerate(PROMPTS):
            tokens, own = torch.tensor([prompt]), []
            ours.features(tokens, states=own)
            for state, alone in zip(states, own, strict=True):
                torch.testing.assert_close(state[row, -len(prompt) :], alone[0])
            torch.testing.assert_close(own[0], ours.embedding(tokens))
        torch.testing.assert_close(ours.logits(states[-1]), found.logits)

    @torch.no_grad()
    def test_states_behind_a_prefix_are_those_of_tokens(self):
        model = ft.build(spec().model_copy(update={"prefix": PrefixSpec(tokens=3)})).eval()
        states: list[Tensor] = []
        model.features(ids(2, 6), states=states)
        assert [state.shape[1] for state in states] == [6, 6, 6]

    @torch.no_grad()
    def test_generation_keeps_hidden_states(self, both):
        kept = {"output_hidden_states": True, "return_dict_in_generate": True, "use_cache": True}
        found = both[1].generate(ids(1, 4), **GREEDY | {"max_new_tokens": 3}, **kept).hidden_states
        assert [step[-1].shape[1] for step in found] == [4, 1, 1]

    @torch.no_grad()
    def test_a_tuple_where_one_is_wanted(self, both):
        found = both[1](ids(1, 5), return_dict=False, use_cache=True)
        assert isinstance(found, tuple)
        assert torch.equal(found[0], both[1](ids(1, 5)).logits)
        assert isinstance(found[1], FusionTreeCache)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"output_attentions": True}, "output_attentions: attention weights are never made"),
            ({"head_mask": torch.ones(2, 4)}, "head_mask: models of FusionTree have no use for it"),
            ({"token_type_ids": torch.tensor([[0, 0, 1, 1]])}, "token_type_ids: "),
            ({"cu_seq_lens_q": torch.tensor([0, 2, 4])}, "cu_seq_lens_q: give `position_ids`"),
            ({"cache_position": torch.arange(3, 7)}, "cache_position: begins at 3, the cache holds 0 columns"),
            (
                {"labels": torch.ones(1, 4, dtype=torch.long), "logits_to_keep": 1},
                r"labels: found \[1, 4\], .*\[1, 1\]",
            ),
            ({"labels": torch.ones(1, 3, dtype=torch.long)}, r"labels: found \[1, 3\]"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_would_be_ignored_is_refused(self, both, given, message):
        with pytest.raises(FusionTreeError, match=message):
            both[1](ids(1, 4), **given)

    @torch.no_grad()
    def test_what_says_nothing_may_be_given(self, both):
        nothing = {"head_mask": None, "token_type_ids": torch.zeros(1, 4), "cache_position": torch.arange(4)}
        assert torch.equal(both[1](ids(1, 4), **nothing).logits, both[1](ids(1, 4)).logits)

    @pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "hidden_size", "tie_word_embeddings"])
    def test_a_config_that_says_other_than_its_spec(self, name):
        with pytest.raises(FusionTreeError, match=f"{name}: found 1, the spec says"):
            FusionTreeForCausalLM(FusionTreeConfig(spec(tied=False), **{name: 1}))

    @pytest.mark.parametrize(
        "options",
        [{"every_n_layers": 2}, {"offload": True}, {"activation_checkpointing_kwargs": {"debug": True}}],
        ids=str,
    )
    def test_checkpointing_has_one_way(self, options):
        model = fresh()
        with pytest.raises(FusionTreeError, match="gradient checkpointing: "):
            model.activation_checkpointing_enable(**options)
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert model.is_activation_checkpointing


class TestCache:
    @torch.no_grad()
    def filled(self, theirs: FusionTreeForCausalLM, rows: int = 2, time: int = 8) -> FusionTreeCache:
        return theirs(ids(rows, time), use_cache=True).past_key_values

    def test_it_says_what_it_holds(self, both):
        empty, found = FusionTreeCache(), self.filled(both[1])
        assert (len(empty), empty.batch_size, empty.is_initialized, empty.has_previous_state()) == (0, -1, False, False)
        assert (len(found), found.batch_size, found.is_initialized, found.has_previous_state()) == (2, 2, True, True)
        assert (found.get_seq_length(), found.get_max_length(), found.get_mask_sizes(3, 0)) == (8, -1, (11, 0))
        assert not found.is_croppable
        assert not found.is_compileable

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        ],
        ids=["repeat", "select", "reorder"],
    )
    def test_its_rows_may_be_others(self, both, change, rows):
        _, theirs = both
        cache, new = self.filled(theirs), ids(4, 3)[: len(rows)]
        change(cache)
        whole = torch.cat([ids(2, 8)[rows], new], 1)
        found = theirs(new, past_key_values=cache).logits
        torch.testing.assert_close(found, theirs(whole).logits[:, 8:], rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_reset_forgets(self, both):
        _, theirs = both
        cache = self.filled(theirs)
        cache.reset()
        found = theirs(ids(3, 5), past_key_values=cache).logits
        torch.testing.assert_close(found, theirs(ids(3, 5)).logits)

    @pytest.mark.parametrize("count", [8, -1])
    def test_there_is_no_way_back(self, both, count):
        cache = self.filled(both[1])
        cache.crop(0)
        with pytest.raises(FusionTreeError, match=r"past_key_values: crop.*no way back"):
            cache.crop(count)

    def test_ways_of_generating_that_need_another_cache(self, both):
        with pytest.raises(FusionTreeError, match="cache_implementation: found 'static', our models have a cache of"):
            both[1].generate(ids(1, 8), cache_implementation="static", **GREEDY)
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            both[1].generate(ids(1, 8), prompt_lookup_num_tokens=2, **GREEDY)
        with pytest.raises(FusionTreeError, match="states have no way back"):  # who calls its parts
            self.filled(both[1]).activate_past_recording()

    @pytest.mark.parametrize("name", ["update", "get_conv_state", "update_recurrent_state", "early_initialization"])
    def test_layers_of_transformers_are_not_in_it(self, both, name):
        with pytest.raises(FusionTreeError, match=r"by path in `cache.states`"):
            getattr(self.filled(both[1]), name)(None, None, 0)

    @torch.no_grad()
    def test_one_of_inference_mode_goes_on_outside(self, both):
        _, theirs = both
        tokens = ids(1, 12)
        wanted = theirs.generate(tokens, **GREEDY)
        with torch.inference_mode():
            cache = theirs(tokens[:, :8], use_cache=True).past_key_values
            cache.batch_repeat_interleave(1)
        assert torch.equal(theirs.generate(tokens, past_key_values=cache, **GREEDY), wanted)


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_a_checkpoint_lacks_starts_from_seed_and_path(self, tmp_path, caplog, dtype):
        shallow = spec().model_copy(update={"layers": spec().expanded_layers()[:1]})
        transformers.AutoModelForCausalLM.from_config(FusionTreeConfig(shallow, seed=1)).save_pretrained(tmp_path)
        with caplog.at_level("WARNING", logger="transformers"):
            transformers.logging.enable_propagation()
            config = FusionTreeConfig(spec(), seed=4)
            found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype=dtype)
        drawn, kept = (
            ft.build(spec(), seed=4, dtype=dtype).state_dict(),
            ft.build(shallow, seed=1, dtype=dtype).state_dict(),
        )
        for name, tensor in found.model.state_dict().items():
            assert torch.equal(tensor, kept.get(name, drawn[name])), name
        assert "MISSING" in caplog.text

    @torch.no_grad()
    def test_shards(self, both, tmp_path):
        _, theirs = both
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(ids(2, 9)).logits, theirs(ids(2, 9)).logits)

    @torch.no_grad()
    def test_weights_that_wait_on_disk(self, both, tmp_path):
        _, theirs = both
        theirs.save_pretrained(tmp_path / "model")
        places = {f"model.{name}": "disk" for name, _ in theirs.model.named_children()} | {"model.norm": "cpu"}
        away = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
        )
        assert away.model.embedding.weight.is_meta
        torch.testing.assert_close(away(ids(2, 9)).logits, theirs(ids(2, 9)).logits)
        assert torch.equal(away.generate(ids(1, 9), **GREEDY), theirs.generate(ids(1, 9), **GREEDY))

    @torch.no_grad()
    @pytest.mark.parametrize(("name", "possible"), [("tiny-kimi-linear", True), ("tiny-zamba2", False)])
    def test_maps_that_are_read_without_a_call_may_wait_or_say_so(self, tmp_path, name, possible):
        model = transformers.AutoModelForCausalLM.from_config(FusionTreeConfig(load_spec(name))).eval()
        model.save_pretrained(tmp_path / "model")
        places = {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
        places |= {"model.layers": "disk", "model.shared": "disk"}
        away = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
        )
        if possible:
            assert torch.equal(away.generate(ids(1, 5), **GREEDY), model.generate(ids(1, 5), **GREEDY))
        else:
            with pytest.raises(FusionTreeError, match=r"shared\.\w+: a tool \(offloading\) stands around"):
                away(ids(1, 5))


class TestVocabulary:
    @torch.no_grad()
    @pytest.mark.parametrize(
        "head", [{"tied": True}, {"tied": False}, {"tied": True, "bias": True}, {"tied": False, "bias": True}]
    )
    @pytest.mark.parametrize("options", [{"new_num_tokens": 70}, {"new_num_tokens": 50}, {"pad_to_multiple_of": 64}])
    @pytest.mark.parametrize("mean_resizing", [True, False])
    def test_it_may_have_another_size(self, tmp_path, head, options, mean_resizing):
        model, tokens = fresh(**head), ids(2, 9).clamp(max=49)
        before = model(tokens).logits
        model.resize_token_embeddings(mean_resizing=mean_resizing, **options)
        size = options.get("new_num_tokens", 64)
        kept = min(size, 61)
        assert model.model.spec.vocab_size == model.config.vocab_size == size
        assert torch.equal(model(tokens).logits[..., :kept], before[..., :kept])
        assert torch.isfinite(model.model.embedding.weight).all()
        model.save_pretrained(tmp_path / "theirs")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        ft.save(model.model, tmp_path / "ours")
        assert torch.equal(ft.load(tmp_path / "ours")(tokens), model(tokens).logits)

    def test_embeddings_may_be_replaced_by_their_like(self):
        model, own = fresh(tied=False), fresh(tied=False)
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(own.model.embedding.weight * 2))
        model.set_output_embeddings(torch.nn.Linear(32, 61, bias=False))
        assert model.get_output_embeddings() is model.model.head
        own.model.embedding.weight.data *= 2
        own.model.head.weight = model.model.head.weight
        assert torch.equal(model(ids(1, 5)).logits, own(ids(1, 5)).logits)

    def test_and_by_nothing_else(self):
        with pytest.raises(FusionTreeError, match=r"set_input_embeddings: expected a plain nn.Embedding \[61, 32\]"):
            fresh().set_input_embeddings(torch.nn.Embedding(62, 32))
        with pytest.raises(FusionTreeError, match="a tied head has no weight of its own"):
            fresh(tied=True).set_output_embeddings(torch.nn.Linear(32, 61, bias=False))
        with pytest.raises(FusionTreeError, match="`resize_token_embeddings` changes both"):
            fresh(tied=False).set_output_embeddings(torch.nn.Linear(32, 62, bias=False))

    @pytest.mark.parametrize(
        "options",
        [
            {"trainable_token_indices": {"embedding": [61, 62]}},
            {"modules_to_save": ["embedding"]},
            {"target_modules": ["q.windowed_heads", "embedding"]},
        ],
        ids=["new tokens", "all of the embedding", "low rank"],
    )
    def test_a_tied_head_follows_what_an_adapter_makes_of_the_embedding(self, options):
        model, tokens = fresh(tied=True), torch.cat([ids(2, 9), torch.tensor([[61], [62]])], 1)
        model.resize_token_embeddings(63)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, **({"target_modules": ["q.windowed_heads", "q.global_heads"]} | options))
        )
        adapted(tokens, labels=tokens).loss.backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        torch.optim.SGD(trained, 5.0).step()
        adapted(tokens, labels=tokens).loss.backward()
        torch.optim.SGD(trained, 5.0).step()
        adapted.eval()
        with torch.no_grad():
            wanted = adapted(tokens).logits
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(merged(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
