"""Compiled layers give what plain ones give, and plain ones run where somebody looks inside."""

import pytest
import torch

import fusiontree as ft
from fusiontree.kernels.ssd import chunked

SPEC = {
    "vocab_size": 61,
    "width": 32,
    "encodings": {"rope": {"kind": "rope"}, "time": {"kind": "srte_sincos"}},
    "layers": [
        {
            "repeat": 2,
            "layers": [
                {
                    "mixer": {
                        "kind": "gated",
                        "branches": {
                            "mamba": {"kind": "mamba2", "heads": 4, "head_dim": 8, "state": 8, "encodings": ["time"]},
                            "attention": {
                                "kind": "attention",
                                "heads": 4,
                                "kv_heads": 2,
                                "head_dim": 8,
                                "window": 9,
                                "global_heads": 2,
                                "global_kv_heads": 1,
                                "encodings": ["rope"],
                            },
                        },
                        "gate": {"kind": "sigmoid"},
                    },
                    "ffn": {"kind": "swiglu", "hidden": 48},
                }
            ],
        }
    ],
}
MAMBA1 = {"kind": "mamba1", "inner": 48, "state": 4, "rank": 3, "norm": {"kind": "rms"}}
CHANNELS = {"vocab_size": 61, "width": 32, "layers": [{"repeat": 2, "layers": [{"mixer": MAMBA1}]}]}
EXPERTS = {"kind": "moe", "experts": 6, "top_k": 2, "hidden": 16, "shared_hidden": 8, "shared_gate": True}
ROUTED = {"vocab_size": 61, "width": 32, "layers": [{"repeat": 2, "layers": [{"ffn": EXPERTS}]}]}
DELTA = {"kind": "gated_delta", "heads": 4, "key_heads": 2, "head_dim": 8, "encodings": ["rope"]}
DELTAS = CHANNELS | {"encodings": {"rope": {"kind": "rope"}}, "layers": [{"mixer": DELTA}] * 2}
LATENT = {"kind": "mla", "heads": 4, "head_dim": 8, "shared_dim": 4, "rank": 12, "window": 9, "encodings": ["rope"]}
KDA = DELTA | {"decay": "channel", "decay_rank": 8, "gate": "sigmoid", "gate_rank": 8}
GROUPED = EXPERTS | {"router": {"scores": "sigmoid", "correction": True, "groups": 3, "top_groups": 2}}
LATENTS = DELTAS | {"layers": [{"mixer": KDA, "ffn": GROUPED}, {"mixer": LATENT}, {"mixer": LATENT | {"window": None}}]}
UNIT = {"kind": "rglru", "heads": 4, "head_dim": 8}
UNITS = CHANNELS | {"layers": [{"mixer": UNIT}] * 2}
CONSTANT = {"kind": "lightning", "heads": 2, "head_dim": 8, "slopes": [0.5, 0.1]}
FALLING = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "window": 9, "encodings": ["alibi"]}
LENDER = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "window": 9, "encodings": ["rope"]}
BORROWER = LENDER | {"keys_from": "layers.0.mixer"}
SHARING = DELTAS | {"prefix": {"tokens": 3}, "layers": [{"mixer": mixer} for mixer in (LENDER, BORROWER, BORROWER)]}
EXPORTED = CHANNELS | {"layers": [{"mixer": LENDER, "ffn": {"kind": "swiglu", "hidden": 48}}]}
EXPORTED |= {"encodings": {"rope": {"kind": "rope"}, "time": {"kind": "srte_learned", "max_length": 64}}}
DOCUMENTS = torch.tensor([[0] * 50 + [1] * 100, [0] * 141 + [-1] * 9])
TOKENS = torch.randint(0, 61, (2, 150), generator=torch.Generator().manual_seed(0))


def trained_once(model, documents):
    loss = torch.nn.functional.cross_entropy(model(TOKENS, documents=documents)[:, :140].flatten(0, 1).float(), TARGETS)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


TARGETS = TOKENS[:, 1:141].flatten()


def both(backend, data=SPEC):
    spec = ft.ModelSpec.model_validate(data)
    plain, compiled = ft.build(spec), ft.build(spec)
    compiled.compile(backend=backend)
    return plain, compiled


def assert_same_step(backend, documents, data=SPEC):
    torch._dynamo.reset()
    plain, compiled = both(backend, data)
    loss, expected = trained_once(plain, documents)
    found, gradients = trained_once(compiled, documents)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
def test_each_layer_is_one_graph_with_the_same_loss_and_gradients(documents, monkeypatch):
    monkeypatch.setattr(chunked, "piece", lambda function, compiled: function)  # no C++ compiler is needed
    assert_same_step("aot_eager", documents)
    assert_same_step("aot_eager", documents, ROUTED)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
def test_compiled_code_gives_the_same_loss_and_gradients(documents):
    assert_same_step("inductor", documents)


