"""Observing, forcing and dropping against direct computations, and that they leave no trace."""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from core_cases import MIXER, MLP, complaint, edited, model, tokens
from torch import Tensor

from fusiontree import LanguageModel, ModelSpec, build
from fusiontree.core.contracts.gate import Gate
from fusiontree.testing.subject import randomised

GATE = "layers.0.mixer.gate"
THREE = {"a": MLP, "b": MLP | {"hidden": 4}, "c": {"kind": "swiglu", "hidden": 8}}
GATES = {
    "sigmoid channel": {"kind": "sigmoid", "granularity": "channel"},
    "sigmoid static": {"kind": "sigmoid", "granularity": "channel", "static": True},
    "sigmoid layer": {"kind": "sigmoid", "granularity": "layer"},
    "softmax head": {"kind": "softmax", "granularity": "head", "heads": 4},
    "softmax token": {"kind": "softmax", "granularity": "token"},
    "hard concrete": {"kind": "hard_concrete", "granularity": "channel"},
    "constant": {"kind": "constant", "values": {"mamba": 0.25, "attention": 0.75}},
}


def gated(gate: dict[str, Any], branches: dict[str, Any] | None = None) -> LanguageModel:
    mixer = MIXER | {"gate": gate} | ({"branches": branches} if branches else {})
    spec = ModelSpec.parse(edited("layers.0.mixer", mixer))
    return randomised(build(spec, dtype=torch.float64), 2).eval().requires_grad_(False)


@contextmanager
def recorded(built: LanguageModel) -> Iterator[list[dict[str, Tensor]]]:
    """What the gate of the first layer returns, call by call."""
    calls: list[dict[str, Tensor]] = []
    gate = built.get_submodule(GATE)
    handle = gate.register_forward_hook(lambda _, __, output: calls.append({k: v.clone() for k, v in output.items()}))
    yield calls
    handle.remove()


def real_values(calls: list[Tensor], real: list[Tensor]) -> list[float]:
    """The values of every call at real tokens; one set a call where they do not depend on tokens."""
    kept = [value if value.ndim == 1 else value[mask] for value, mask in zip(calls, real, strict=True)]
    return torch.cat([value.flatten() for value in kept]).tolist()


class TestObserve:
    @pytest.mark.parametrize("name", GATES)
    def test_statistics_are_those_of_all_real_tokens(self, name: str) -> None:
        built = gated(GATES[name])
        documents = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0], [-1, -1, 5, 5, 5, -1]])
        with built.observe() as seen, recorded(built) as calls:
            built(tokens(3, 6), documents=documents)
            built(tokens(1, 4))
        assert list(seen) == [GATE]
        behind = torch.arange(6) < (documents >= 0).sum(1, keepdim=True)  # nodes see padding behind the real tokens
        real = [behind, torch.ones(1, 4).bool()]
        values = {branch: real_values([call[branch] for call in calls], real) for branch in calls[0]}
        pairs = list(zip(*values.values(), strict=True))
        entropy = sum(-sum(p * math.log2(p) for p in pair if p > 0) for pair in pairs) / len(pairs)
        for branch, value in values.items():
            found = seen[GATE][branch]
            assert found.count == len(value)
            assert found.mean == pytest.approx(statistics.fmean(value), abs=1e-12)
            assert found.std == pytest.approx(statistics.pstdev(value), abs=1e-7)
            assert found.entropy == pytest.approx(entropy, abs=1e-12)
            assert found.saturated == pytest.approx(sum(v < 0.05 or v > 0.95 for v in value) / len(value))
            shares = [sum(min(int(v * 20), 19) == place for v in value) / len(value) for place in range(20)]
            assert found.histogram == pytest.approx(shares, abs=1e-12)

    def test_padding_may_hold_anything(self) -> None:
        built, documents = gated(GATES["sigmoid channel"]), torch.tensor([[0, 0, -1, -1]])
        with built.observe() as seen:
            built(torch.tensor([[1, 2, 3, 4]]), documents=documents)
        with built.observe() as alone:
            built(torch.tensor([[1, 2]]))
        found, expected = seen[GATE]["mamba"], alone[GATE]["mamba"]
        assert found.count == expected.count == 2 * 16
        assert found.mean == pytest.approx(expected.mean, abs=1e-9)
        assert found.histogram == expected.histogram

    def test_nothing_seen_is_no_number(self) -> None:
        built = gated(GATES["sigmoid channel"])
        with built.observe() as seen:
            built(tokens(1, 3), documents=torch.full((1, 3), -1))
        assert seen[GATE]["mamba"].count == 0
        with built.observe() as untouched:
            pass
        assert dict(untouched) == {}

    def test_it_changes_nothing_and_ends_with_the_block(self) -> None:
        built = gated(GATES["sigmoid channel"])
        before = built(tokens(2, 5))
        with built.observe() as seen:
            during = built(tokens(2, 5))
        count = seen[GATE]["mamba"].count
        built(tokens(2, 5))
        assert torch.equal(before, during)
        assert seen[GATE]["mamba"].count == count == 2 * 5 * 16


