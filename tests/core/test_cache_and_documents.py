"""What a model refuses to look at, and what a cache is after it has refused."""

from collections import Counter
from typing import Any

import pytest
import torch
from core_cases import VOCABULARY, complaint, data, model, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusiontree import LanguageModel, ModelSpec, build
from fusiontree.branches import attention as branch
from fusiontree.core.contracts.node import branches
from fusiontree.kernels import attention
from fusiontree.testing.check import models

LEARNED: dict[str, Any] = {"encodings": {"time": {"kind": "srte_learned", "max_length": 8}}}


@pytest.fixture(scope="module")
def built() -> LanguageModel:
    return model(**LEARNED).requires_grad_(False)


def ids(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        ({"tokens": ids([1, VOCABULARY])}, ["tokens: ", f"found {VOCABULARY}", f"0..{VOCABULARY - 1}"]),
        ({"tokens": ids([1, -1])}, ["tokens: ", "found -1"]),
        ({"tokens": torch.tensor([1, 2])}, ["tokens: ", "[2]"]),
        ({"tokens": torch.tensor([[1.0]])}, ["tokens: ", "integer", "float32"]),
        ({"tokens": torch.tensor([[True]])}, ["tokens: ", "integer", "bool"]),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, ["tokens: ", "[1, 0]"]),
        ({"tokens": [[1, 2]]}, ["tokens: ", "list"]),
        ({"tokens": tokens(1, 9)}, ["encodings.time: ", "position 8", "8 positions"]),
        ({"tokens": ids([1]), "positions": ids([8])}, ["encodings.time: ", "position 8"]),
        ({"tokens": ids([1]), "positions": ids([-1])}, ["encodings.time: ", "position -1"]),
        ({"tokens": ids([1, 2]), "positions": ids([0, 1, 2])}, ["positions: ", "[1, 2]", "[1, 3]"]),
        ({"tokens": ids([1]), "positions": torch.tensor([[0.0]])}, ["positions: ", "float32"]),
        ({"tokens": ids([1, 2]), "documents": ids([0])}, ["documents: ", "[1, 2]", "[1, 1]"]),
        ({"tokens": ids([1, 2]), "documents": ids([0, 0], [0, 0])}, ["documents: ", "[2, 2]"]),
    ],
)
def test_bad_input_is_named(built: LanguageModel, inputs: dict[str, Any], parts: list[str]) -> None:
    complaint(lambda: built(**inputs), *parts)


def test_a_cache_of_other_rows_is_refused(built: LanguageModel) -> None:
    complaint(lambda: built(tokens(3, 2), cache=built.new_cache(2)), "cache: ", "2 rows", "3")
    complaint(lambda: built(tokens(2, 2), cache=built.new_cache(1)), "cache: ", "1 rows", "2")


def test_a_cache_of_another_spec_is_refused(built: LanguageModel) -> None:
    narrower = built.spec.replace({"layers.0.mixer.branches.attention.window": 4})
    cache = build(narrower, dtype=torch.float64).new_cache(1)
    line = f"cache: made for the spec {narrower.digest()}, found {built.spec.digest()}"
    complaint(lambda: built(tokens(1, 3), cache=cache), line)
    twin = build(ModelSpec.parse(built.spec.data()), dtype=torch.float64)
    built(tokens(1, 3), cache=twin.new_cache(1))


@pytest.mark.parametrize(("rows", "length"), [(-1, 5), (0, 5), (2, -3), (1.5, 5), (2, 2.5)])
def test_a_cache_has_a_whole_number_of_rows_and_tokens(built: LanguageModel, rows: Any, length: Any) -> None:
    complaint(lambda: built.new_cache(rows, length), "expected a whole number from 1 on, found")


