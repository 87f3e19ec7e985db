"""Generation against direct computations: greedy, cuts of the distribution, seeds, stops, unequal prompts."""

from collections import Counter
from typing import Any

import pytest
import torch
from core_cases import VOCABULARY, complaint, model, tokens
from torch import Tensor

from fusiontree import LanguageModel, build, machine
from fusiontree.core.model import generation
from fusiontree.core.model.generation import Sampling, stream

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [3], [9, 8, 7]]


@pytest.fixture(scope="module")
def built() -> LanguageModel:
    return model()


@torch.no_grad()
def greedy(built: LanguageModel, prompt: list[int], steps: int) -> list[int]:
    """The whole forward pass again for every token."""
    row = list(prompt)
    for _ in range(steps):
        row.append(int(built(torch.tensor([row]))[0, -1].argmax()))
    return row


def kept(logits: Tensor, *, temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """What may be drawn with which probability, token by token, most likely first."""
    weights = [float(x) for x in (logits.double() / temperature).exp()]
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    chosen: dict[int, float] = {}
    before = 0.0
    for rank, token in enumerate(order):
        if (top_k is not None and rank >= top_k) or (top_p is not None and rank and before >= top_p):
            break
        chosen[token] = weights[token] / sum(weights)
        before += chosen[token]
    return {token: mass / sum(chosen.values()) for token, mass in chosen.items()}


@pytest.mark.parametrize(
    "cut",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
    ],
)
def test_draws_follow_the_cut_distribution(cut: dict[str, Any]) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 1.9, 0.0, -3.0, 1.0])
    wanted = kept(logits, **({"top_k": None, "top_p": None} | cut))
    rows = 4000
    sampling = Sampling(**cut, seed=list(range(rows)))
    drawn = sampling.choose(logits.expand(rows, -1), sampling.generators(rows)).tolist()
    counts = Counter(drawn)
    assert set(counts) <= set(wanted)
    for token, mass in wanted.items():
        deviation = (rows * mass * (1 - mass)) ** 0.5
        assert abs(counts[token] - rows * mass) <= 5 * deviation + 1e-9


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 1e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.tensor([[2.0, 900.0, -1e4, 899.0]])
    sampling = Sampling(temperature)
    assert sampling.choose(logits, sampling.generators(1)).tolist() == [1]


def test_greedy_is_the_best_token_of_the_full_forward_pass(built: LanguageModel) -> None:
    found = built.generate(PROMPTS, max_new_tokens=9)
    assert found == [greedy(built, prompt, 9) for prompt in PROMPTS]


def test_a_prompt_s_continuation_does_not_depend_on_its_neighbours(built: LanguageModel) -> None:
    drawn: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.3, "top_k": 9}
    together = built.generate(PROMPTS, seed=[5, 6, 7], **drawn)
    apart = [built.generate([prompt], seed=[seed], **drawn) for prompt, seed in zip(PROMPTS, [5, 6, 7], strict=True)]
    assert together == [rows[0] for rows in apart]


def test_one_seed_gives_row_i_the_seed_plus_i(built: LanguageModel) -> None:
    drawn: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.3}
    assert built.generate(PROMPTS, seed=5, **drawn) == built.generate(PROMPTS, seed=[5, 6, 7], **drawn)
    same = built.generate([[1, 2]] * 3, seed=5, **drawn)
    assert len({tuple(row) for row in same}) == 3, "rows with seeds of their own differ"
    assert same != built.generate([[1, 2]] * 3, seed=50, **drawn)


@pytest.mark.parametrize("stop", [["a"], [1.5], [[]], [[1, "b"]]])
def test_a_stop_that_no_token_can_be_is_refused(built: LanguageModel, stop: Any) -> None:
    complaint(lambda: built.generate(PROMPTS, max_new_tokens=1, stop=stop), "stop: tokens are whole numbers")


@pytest.mark.parametrize("stop", [(), [3], [(3, 5), 7]])
def test_streaming_equals_generating(built: LanguageModel, stop: Any) -> None:
    steps = list(stream(built, PROMPTS, max_new_tokens=12, sampling=Sampling(1.0, seed=2), stop=stop))
    joined = [[*p, *(s[row] for s in steps if s[row] is not None)] for row, p in enumerate(PROMPTS)]
    assert joined == built.generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=2, stop=stop)