def test_equal_layers_and_other_tokens_are_compiled_once(monkeypatch):
    monkeypatch.setattr(chunked, "piece", lambda function, compiled: function)
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    _, compiled = both(counting)
    for step in range(3):
        compiled(TOKENS.roll(step, 1), documents=DOCUMENTS.clamp(min=0) * (step != 1))
    assert len(graphs) == 1


def test_observing_forcing_dropping_and_prefill_see_the_plain_layers():
    def failing(graph, inputs):
        raise AssertionError("compiled")

    plain, compiled = both(failing)
    prompt = TOKENS[:1, :7]
    for cache in (compiled.new_cache(1), compiled.new_cache(1, 20)):
        compiled(prompt, cache=cache)
    with plain.observe() as expected, compiled.observe() as found:
        plain(TOKENS), compiled(TOKENS)
    assert dict(found) == dict(expected)
    with compiled.drop(["layers.0.mixer.branches.mamba"]), compiled.force({"layers.1.mixer": {"mamba": 1.0}}):
        compiled(TOKENS)


def assert_same_steps(backend, data=SPEC):
    """Greedy tokens and logits, from prompts of unequal length, beyond the window, in caches of two sizes."""
    torch._dynamo.reset()
    plain, compiled = both(backend, data)
    for length, new in ((7, 20), (12, 9)):
        prompts = [TOKENS[0, :length].tolist(), TOKENS[1, : length - 4].tolist()]
        assert compiled.generate(prompts, max_new_tokens=new) == plain.generate(prompts, max_new_tokens=new)
        whole, cache = TOKENS[:1, : length + new], compiled.new_cache(1, length + new)
        with torch.no_grad():
            chunks = [whole[:, :length], *whole[:, length:].split(1, 1)]
            found = torch.cat([compiled(chunk, cache=cache) for chunk in chunks], 1)
            torch.testing.assert_close(found, plain(whole), rtol=0, atol=1e-5)


def test_decode_steps_are_compiled_once_for_all_lengths():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    assert_same_steps(counting)
    assert len(graphs) == 2  # two rows, and one


def test_decode_steps_as_autograd_sees_them():
    assert_same_steps("aot_eager")


@pytest.mark.slow
def test_compiled_decode_steps():
    assert_same_steps("inductor")


@pytest.mark.slow
def test_mamba1_in_training_and_in_decode():
    assert_same_step("aot_eager", DOCUMENTS, CHANNELS)
    assert_same_steps("aot_eager", CHANNELS)


@pytest.mark.parametrize("documents", [None, DOCUMENTS[:, 40:60]], ids=["one document", "packed"])
def test_an_exported_program_serves_other_values(documents):
    model = ft.build(ft.ModelSpec.model_validate(EXPORTED)).eval()
    first, other = TOKENS[:, :20], TOKENS[:, 20:40]
    given = {} if documents is None else {"documents": documents}
    program = torch.export.export(model, (first,), given).module()
    torch.testing.assert_close(program(first, **given), model(first, **given))
    if documents is not None:
        given = {"documents": torch.tensor([[-1] * 5 + [0] * 15, [0] * 7 + [-1] + [1] * 12])}
    real = given.get("documents", other) >= 0
    torch.testing.assert_close(program(other, **given)[real], model(other, **given)[real])


@pytest.mark.slow
def test_gated_delta_in_training_and_in_decode():
    assert_same_step("aot_eager", DOCUMENTS, DELTAS)
    assert_same_steps("aot_eager", DELTAS)


@pytest.mark.slow
def test_latents_and_channels_that_decay_in_training_and_in_decode():
    assert_same_step("aot_eager", DOCUMENTS, LATENTS)
    assert_same_steps("aot_eager", LATENTS)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "packed"])
def test_a_prefix_and_keys_of_other_layers_in_training(documents):
    assert_same_step("aot_eager", documents, SHARING)


def test_a_prefix_and_keys_of_other_layers_in_decode():
    assert_same_steps("aot_eager", SHARING)


@pytest.mark.slow
def test_compiled_code_of_a_prefix_and_keys_of_other_layers():
    assert_same_step("inductor", DOCUMENTS, SHARING)
    assert_same_steps("inductor", SHARING)


@pytest.mark.slow
def test_rglru_in_training_and_in_decode():
    assert_same_step("aot_eager", DOCUMENTS, UNITS)
    assert_same_steps("aot_eager", UNITS)


@pytest.mark.slow
def test_lightning_in_training_and_in_decode():
    data = CHANNELS | {"layers": [{"mixer": CONSTANT}] * 2}
    assert_same_step("aot_eager", DOCUMENTS, data)
    assert_same_steps("aot_eager", data)


def test_alibi_in_training_and_in_decode():
    data = CHANNELS | {"encodings": {"alibi": {"kind": "alibi"}}, "layers": [{"mixer": FALLING}] * 2}
    assert_same_step("aot_eager", DOCUMENTS, data)
    assert_same_steps("aot_eager", data)
