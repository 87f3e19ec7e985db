"""ALiBi against Bloom's attention, and which head has which slope."""

import pytest
import torch
import transformers
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

import fusiontree as ft
from fusiontree.core.model.formats import migrated
from fusiontree.encodings.alibi import paper_slopes
from fusiontree.errors import FusionTreeError
from fusiontree.kernels.common.constants import kept
from fusiontree.zoo.tensors import interleaved

TIME, WIDTH = 40, 24


def model(**options) -> ft.LanguageModel:
    attention = {"kind": "attention", "heads": 4, "kv_heads": 4, "head_dim": 6, "encodings": ["alibi"], **options}
    data = {"vocab_size": 11, "width": WIDTH, "encodings": {"alibi": {"kind": "alibi"}}}
    return ft.build(ft.ModelSpec.parse({**data, "layers": [{"mixer": attention}]}), dtype=torch.float64).eval()


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 71, 112])
def test_slopes_are_those_of_bloom(heads):
    mask = torch.ones(1, 2, dtype=torch.long)
    theirs = build_alibi_tensor(mask, heads, torch.float32)[:, 0, 1]  # of a key one token further on
    torch.testing.assert_close(torch.tensor(paper_slopes(heads)), theirs, rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("heads", [4, 3])
def test_attention_is_that_of_bloom(heads):
    """Theirs adds slope * place of the key, of which softmax sees nothing but the difference."""
    ours = model(heads=heads, kv_heads=heads, head_dim=WIDTH // heads, bias=True, out_bias=True)
    config = transformers.BloomConfig(hidden_size=WIDTH, n_head=heads, hidden_dropout=0.0)
    theirs = BloomAttention(config, layer_idx=0).double().eval()
    mixer = ours.get_submodule("layers.0.mixer")
    torch.manual_seed(0)
    for kind in ("weight", "bias"):
        rows = torch.cat([0.3 * torch.randn_like(mixer.get_parameter(f"{name}.{kind}")) for name in "qkv"])
        for name, part in zip("qkv", rows.chunk(3), strict=True):
            mixer.get_parameter(f"{name}.{kind}").copy_(part)
        theirs.query_key_value.get_parameter(kind).copy_(interleaved(heads, *[WIDTH // heads] * 3).write(rows))
        theirs.dense.get_parameter(kind).copy_(mixer.get_parameter(f"out.{kind}"))
    alibi = build_alibi_tensor(torch.ones(2, TIME, dtype=torch.long), heads, torch.float64)
    hidden = torch.full((TIME, TIME), -torch.inf, dtype=torch.float64).triu(1)
    found = {}
    mixer.register_forward_hook(lambda module, inputs, output: found.update(x=inputs[0], y=output))
    ours(torch.randint(0, 11, (2, TIME), generator=torch.Generator().manual_seed(0)))
    wanted, _ = theirs(found["x"], torch.zeros_like(found["x"]), alibi, hidden)
    torch.testing.assert_close(found["y"], wanted, rtol=0, atol=1e-6)  # their softmax is in float32


@torch.no_grad()
def test_a_window_that_hides_nothing_changes_nothing_whoever_is_global():
    """Windowed heads have the first slopes, global ones the last; keys that heads share do not matter."""
    one, other = model(kv_heads=2), model(kv_heads=2, window=TIME, global_heads=2, global_kv_heads=1)
    shapes = {name: tuple(tensor.shape) for name, tensor in other.state_dict().items()}
    apart = migrated(other.spec, one.state_dict(), shapes, "1")  # rows of one map as those of windowed and global heads
    other.load_state_dict(apart)
    tokens = torch.randint(0, 11, (2, TIME), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other(tokens), one(tokens), rtol=0, atol=1e-12)
    plain = model(kv_heads=2, encodings=[], window=TIME, global_heads=2, global_kv_heads=1)
    plain.load_state_dict(apart)
    assert float((plain(tokens) - one(tokens)).abs().max()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prefix", [{}, {"prefix": {"tokens": 3}}])
def test_decoding_goes_on_where_a_new_document_began(prefix):
    """Distances are counted in the open document, not in what the ring held before it."""
    ours = ft.build(ft.ModelSpec.parse(model(window=5).spec.data() | prefix), dtype=torch.float64).eval()
    tokens = torch.randint(0, 11, (1, 20), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[3] * 8 + [4] * 12])
    wanted = ours(tokens, documents=documents)
    cache = ours.new_cache(1, 20)
    steps = [ours(tokens[:, t : t + 1], documents=documents[:, t : t + 1], cache=cache) for t in range(20)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mixer", "encodings", "line"),
    [
        ({}, ["alibi", "again"], "layers.0.mixer.encodings: two biases on one branch: alibi, again"),
        (
            {"kind": "mlp", "hidden": 8},
            ["alibi"],
            "layers.0.mixer.encodings: encoding 'alibi' needs the hook bias; this branch has: input",
        ),
    ],
)
def test_where_it_does_not_fit_it_says_so(mixer, encodings, line):
    attention = {"kind": "attention", "heads": 4, "kv_heads": 4, "head_dim": 6}
    known = {"alibi": {"kind": "alibi"}, "again": {"kind": "alibi"}}
    layers = [{"mixer": (mixer or attention) | {"encodings": encodings}}]
    with pytest.raises(FusionTreeError) as caught:
        ft.ModelSpec.parse({"vocab_size": 11, "width": WIDTH, "encodings": known, "layers": layers})
    assert line in str(caught.value)


def test_slopes_reach_a_device_once_and_serve_training_after_inference(monkeypatch):
    made = []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda values, **options: made.append(values) or tensor(values, **options))
    kept.cache_clear()
    net, tokens = model(), torch.arange(8).reshape(1, 8)
    with torch.inference_mode():
        net(tokens)
    once = len(made)
    net(tokens).sum().backward()
    assert net.embedding.weight.grad is not None
    assert len(made) == once > 0