class TestStop:
    def test_a_row_ends_with_what_completes_a_stop_and_others_go_on(self, built: LanguageModel) -> None:
        free = built.generate(PROMPTS, max_new_tokens=10, temperature=1.0, seed=4)
        new = [row[len(prompt) :] for row, prompt in zip(free, PROMPTS, strict=True)]
        stop = tuple(new[0][2:4])
        ended = built.generate(PROMPTS, max_new_tokens=10, temperature=1.0, seed=4, stop=[stop])
        for row, prompt, whole in zip(ended, PROMPTS, new, strict=True):
            ends = [end for end in range(2, 11) if tuple(whole[end - 2 : end]) == stop]
            assert row == [*prompt, *whole[: min(ends, default=10)]]
        assert len(ended[0]) < len(free[0])

    def test_the_prompt_does_not_count(self, built: LanguageModel) -> None:
        first = built.generate([[1, 2]], max_new_tokens=3)[0][2]
        found = built.generate([[1, 2]], max_new_tokens=3, stop=[(2, first), (1,)])
        assert found[0][:3] == [1, 2, first]
        assert len(found[0]) == 5 or found[0][-1] == 1

    def test_a_tensor_has_minus_one_behind_an_early_end(self, built: LanguageModel) -> None:
        prompts = tokens(3, 4)
        free = built.generate(prompts, max_new_tokens=6, temperature=1.0, seed=1)
        last = int(free[0, 4])
        found = built.generate(prompts, max_new_tokens=6, temperature=1.0, seed=1, stop=[last])
        assert found.shape[0] == 3
        for row, whole in zip(found.tolist(), free.tolist(), strict=True):
            end = next((i for i in range(4, 10) if whole[i] == last), 9) + 1
            assert row[:end] == whole[:end]
            assert set(row[end:]) <= {-1}

    def test_it_stops_computing_when_all_rows_have(self, built: LanguageModel) -> None:
        everything = list(range(VOCABULARY))
        assert len(list(stream(built, PROMPTS, max_new_tokens=50, sampling=Sampling(), stop=everything))) == 1


class TestForms:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_any_integers(self, built: LanguageModel, dtype: torch.dtype) -> None:
        prompts = tokens(2, 3)
        stop = [int(built.generate(prompts, max_new_tokens=1)[0, -1])]
        expected = built.generate(prompts, max_new_tokens=4, stop=stop)
        assert torch.equal(built.generate(prompts.to(dtype), max_new_tokens=4, stop=stop), expected)

    def test_no_new_tokens(self, built: LanguageModel) -> None:
        assert built.generate(PROMPTS, max_new_tokens=0) == PROMPTS
        assert torch.equal(built.generate(tokens(2, 3), max_new_tokens=0), tokens(2, 3))

    def test_tensors_and_lists_give_the_same(self, built: LanguageModel) -> None:
        prompts = tokens(2, 5)
        found = built.generate(prompts, max_new_tokens=4)
        assert found.tolist() == built.generate(prompts.tolist(), max_new_tokens=4)

    def test_nothing_is_recorded_for_gradients(self, built: LanguageModel) -> None:
        steps = stream(built, PROMPTS, max_new_tokens=2, sampling=Sampling())
        next(steps)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompts", "options", "parts"),
    [
        ([[1]], {"temperature": -1.0}, ["temperature: ", "-1"]),
        ([[1]], {"temperature": float("nan")}, ["temperature: ", "nan"]),
        ([[1]], {"top_k": 0}, ["top_k: ", "found 0"]),
        ([[1]], {"top_p": 0.0}, ["top_p: ", "found 0"]),
        ([[1]], {"top_p": 1.5}, ["top_p: ", "1.5"]),
        ([[1], [2]], {"seed": [1]}, ["seed: ", "1 seeds", "2 prompts"]),
        ([[1]], {"seed": 2**70}, ["seed: ", "64"]),
        ([[1]], {"max_new_tokens": -1}, ["max_new_tokens: ", "-1"]),
        ([], {}, ["prompts: ", "at least one"]),
        ([[1], []], {}, ["prompts: ", "at least one"]),
        ([1, 2], {}, ["prompts: ", "found 1"]),
        (["ab"], {}, ["prompts: ", "'ab'"]),
        ([[1.5]], {}, ["prompts: ", "1.5"]),
        ([[VOCABULARY]], {}, ["tokens: ", str(VOCABULARY), f"0..{VOCABULARY - 1}"]),
        (torch.tensor([1, 2]), {}, ["prompts: ", "[2]"]),
        (torch.tensor([[0.5]]), {}, ["tokens: ", "integer", "float32"]),
    ],
)
def test_bad_input_is_named(built: LanguageModel, prompts: Any, options: dict[str, Any], parts: list[str]) -> None:
    complaint(lambda: built.generate(prompts, **({"max_new_tokens": 2} | options)), *parts)