def test_a_chunk_looks_at_no_more_slots_than_are_filled(built: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    def watched(*args: Any, past: Any = None, **options: Any) -> Tensor:
        looked_at.append(0 if past is None else past.keys.shape[1])
        return attention.attention(*args, past=past, **options)

    monkeypatch.setattr(branch, "attention", watched)
    cache = built.new_cache(2, 8)
    for chunk in tokens(2, 8).split([3, 2, 3], 1):
        built(chunk, cache=cache)
    assert looked_at == [0, 3, 5]  # of 6 slots, the window


def test_decoding_under_autocast_is_the_full_forward() -> None:
    floats, ids = model().float(), tokens(2, 12)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache = floats.new_cache(2, 12)
        found = torch.cat([floats(part, cache=cache) for part in ids.split([5, 1, 1, 3, 1, 1], 1)], 1)
        expected = floats(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_a_full_cache_says_so(built: LanguageModel) -> None:
    cache = built.new_cache(1, 5)
    built(tokens(1, 4), cache=cache)
    complaint(lambda: built(tokens(1, 2), cache=cache), "cache: ", "4 tokens and 2 more", "5")


@pytest.mark.parametrize("capacity", [None, 10])
@pytest.mark.parametrize(
    "bad",
    [{"tokens": tokens(1, 5)}, {"tokens": ids([1, 2]), "positions": ids([7, 8])}],
    ids=["too long for an encoding", "a position beyond it"],
)
@pytest.mark.parametrize("documents", [False, True])
def test_a_refused_call_does_not_count(
    built: LanguageModel, bad: dict[str, Tensor], capacity: int | None, documents: bool
) -> None:
    """Neither as tokens nor as the bound by which rings grow."""
    cache = built.new_cache(1, capacity)
    built(tokens(1, 4), cache=cache)
    before = (cache.length_bound, cache.nbytes, cache.lengths.tolist(), cache.positions.tolist())
    more = {"documents": torch.zeros_like(bad["tokens"])} if documents else {}
    complaint(lambda: built(**bad, **more, cache=cache), "encodings.time: ")
    assert (cache.length_bound, cache.nbytes, cache.lengths.tolist(), cache.positions.tolist()) == before
    assert cache.length_bound == 4


@pytest.mark.parametrize("prefix", [None, {"tokens": 2}])
def test_a_device_is_asked_nothing(prefix: dict[str, int] | None) -> None:
    """On the meta device no value can be read: whoever tries fails."""
    net = build(ModelSpec.parse(data(**LEARNED, prefix=prefix)), device="meta")
    like = torch.zeros(2, 6, dtype=torch.long, device="meta")
    packed = {} if prefix else {"documents": like}  # how long packed rows are with prefixes is in the documents
    net.cross_entropy(like, like, positions=like, **packed).backward()
    assert net.embedding.weight.grad is not None
    cache = net.new_cache(2, 8)
    with torch.no_grad():
        assert net(like, cache=cache, **packed).shape == (2, 6, VOCABULARY)
        net(like[:, :1], cache=cache)
        net(like[:, :1], cache=cache, **{name: ids[:, :1] for name, ids in packed.items()})


def test_bad_labels_cost_no_forward_pass(built: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built, "run_layers", None)
    complaint(lambda: built.cross_entropy(tokens(1, 3), ids([1, 2, VOCABULARY])), "labels: ", f"found {VOCABULARY}")
    complaint(lambda: built.cross_entropy(tokens(1, 3), ids([1, 2])), "labels: ", "[1, 3]")
    complaint(lambda: built.cross_entropy(ids([1, -1]), ids([1, 2])), "tokens: ", "found -1")
    complaint(lambda: built.cross_entropy([[1, 2]], ids([1, 2])), "tokens: ", "list")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [ids([VOCABULARY]), tokens(1, 5), tokens(1, 7)], ids=["token", "position", "room"])
def test_a_refusal_leaves_the_cache_as_it_was(built: LanguageModel, bad: Tensor) -> None:
    whole = tokens(1, 6)
    cache = built.new_cache(1, 10)
    built(whole[:, :4], cache=cache)
    complaint(lambda: built(bad, cache=cache))
    torch.testing.assert_close(built(whole[:, 4:], cache=cache), built(whole)[:, 4:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("what_stands_there", [-7, VOCABULARY + 5])
def test_padding_is_not_looked_at(built: LanguageModel, what_stands_there: int) -> None:
    documents = ids([-1, 0, 0, -1, 0, 0, -1, -1])
    given = tokens(1, 8).masked_fill(documents < 0, what_stands_there)
    found = built(given, documents=documents)[documents >= 0]
    torch.testing.assert_close(found, built(given[documents >= 0][None])[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("what_stands_there", [-1, 1000])
def test_positions_of_padding_are_not_looked_at(built: LanguageModel, what_stands_there: int) -> None:
    documents = ids([0, 0, 0, -1, -1])
    positions = ids([0, 1, 2, what_stands_there, what_stands_there])
    found = built(tokens(1, 5), documents=documents, positions=positions)[:, :3]
    torch.testing.assert_close(found, built(tokens(1, 5)[:, :3]), rtol=0, atol=1e-9)


def test_padding_may_reach_beyond_an_encoding(built: LanguageModel) -> None:
    documents = torch.tensor([[0] * 8 + [-1] * 4])
    found = built(tokens(1, 12), documents=documents)[:, :8]
    torch.testing.assert_close(found, built(tokens(1, 12)[:, :8]), rtol=0, atol=1e-9)


def test_positions_restart_in_each_document(built: LanguageModel) -> None:
    documents = torch.tensor([[4] * 7 + [2] * 8])
    whole = tokens(1, 15)
    apart = [built(whole[:, :7]), built(whole[:, 7:])]
    torch.testing.assert_close(built(whole, documents=documents), torch.cat(apart, 1), rtol=0, atol=1e-9)


def test_the_cache_s_documents_restart_positions_too(built: LanguageModel) -> None:
    whole, cache = tokens(1, 12), built.new_cache(1)
    built(whole[:, :6], documents=torch.full((1, 6), 3), cache=cache)
    found = built(whole[:, 6:], documents=torch.full((1, 6), 4), cache=cache)
    torch.testing.assert_close(found, built(whole[:, 6:]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_tokens_may_be_any_integers(built: LanguageModel, dtype: torch.dtype) -> None:
    given = tokens(2, 5)
    documents = ids([0, 0, 1, 1, -1], [0, 0, 0, 0, 0])
    assert torch.equal(built(given.to(dtype), documents=documents), built(given, documents=documents))


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 8])
def test_a_cache_of_inference_mode_goes_on_outside_and_back(length: int | None) -> None:
    built, whole = model(), tokens(2, 8)
    with torch.inference_mode():
        cache = built.new_cache(2, length)
        built(whole[:, :5], cache=cache)
    parts = [built(whole[:, 5:6], cache=cache)]
    with torch.enable_grad():  # a cache is written without gradients, whoever computes some
        parts.append(built(whole[:, 6:7], cache=cache).detach())
    with torch.inference_mode():
        parts.append(built(whole[:, 7:], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), built(whole)[:, 5:], rtol=0, atol=1e-9)
    cache.select(torch.tensor([1]))
    assert cache.batch == 1


@torch.no_grad()
def test_rows_of_a_cache_may_become_more_or_fewer(built: LanguageModel) -> None:
    whole = tokens(2, 8)
    for rows in ([0, 0, 1], [1], [1, 0]):
        cache = built.new_cache(2, 8)
        built(whole[:, :5], cache=cache)
        cache.select(torch.tensor(rows))
        found = built(whole[rows, 5:], cache=cache)
        torch.testing.assert_close(found, built(whole)[rows, 5:], rtol=0, atol=1e-9)


def test_a_cache_s_bytes_are_those_of_its_states(built: LanguageModel) -> None:
    cache = built.new_cache(2, 8)
    states = [tensor for state in cache.states.values() for tensor in state.values()]
    assert cache.nbytes == sum(t.numel() * t.element_size() for t in states) > 0
    formula = sum(node.cache_bytes(built.spec.scope, 8, torch.float64) for _, node in built.spec.nodes())
    assert cache.nbytes == 2 * formula


@pytest.mark.parametrize("kind", branches.names())
def test_what_is_no_number_stays_in_its_document(kind: str) -> None:
    """Where documents begin with a block of attention and a chunk of a scan; within one, a factor of 0 lets it pass."""
    net = build(next(models(branches.get(kind))), dtype=torch.float64).eval().requires_grad_(False)
    ids = tokens(1, 256).remainder(10) + 1
    ids[0, 5] = 0
    documents = torch.arange(2).repeat_interleave(128)[None]
    alone = net(ids[:, 128:])
    net.embedding.weight[0] = torch.nan  # and so each token's logit of token 0, since the head is tied
    found = net(ids, documents=documents)
    assert not found[0, 5].isfinite().any()
    torch.testing.assert_close(found[:, 128:, 1:], alone[..., 1:], rtol=0, atol=1e-9)


class Counted(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


def operations(layers: int, batch: int) -> Counter[str]:
    """Those of a decode step."""
    rotated = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 4, "window": 6, "encodings": ["rope"]}
    layer = {"mixer": rotated, "ffn": {"kind": "swiglu", "hidden": 8}}
    net = build(ModelSpec.parse(data(layers=[layer] * layers)))
    cache = net.new_cache(batch, 12)
    with torch.no_grad():
        net(tokens(batch, 5), documents=torch.tensor([[0] * 5, [0] * 3 + [-1] * 2])[:batch], cache=cache)
        with Counted() as counted:
            net(tokens(batch, 1), cache=cache)
    return counted.names


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_makes_once_what_its_layers_share(batch: int) -> None:
    """Slots of rings, which of them are filled, turns: a further layer makes none, and takes few operations."""
    one, three = operations(1, batch), operations(3, batch)
    shared = ("arange", "remainder.Scalar", "clamp", "cos", "sin", "masked_fill_.Scalar", "_local_scalar_dense")
    for name in shared:
        assert one[f"aten::{name}"] == three[f"aten::{name}"], name
    assert three.total() - one.total() <= 2 * 68
