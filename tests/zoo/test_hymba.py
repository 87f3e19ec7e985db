"""Hymba, which transformers lacks, composed of parts: against a reference that has no code of ours, and the figures of
its paper. Samba beside it: its parts are tested in `test_parity`."""

import pytest
import torch
from hymba import (
    FFN,
    GLOBAL,
    HEAD_DIM,
    HEADS,
    INNER,
    KV_HEADS,
    META,
    RANK,
    READS,
    STATE,
    THETA,
    VALUE_DIM,
    VOCABULARY,
    WIDTH,
    WINDOW,
    Hymba,
)

import fusiontree as ft

TIME = 37
NORM = {"eps": 1e-6}


def layer(index):
    heads = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "value_dim": VALUE_DIM}
    attention = {"kind": "attention", "encodings": ["rope"], "project": False, **heads}
    attention |= {} if index in GLOBAL else {"window": WINDOW}
    attention |= {"keys_from": f"layers.{READS[index]}.mixer.branches.attention"} if index in READS else {}
    mamba = {"kind": "mamba1", "inner": INNER, "state": STATE, "rank": RANK, "norm": NORM, "project": False}
    branches = {"attention": attention, "mamba": mamba}
    mixer = {"kind": "mean", "branches": branches, "branch_norm": NORM, "projection": {}}
    return {"mixer": mixer, "ffn": {"kind": "swiglu", "hidden": FFN}, "norm": NORM}


SPEC = ft.ModelSpec.parse(
    {
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "prefix": {"tokens": META},
        "encodings": {"rope": {"kind": "rope", "theta": THETA}},
        "layers": [layer(index) for index in range(8)],
        "norm": NORM,
    }
)


def as_ours(theirs):
    """Their tensors, or gradients of them, under our names."""
    ours = {"embedding.weight": theirs["embedding.weight"], "prefix.weight": theirs["meta"]}
    ours["norm.weight"] = theirs["norm.weight"]
    for index in range(8):
        ours |= block_as_ours(f"blocks.{index}", f"layers.{index}", theirs, keys=0 if index in READS else KV_HEADS)
    return ours


def block_as_ours(block, ours, theirs, *, keys):
    heads, ssm = f"{ours}.mixer.branches.attention", f"{ours}.mixer.branches.mamba"
    rows = {f"{heads}.q": HEADS * HEAD_DIM, f"{heads}.k": keys * HEAD_DIM, f"{heads}.v": keys * VALUE_DIM}
    rows |= {f"{ssm}.x": INNER, f"{ssm}.z": INNER}
    parts = theirs[f"{block}.mixer.in_proj.weight"].split(list(rows.values()))
    found = {f"{name}.weight": part for name, part in zip(rows, parts, strict=True) if len(part)}
    mixed = theirs[f"{block}.mixer.mamba.x_proj.weight"].split([RANK, STATE, STATE])
    found |= {f"{ssm}.{name}.weight": part for name, part in zip(("dt_down", "B", "C"), mixed, strict=True)}
    found[f"{ssm}.conv.weight"] = theirs[f"{block}.mixer.mamba.conv1d.weight"][:, 0]
    for theirs_name, name in {
        **{"mixer.mamba.conv1d.bias": f"{ssm}.conv.bias", "mixer.mamba.dt_proj.weight": f"{ssm}.dt_up.weight"},
        **{"mixer.mamba.dt_proj.bias": f"{ssm}.dt_bias", "mixer.mamba.A_log": f"{ssm}.A_log"},
        **{"mixer.mamba.D": f"{ssm}.D", "mixer.mamba.dt_layernorm.weight": f"{ssm}.norm.dt.weight"},
        **{f"mixer.mamba.{n}_layernorm.weight": f"{ssm}.norm.{n.upper()}.weight" for n in ("b", "c")},
        **{f"mixer.norms.{i}.weight": f"{ours}.mixer.branch_norm.{n}.weight" for i, n in enumerate(SPEC_BRANCHES)},
        "mixer.out_proj.weight": f"{ours}.mixer.projection.weight",
        **{f"norms.{i}.weight": f"{ours}.norm.{n}.before.weight" for i, n in enumerate(("mixer", "ffn"))},
        **{f"{n}.weight": f"{ours}.ffn.{n}.weight" for n in ("gate", "up", "down")},
    }.items():
        found[name] = theirs[f"{block}.{theirs_name}"]
    return found