LEARNED: dict[str, Any] = {"encodings": {"time": {"kind": "srte_learned", "max_length": 8}}}


def test_a_prompt_longer_than_a_learned_encoding() -> None:
    complaint(lambda: model(**LEARNED).generate([[1] * 9], max_new_tokens=1), "encodings.time: ", "position 8", "8 pos")


def test_a_row_that_has_ended_at_the_end_of_an_encoding_does_not_stop_the_others() -> None:
    learned = model(**LEARNED)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [3, 1]]
    stop = [learned.generate([prompts[0]], max_new_tokens=1)[0][-1]]
    alone = learned.generate([prompts[1]], max_new_tokens=6, stop=stop)
    assert len(alone[0]) > 4, "the second row has to go on after the first has ended"
    assert learned.generate(prompts, max_new_tokens=6, stop=stop) == [[*prompts[0], *stop], *alone]


def test_noise_is_for_training_alone() -> None:
    gate = {"kind": "hard_concrete", "granularity": "token"}
    noisy = build(model().spec.replace({"layers.0.mixer.gate": gate}), dtype=torch.float64)
    tokens = torch.arange(6)[None] % 7
    assert noisy.training
    assert not torch.equal(noisy(tokens), noisy(tokens))
    first = noisy.generate([[1, 2, 3]], max_new_tokens=8)
    assert (
        first == noisy.generate([[1, 2, 3]], max_new_tokens=8) == noisy.eval().generate([[1, 2, 3]], max_new_tokens=8)
    )
    assert noisy.train().training


def test_generating_leaves_the_mode_as_it_was() -> None:
    built = model().train()
    built.generate([[1]], max_new_tokens=2)
    assert built.training
    assert all(module.training for module in built.modules())


def test_a_stop_that_is_no_list() -> None:
    complaint(lambda: model().generate([[1]], max_new_tokens=2, stop=3), "stop: ", "found 3")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_say_nothing_are_named(temperature: float, value: float) -> None:
    """At the row and the step where they come: here once the row has seen token 5."""
    net = model(head={"tied": False})
    logits, calls = net.logits, []

    def broken(features: Tensor) -> Tensor:
        calls.append(features)
        found = logits(features)
        return found.index_fill(0, torch.tensor([1]), value) if len(calls) == 3 else found

    net.logits = broken  # type: ignore[method-assign]
    job = lambda: net.generate([[1, 2], [3]], max_new_tokens=5, temperature=temperature)  # noqa: E731
    complaint(job, "generate: row 1, new token 3: ", "not finite in float64")


def test_a_model_that_overflows_says_so() -> None:
    net = model().half()
    with torch.no_grad():
        net.embedding.weight.mul_(6e4)
    complaint(lambda: net.generate([[1, 2, 3]], max_new_tokens=2), "new token 1: ", "float16")


def test_a_row_that_has_ended_may_say_nothing() -> None:
    net = model()
    first = net.generate([[1, 2]], max_new_tokens=1)[0][-1]
    logits, calls = net.logits, []

    def broken(features: Tensor) -> Tensor:
        calls.append(features)
        return logits(features).index_fill(0, torch.tensor([0] if len(calls) > 1 else []).long(), torch.nan)

    net.logits = broken  # type: ignore[method-assign]
    found = net.generate([[1, 2], [3, 4]], max_new_tokens=3, stop=[first])
    assert len(found[0]) == 3


def test_long_continuations_are_compiled_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    net, times = model(), []
    monkeypatch.setattr(net, "compile", lambda: times.append(1))
    monkeypatch.setattr(generation, "COMPILED_FROM", 4)
    monkeypatch.setattr(machine, "compile_refusal", lambda device: None)
    for asked, new, wanted in [(False, 5, 0), ("auto", 3, 0), ("auto", 4, 1), (True, 1, 2)]:
        net.generate(PROMPTS, max_new_tokens=new, compile=asked)
        assert len(times) == wanted
    monkeypatch.setattr(machine, "compile_refusal", lambda device: "no compiler")
    net.generate(PROMPTS, max_new_tokens=5, compile="auto")
    assert len(times) == 2
    complaint(lambda: net.generate(PROMPTS, max_new_tokens=5, compile=True), "compile: ", "no compiler")
    complaint(lambda: net.generate(PROMPTS, max_new_tokens=5, compile="yes"), "compile: ", "'yes'")  # type: ignore