class TestForce:
    @pytest.mark.parametrize("path", [GATE, "layers.0.mixer"])
    def test_values_become_constants_and_the_others_share_the_rest(self, path: str) -> None:
        built = gated({"kind": "softmax", "granularity": "channel"}, THREE)
        fixed = {"kind": "constant", "values": {"a": 0.6, "b": 0.2, "c": 0.2}}
        constant = build(built.spec.replace({GATE: fixed}), dtype=torch.float64, device="meta")
        weights = {name: tensor for name, tensor in built.state_dict().items() if not name.startswith(GATE)}
        constant.load_state_dict(weights, assign=True)
        with built.force({path: {"a": 0.6}}):
            found = built(tokens(2, 5))
        torch.testing.assert_close(found, constant(tokens(2, 5)), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("name", GATES)
    def test_one_is_the_branch_alone(self, name: str) -> None:
        built = gated(GATES[name])
        with built.force({GATE: {"attention": 1.0}}):
            found = built(tokens(2, 5))
        alone = MIXER | {"gate": None, "branches": {"attention": MIXER["branches"]["attention"]}}
        single = build(built.spec.replace({"layers.0.mixer": alone}), dtype=torch.float64, device="meta")
        single.load_state_dict({n: t for n, t in built.state_dict().items() if n in single.state_dict()}, assign=True)
        torch.testing.assert_close(found, single(tokens(2, 5)), rtol=0, atol=1e-12)

    def test_the_innermost_force_holds(self) -> None:
        built = gated(GATES["sigmoid channel"])
        with built.force({GATE: {"mamba": 0.3}}):
            expected = built(tokens(1, 4))
        with built.force({GATE: {"mamba": 0.9}}), built.force({GATE: {"mamba": 0.3}}):
            assert torch.equal(built(tokens(1, 4)), expected)

    def test_what_is_forced_is_what_is_then_observed(self) -> None:
        built = gated(GATES["sigmoid channel"])
        with built.force({GATE: {"mamba": 0.3}}), built.observe() as within:
            built(tokens(1, 4))
        with built.observe() as around, built.force({GATE: {"mamba": 0.9}}), built.force({GATE: {"mamba": 0.3}}):
            built(tokens(1, 4))
        for seen in (within, around):
            assert seen[GATE]["mamba"].mean == pytest.approx(0.3)
            assert seen[GATE]["attention"].mean == pytest.approx(0.7)

    @pytest.mark.parametrize(
        ("values", "parts"),
        [
            ({"layers.0.mixr": {"mamba": 1.0}}, ["layers.0.mixr", f"'{GATE}'"]),
            ({"layers.1.ffn": {"mamba": 1.0}}, ["layers.1.ffn", "no gate", GATE]),
            ({GATE: {"mambo": 1.0}}, [GATE, "'mambo'", "'mamba'"]),
            ({GATE: {"mamba": 1.5}}, [f"{GATE}.mamba", "1.5", "[0, 1]"]),
            ({GATE: {"mamba": -0.5}}, [f"{GATE}.mamba", "-0.5"]),
            ({GATE: {"mamba": float("nan")}}, [f"{GATE}.mamba", "nan"]),
            ({GATE: {"mamba": 0.5, "attention": 0.6}}, [GATE, "1.1", "sum to 1"]),
            ({GATE: {"mamba": 0.5, "attention": 0.4}}, [GATE, "0.9", "sum to 1"]),
        ],
    )
    def test_bad_values_are_named(self, values: dict[str, dict[str, float]], parts: list[str]) -> None:
        built = gated(GATES["sigmoid channel"])

        def run() -> None:
            with built.force(values):
                pytest.fail("entered")

        complaint(run, *parts)
        assert traces(built) == 0


class TestDrop:
    @pytest.mark.parametrize("paths", [["layers.1.ffn"], ["layers.1"]])
    def test_a_dropped_sublayer_is_a_layer_without_it(self, paths: list[str]) -> None:
        built = model().requires_grad_(False)
        without = build(built.spec.replace({"layers.1.ffn": None}), dtype=torch.float64, device="meta")
        weights = {name: tensor for name, tensor in built.state_dict().items() if not name.startswith("layers.1.")}
        without.load_state_dict(weights, assign=True)
        with built.drop(paths):
            found = built(tokens(2, 5))
        torch.testing.assert_close(found, without(tokens(2, 5)), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("name", GATES)
    def test_of_two_branches_the_other_is_left_whole(self, name: str) -> None:
        built = gated(GATES[name])
        with built.force({GATE: {"attention": 1.0}}):
            expected = built(tokens(2, 5))
        with built.drop(["layers.0.mixer.branches.mamba"]):
            found = built(tokens(2, 5))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize(
        "path", ["layers.0.mixer.branches.mambo", "layers.9", "layers.1.mixer", "embedding", "layers.0.mixer.gate", ""]
    )
    def test_what_is_not_there_is_named(self, path: str) -> None:
        built = model()

        def run() -> None:
            with built.drop([path]):
                pytest.fail("entered")

        complaint(run, f"{path}: ", "layers.0")
        assert traces(built) == 0

    def test_a_good_path_before_a_bad_one_leaves_no_trace(self) -> None:
        built = model()

        def run() -> None:
            with built.drop(["layers.0.mixer.branches.mamba", "layers.7"]):
                pytest.fail("entered")

        complaint(run, "layers.7")
        assert traces(built) == 0


def traces(built: LanguageModel) -> int:
    """Hooks and dropped branches that are still there."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in built.modules())
    return hooks + sum(len(getattr(module, "dropped", ())) for module in built.modules())


PROBES: dict[str, Callable[[LanguageModel], AbstractContextManager[Any]]] = {
    "observe": lambda built: built.observe(),
    "force": lambda built: built.force({GATE: {"mamba": 1.0}}),
    "drop": lambda built: built.drop(["layers.0.mixer.branches.mamba", "layers.1"]),
    "drop twice": lambda built: built.drop(["layers.1.ffn", "layers.1.ffn", "layers.1"]),
}


@pytest.mark.parametrize("name", PROBES)
def test_no_trace_is_left_even_by_an_exception(name: str) -> None:
    built = model().requires_grad_(False)
    before = built(tokens(2, 5))

    def interrupted() -> None:
        with PROBES[name](built):
            assert traces(built) > 0
            built(tokens(2, 5))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    assert traces(built) == 0
    assert torch.equal(built(tokens(2, 5)), before)


def test_nested_drops_end_one_by_one() -> None:
    built = model().requires_grad_(False)
    with built.drop(["layers.0.mixer.branches.mamba"]):
        outer = built(tokens(1, 4))
        with built.drop(["layers.1"]):
            assert not torch.equal(built(tokens(1, 4)), outer)
        assert torch.equal(built(tokens(1, 4)), outer)
        gate = built.get_submodule(GATE)
        assert isinstance(gate, Gate)
        assert gate.dropped == {"mamba"}