SPEC_BRANCHES = ("attention", "mamba")


@pytest.fixture(scope="module")
def theirs():
    model, generator = Hymba(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if name == "embedding.weight" else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def ours(theirs):
    model = ft.build(SPEC)
    model.load_state_dict(as_ours(theirs.state_dict()))
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCABULARY, (2, TIME), generator=torch.Generator().manual_seed(1))


def close(found, wanted):
    assert float((found - wanted).abs().max()) <= 2e-5 * max(1.0, float(wanted.abs().max()))


def test_logits_and_every_gradient(ours, theirs, tokens):
    found, wanted = ours(tokens), theirs(tokens)
    close(found.detach(), wanted.detach())
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    expected = as_ours({name: parameter.grad for name, parameter in theirs.named_parameters()})
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = max(float(expected[name].abs().max()), 1e-3 * largest)
        assert float((parameter.grad - expected[name]).abs().max()) <= 2e-4 * scale, name


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * TIME, [20, *[1] * 17], [5, 13, 1, 18], [12, 25]], ids=str)
def test_every_way_of_cutting_a_sequence(ours, theirs, tokens, cuts):
    cache = ours.new_cache(2, TIME)
    close(torch.cat([ours(chunk, cache=cache) for chunk in tokens.split(cuts, 1)], 1), theirs(tokens))


@torch.no_grad()
def test_batches_of_padded_prompts_and_packed_documents(ours, theirs, tokens):
    """The authors' code serves one sequence at a time."""
    alone = [theirs(tokens[:1, :9]), theirs(tokens[1:])]
    padded = torch.cat([torch.cat([torch.zeros(1, TIME - 9).long(), tokens[:1, :9]], 1), tokens[1:]])
    documents = torch.zeros_like(padded)
    documents[0, : TIME - 9] = -1
    found = ours(padded, documents=documents)
    close(found[:1, TIME - 9 :], alone[0])
    close(found[1:], alone[1])
    row = torch.cat([tokens[0, :9], tokens[1]])[None]
    packed = ours(row, documents=torch.tensor([0] * 9 + [1] * TIME)[None])
    close(packed, torch.cat(alone, 1))


@pytest.mark.parametrize(
    ("name", "stated", "unit"),
    [
        ("hymba-1.5b", 152, 10**7),  # 1.52B, huggingface.co/nvidia/Hymba-1.5B-Base
        ("samba-421m", 421, 10**6),  # the names of github.com/microsoft/Samba's lit_gpt/config.py
        ("samba-1.3b", 13, 10**8),
    ],
)
def test_published_sizes(name, stated, unit):
    count = sum(parameter.numel() for parameter in ft.build(ft.load_spec(name), device="meta").parameters())
    assert count // unit == stated


def test_the_published_cache():
    """78.6 MB (table 1 of the paper, rows F and G; table 2 rounds to 79): half-precision keys and values of 8000 tokens
    and of 128 meta tokens, and four taps of convolutions. The paper does not say what it counts; this is one of the two
    counts that give its figure. What a cache takes here has three taps and the states, in float32."""
    spec, attention, convolutions, others = ft.load_spec("hymba-1.5b"), 0, 0, 0
    for _, node, scope in spec.layer_nodes():
        bytes_ = node.cache_bytes(scope, 8000 + 128, torch.float16)
        if node.kind == "attention":
            attention += bytes_
        elif node.kind == "mamba1":
            convolutions += 4 * 2 * node.inner
            others += bytes_
    assert round((attention + convolutions) / 1e6, 1) == 78.6
    assert spec.cache_bytes(8000, torch.float16) == attention + others
    assert round((attention + others) / 1e6, 1) == 85.0
