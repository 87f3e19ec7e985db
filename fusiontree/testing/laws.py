"""The laws of the design as functions of a spec. Each returns None, or the problem of the smallest failing case.

Cases go from small to large, so that the first failure is a small one.
"""

import io
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fusiontree.core.contracts import axes
from fusiontree.core.contracts.fusion import FusionSpec
from fusiontree.core.contracts.gate import Gate
from fusiontree.core.contracts.modules import Module
from fusiontree.core.contracts.node import NodeSpec
from fusiontree.core.model.cost import costs
from fusiontree.core.model.model import LanguageModel, build
from fusiontree.core.model.narrow import Table, axis_tables
from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.probes import probes
from fusiontree.core.spec import paths
from fusiontree.core.spec.fields import is_open
from fusiontree.kernels import OPS, use_backend
from fusiontree.pruning import PruneError, apply, droppable, plan_by_hand, simplify
from fusiontree.testing.narrowing import narrowed
from fusiontree.testing.subject import Subject, difference, randomised

LENGTHS = (1, 2, 3, 7, 19)
PADDING = -1


@dataclass(frozen=True)
class Law:
    """A law: its name and its check."""

    name: str
    broken: Callable[[Subject], str | None]

    @property
    def text(self) -> str:
        """The first line of the law's docstring."""
        return (self.broken.__doc__ or "").strip().splitlines()[0]


def _first(problems: Iterator[tuple[str, str | None]]) -> str | None:
    """The first case that has a problem."""
    return next((f"{case}: {problem}" for case, problem in problems if problem), None)


def round_trip(subject: Subject) -> str | None:
    """A spec written as YAML or JSON reads back as itself, as written and expanded."""
    spec = subject.spec
    ways = {
        "YAML": ModelSpec.from_yaml(spec.to_yaml()),
        "JSON": ModelSpec.model_validate_json(spec.model_dump_json()),
        "expand": spec.expand(),
        "fold": spec.fold(),
        "expand, fold, YAML": ModelSpec.from_yaml(spec.expand().fold().to_yaml()),
    }
    return _first(
        (way, None if (s == spec and s.digest() == spec.digest()) else "not equal") for way, s in ways.items()
    )


def strict(subject: Subject) -> str | None:
    """A key that does not exist is refused wherever it stands."""
    data = subject.spec.expand().data()
    places = [(), *(path for path, value in paths.walk(data) if isinstance(value, dict))]
    closed = (".".join(path) for path in places if not is_open(ModelSpec, data, path))
    return _first((path or "top", _accepts(data, path)) for path in closed)


def _accepts(data: dict, path: str) -> str | None:
    edited = deepcopy(data)
    place = edited
    for step in path.split(".") if path else ():
        place = place[int(step)] if isinstance(place, list) else place[step]
    place["no_such_key"] = 1
    try:
        ModelSpec.parse(edited)
    except ValueError as error:
        return None if "no_such_key" in str(error) else f"the error does not name the key: {error}"
    return "an unknown key was accepted"


def counted(subject: Subject) -> str | None:
    """Parameters: declared on the meta device, built, and shown are the same, and the axis tables describe each."""
    declared = {name: tuple(p.shape) for name, p in build(subject.spec, device="meta").named_parameters()}
    built = {name: tuple(p.shape) for name, p in subject.model.named_parameters()}
    if declared != built:
        return f"declared {declared}, built {built}"
    shown = costs(subject.spec, length=8)[0].parameters
    total = sum(p.numel() for p in subject.model.parameters())
    return _tables(subject) if shown == total else f"shown {shown}, built {total}"


def _tables(subject: Subject) -> str | None:
    tables = axis_tables(subject.spec)
    return _first((path, _table(subject, path, table, tables)) for path, table in tables.items())


def _rigid_axes(spec: ModelSpec) -> dict[str, frozenset[str]]:
    sources = {node.kv_source for _, node in spec.nodes()}
    rigid = {f"encodings.{name}": frozenset({"width", "max_length"}) for name in spec.encodings}
    for path, node in spec.nodes():
        tied = path.startswith("shared.") or path in sources or node.kv_source is not None
        rigid[path] = _rigid(node, tied=tied)
    return rigid


def _rigid(node: NodeSpec, *, tied: bool) -> frozenset[str]:
    """The axes that may not be turned around here: all, where they are `tied` to parameters of other nodes, as inner
    features are to what the fusion does with them."""
    if tied or getattr(node, "project", True) is False:
        return frozenset(name for dimensions in node.axes().values() for name in axes.names(dimensions))
    return node.rigid


def _table(subject: Subject, path: str, table: Table, tables: Iterable[str]) -> str | None:
    dimensions_of, sizes = table
    children = [p for p in tables if p.startswith(f"{path}.")]
    module = subject.model.get_submodule(path)
    own = {
        name: tuple(p.shape)
        for name, p in module.state_dict().items()
        if not any(f"{path}.{name}".startswith(f"{child}.") for child in children)
    }
    said = {name: tuple(axes.size(d, sizes) for d in dimensions) for name, dimensions in dimensions_of.items()}
    return None if own == said else f"axes give {said}, the parameters are {own}"


def shrinking(subject: Subject) -> str | None:
    """Weight decay shrinks every linear map, and no bias, no encoding and nothing of one dimension."""
    modules = ((path, module) for path, module in subject.model.named_modules() if isinstance(module, Module))
    return _first((path, _shrinking(path, module)) for path, module in modules)


def _shrinking(path: str, module: Module) -> str | None:
    if isinstance(module, nn.Linear) and "weight" not in module.decayed:
        return "the weight of a linear map does not shrink"
    for name in module.decayed:
        if path.startswith("encodings.") or name.endswith("bias") or module.get_parameter(name).ndim < 2:
            return f"{name} {list(module.get_parameter(name).shape)} shrinks"
    return None


def symmetric(subject: Subject) -> str | None:
    """Axes mean what they say: parts along any axis that is not rigid may change places (encodings make some rigid)."""
    if any(encoding.hooks & {"rotate", "bias"} for encoding in subject.spec.encodings.values()):
        return None
    tokens = subject.tokens(2, 9)
    wanted = subject.model(tokens).detach()
    return _first(_permutations(subject, tokens, wanted))


def _permutations(subject: Subject, tokens: Tensor, wanted: Tensor) -> Iterator[tuple[str, str | None]]:
    rigid = _rigid_axes(subject.spec)
    for path, (table, sizes) in axis_tables(subject.spec).items():
        named = {axis for dimensions in table.values() for axis in axes.names(dimensions)}
        for axis in sorted(named - rigid[path]):
            if sizes[axis] > 1 and not _is_shared(axis):
                yield f"{path}, axis {axis} reversed", _permuted(subject, path, axis, (tokens, wanted))


def _is_shared(axis: str) -> bool:
    """Whether other nodes' parameters run over the axis too: features of a width that a branch returns."""
    return axis.endswith("width") or axis in ("gate_units", "gate_features")


def _permuted(subject: Subject, path: str, axis: str, case: tuple[Tensor, Tensor]) -> str | None:
    tokens, wanted = case
    table, sizes = axis_tables(subject.spec)[path]
    turned = {axis: range(sizes[axis])[::-1]}
    state = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    for name, dimensions in table.items():
        full = f"{path}.{name}"
        state[full] = axes.narrow(state[full], dimensions, sizes, turned)
    model = build(subject.spec, dtype=torch.float64).eval()
    model.load_state_dict(state)
    return difference(model(tokens), wanted)


def seeded(subject: Subject) -> str | None:
    """Equal seeds build equal weights, and a parameter's start does not depend on the rest of the model."""
    first, again = build(subject.spec, seed=3).state_dict(), build(subject.spec, seed=3).state_dict()
    wider = subject.spec.replace({"vocab_size": subject.spec.vocab_size + 1})
    other = build(wider, seed=3).state_dict()
    same = {name: t for name, t in first.items() if other[name].shape == t.shape}
    pairs = [*((n, t, again[n]) for n, t in first.items()), *((n, t, other[n]) for n, t in same.items())]
    return _first((name, None if torch.equal(a, b) else "differs") for name, a, b in pairs)


@torch.no_grad()
def pickled(subject: Subject) -> str | None:
    """A model that was pickled (spawned workers, torch.save) or copied is the same function of its own parameters."""
    return _first((way, _copied(subject, copy)) for way, copy in (("pickle", _through_pickle), ("deepcopy", deepcopy)))


def _through_pickle(model: LanguageModel) -> LanguageModel:
    """A copy by way of pickle. Classes that no module holds, as those of a doctest, are handed over as they are."""
    classes: dict[str, type] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> str | None:
            if not isinstance(obj, type) or getattr(sys.modules.get(obj.__module__), obj.__qualname__, None) is obj:
                return None
            classes[str(id(obj))] = obj
            return str(id(obj))

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> type:
            return classes[pid]

    written = io.BytesIO()
    Pickler(written).dump(model)
    return Unpickler(io.BytesIO(written.getvalue())).load()


def _copied(subject: Subject, copy: Callable[[LanguageModel], LanguageModel]) -> str | None:
    tokens, other = subject.tokens(2, 7), build(subject.spec, dtype=torch.float64).eval()
    wanted = subject.model(tokens)
    try:
        model = copy(subject.model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = model(tokens)
    other.load_state_dict(randomised(model, 1).state_dict())
    problems = (
        ("the copy", difference(found, wanted, 0.0)),
        ("the copy with other parameters", difference(model(tokens), other(tokens), 0.0)),
        ("the original then", difference(subject.model(tokens), wanted, 0.0)),
    )
    return _first(iter(problems))


def causal(subject: Subject) -> str | None:
    """Tokens to come do not change what was said."""
    return _first((f"{time} tokens", _looks_ahead(subject, time)) for time in LENGTHS if time > 1)


def _looks_ahead(subject: Subject, time: int) -> str | None:
    tokens = subject.tokens(1, time)
    wanted = subject.model(tokens)
    for cut in range(1, time):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % subject.spec.vocab_size
        problem = difference(subject.model(changed)[:, :cut], wanted[:, :cut])
        if problem:
            return f"changing tokens from {cut} on: {problem}"
    return None


def alone(subject: Subject) -> str | None:
    """A row does not depend on its neighbours in the batch."""
    tokens = subject.tokens(3, 11)
    together = subject.model(tokens)
    return _first(
        (f"row {row} of 3", difference(together[row], subject.model(tokens[row : row + 1])[0])) for row in range(3)
    )


def split(subject: Subject) -> str | None:
    """Any split of a sequence is the same function: prefill, chunks, steps."""
    with torch.no_grad():
        problem = _first((f"{sum(cuts)} tokens in chunks {cuts}", _split(subject, cuts)) for cuts in _CUTS)
    return problem or _first((f"{cuts} with gradients", _split(subject, cuts)) for cuts in _CUTS[-2:])


_CUTS = ((1,), (1, 1), (2, 1), (1, 2), (3, 1, 4), (7, 7), (1,) * 19, (13, 1, 1, 6, 2, 1))


def _split(subject: Subject, cuts: tuple[int, ...], documents: Tensor | None = None) -> str | None:
    tokens = subject.tokens(2, sum(cuts))
    wanted = subject.model(tokens, documents=documents)
    cache, parts, start = subject.model.new_cache(2, sum(cuts)), [], 0
    for size in cuts:
        piece = slice(start, start + size)
        marks = None if documents is None else documents[:, piece]
        parts.append(subject.model(tokens[:, piece], documents=marks, cache=cache))
        start += size
    real = torch.ones_like(tokens, dtype=torch.bool) if documents is None else documents >= 0
    return difference(torch.cat(parts, 1)[real], wanted[real])


@torch.no_grad()
def growing(subject: Subject) -> str | None:
    """A cache without a bound gives what one with a bound gives."""
    tokens = subject.tokens(2, 17)
    cache = subject.model.new_cache(2)
    parts = [subject.model(part, cache=cache) for part in tokens.split((3,) * 4 + (1,) * 5, 1)]
    return difference(torch.cat(parts, 1), subject.model(tokens))


def packed(subject: Subject) -> str | None:
    """Documents packed in a row give the values and gradients that they give alone."""
    return _first((f"documents of {sizes} tokens", _packed(subject, sizes)) for sizes in _PACKS)


_PACKS = ((1, 1), (2, 1), (1, 3), (3, 2, 4), (7, 1, 1, 8), (9, 11))


def _packed(subject: Subject, sizes: tuple[int, ...]) -> str | None:
    tokens = subject.tokens(1, sum(sizes))
    documents = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    together = subject.model(tokens, documents=documents)
    apart = torch.cat([subject.model(part) for part in tokens.split(sizes, 1)], 1)
    return difference(together, apart) or _gradients(subject, together, apart)


def _gradients(subject: Subject, found: Tensor, wanted: Tensor) -> str | None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(found.shape, generator=generator, dtype=found.dtype)
    named = dict(subject.model.named_parameters())
    pairs = [torch.autograd.grad((y * weights).sum(), list(named.values()), allow_unused=True) for y in (found, wanted)]
    problems = ((f"gradient of {n}", _grad_far(a, b)) for n, a, b in zip(named, *pairs, strict=True))
    return _first(problems)


def _grad_far(found: Tensor | None, wanted: Tensor | None) -> str | None:
    """No gradient is one of 0: the only token of a document need not read what decays between two."""
    there = wanted if found is None else found
    if there is None:
        return None
    zero = torch.zeros_like(there)
    return difference(zero if found is None else found, zero if wanted is None else wanted, 1e-8)


@torch.no_grad()
def packed_and_split(subject: Subject) -> str | None:
    """Packed rows may be cut anywhere, documents and padding included."""
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 5, 5, PADDING, PADDING]])
    cuts = ((12,), (2, 10), (5, 7), (1, 3, 1, 4, 3), (1,) * 12)
    return _first(
        (f"chunks {sizes} of documents {documents.tolist()}", _split(subject, sizes, documents)) for sizes in cuts
    )


@torch.no_grad()
def padded(subject: Subject) -> str | None:
    """Padding changes nothing, wherever it stands, and leaves nothing behind in a cache."""
    masks = (["xx", "x."], ["xx", ".x"], ["x.x", ".xx"], ["xxxxxxxx", "..xxxxx.", ".x.x.x.x"], ["xxxx", "...."])
    return _first((f"real tokens {mask}", _padded(subject, mask)) for mask in masks)


def _padded(subject: Subject, masks: list[str]) -> str | None:
    real = torch.tensor([[mark == "x" for mark in mask] for mask in masks])
    tokens, steps = subject.tokens(*real.shape), subject.tokens(len(masks), 2, salt=1)
    cache = subject.model.new_cache(len(masks), real.shape[1] + 2)
    found = subject.model(tokens, documents=torch.where(real, 0, PADDING), cache=cache)
    later = subject.model(steps, cache=cache)
    for row, mask in enumerate(masks):
        wanted = subject.model(torch.cat([tokens[row][real[row]], steps[row]])[None])[0]
        both = torch.cat([found[row][real[row]], later[row]])
        problem = difference(both, wanted)
        if problem:
            return f"row {mask!r} and two tokens more: {problem}"
    return None


def cache_size(subject: Subject) -> str | None:
    """A cache takes exactly the bytes that the spec predicts."""
    return _first(
        (f"length {length}, {dtype}", _cache_size(subject, length, dtype))
        for length in (1, 4, 33)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    )


def _cache_size(subject: Subject, length: int, dtype: torch.dtype) -> str | None:
    cache = build(subject.spec, device="meta", dtype=dtype).new_cache(3, length)
    for path, node, scope in subject.spec.layer_nodes():
        predicted = 3 * node.cache_bytes(scope, length + scope.prefix, dtype)
        here = [state for place, state in cache.states.items() if place == path or (node.uses and _below(place, path))]
        found = sum(tensor.nbytes for state in here for tensor in state.values())
        if predicted != found:
            return f"{path}: predicted {predicted} bytes, found {found}"
    return None


def _below(place: str, path: str) -> bool:
    return place.startswith(f"{path}.")


def flops(subject: Subject) -> str | None:
    """FLOPs are what torch counts on a build whose every product is a matrix product."""
    return _first((f"{time} tokens", _flops(subject, time)) for time in (1, 5, 12))


def _flops(subject: Subject, time: int) -> str | None:
    predicted = costs(subject.spec, length=time)[0].flops * time
    with use_backend({op: "reference" for op in OPS}), FlopCounterMode(display=False) as counter, torch.no_grad():
        subject.model(subject.tokens(1, time))
    found = counter.get_total_flops()
    return None if abs(predicted - found) <= 1e-6 * max(found, 1) else f"predicted {predicted:g}, counted {found}"


def alive(subject: Subject) -> str | None:
    """Every parameter matters: each has a gradient on random input."""
    subject.model.zero_grad()
    logits = subject.model(subject.tokens(2, 19))
    named = dict(subject.model.named_parameters())
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    gradients = torch.autograd.grad((logits * weights).sum(), list(named.values()), allow_unused=True)
    dead = [name for name, g in zip(named, gradients, strict=True) if g is None or not bool((g != 0).any())]
    return f"no gradient reaches {', '.join(dead[:3])}" if dead else None


def precise(subject: Subject) -> str | None:
    """A model computes in the precision that it has: float64 within 1e-4 of float32, and in its own type."""
    model = build(subject.spec)
    model.load_state_dict({name: tensor.float() for name, tensor in subject.model.state_dict().items()})
    found, wanted = model.eval()(subject.tokens(2, 13)), subject.model(subject.tokens(2, 13))
    if (found.dtype, wanted.dtype) != (torch.float32, torch.float64):
        return f"types {found.dtype} and {wanted.dtype}"
    return difference(found.double(), wanted, 1e-4)


def gates(subject: Subject) -> str | None:
    """Gate values sum to 1, have the units that the spec says, and read the input if and only if it says so."""
    return _first((path, _gate(subject, path, gate)) for path, gate in _gates(subject))


def _gates(subject: Subject) -> Iterator[tuple[str, Gate]]:
    yield from ((p, m) for p, m in subject.model.named_modules() if isinstance(m, Gate))


def _gate(subject: Subject, path: str, gate: Gate) -> str | None:
    fusion = dict(subject.spec.gates())[path]
    spec, scope = fusion.gate_spec, fusion.gate_scope(subject.spec.scope)
    assert spec is not None
    values = _gate_values(subject, gate)
    total = torch.stack(list(values.values())).sum(0)
    if problem := difference(total, torch.ones_like(total)):
        return f"the sum of the values is {problem}"
    for branch, value in values.items():
        if value.shape[-1] != spec.units(scope.width):
            return f"{branch} has {value.shape[-1]} values, the spec says {spec.units(scope.width)}"
        moves = value.ndim == 3 and bool((value[:, 1:] != value[:, :-1]).any())
        if moves != spec.reads_features:
            return f"{branch} {'changes' if moves else 'does not change'} with the input, the spec says otherwise"
        if value.shape[-1] > 1 and not bool((value[..., 1:] != value[..., :-1]).any()):
            return f"all units of {branch} have one value"
    return None


def _gate_values(subject: Subject, gate: Gate) -> dict[str, Tensor]:
    seen: list[dict[str, Tensor]] = []
    with probes.watch({"": gate}, lambda path, weights, real: seen.append(weights)), torch.no_grad():
        subject.model(subject.tokens(2, 7))
    return seen[0]


def generated(subject: Subject) -> str | None:
    """A batch of unequal prompts gives what each prompt gives alone, greedily and with seeds of their own."""
    prompts = [subject.tokens(1, n, salt=n)[0].tolist() for n in (1, 4, 6)]
    ways = {"greedy": (0.0, [0, 0, 0]), "sampled": (1.0, [5, 6, 7])}
    return _first((way, _generated(subject, prompts, heat, seeds)) for way, (heat, seeds) in ways.items())


def _generated(subject: Subject, prompts: list[list[int]], heat: float, seeds: list[int]) -> str | None:
    model = subject.model
    together = model.generate(prompts, max_new_tokens=6, temperature=heat, seed=seeds)
    pairs = list(zip(prompts, seeds, strict=True))
    apart = [model.generate([p], max_new_tokens=6, temperature=heat, seed=[s])[0] for p, s in pairs]
    return None if together == apart else f"{together} together, {apart} alone"


def pruned(subject: Subject) -> str | None:
    """Dropping a part from spec and weights is silencing it, and simplifying changes nothing."""
    return _first((f"drop {path}", _pruned(subject, (path,))) for path in droppable(subject.spec))


def _pruned(subject: Subject, drops: tuple[str, ...]) -> str | None:
    try:
        plan = plan_by_hand(subject.spec, drops)
    except PruneError as error:
        return None if _may_refuse(subject.spec, drops[0]) else str(error)
    tokens = subject.tokens(2, 9)
    smaller = apply(subject.model, plan).eval()
    with subject.model.drop(drops):
        wanted = subject.model(tokens)
    count = costs(smaller.spec, length=8)[0].parameters
    if count != sum(p.numel() for p in smaller.parameters()):
        return "parameters are left over"
    simple, _ = simplify(smaller)
    return difference(smaller(tokens), wanted, 1e-10) or difference(simple.eval()(tokens), wanted, 1e-10)


def _may_refuse(spec: ModelSpec, path: str) -> bool:
    """Whether something has no exact form without this part: a fusion that has no other branch, a layer whose residual
    is no plain sum, nodes that read the keys of one inside."""
    branches = dict(spec.branches())
    if path in branches:
        fusion = spec.node(branches[path][0])
        alone = isinstance(fusion, FusionSpec) and len(fusion.branches) == 1
    else:
        residual = spec.expanded_layers()[int(path.split(".")[1])].residual
        alone = residual.keep != 1 or residual.source != "stream"
    sources = (node.kv_source for _, node in spec.nodes() if node.kv_source is not None)
    return alone or any(f"{source}.".startswith(f"{path}.") for source in sources)


LAWS = tuple(
    Law(function.__name__, function)
    for function in (
        round_trip,
        strict,
        counted,
        shrinking,
        seeded,
        pickled,
        causal,
        alone,
        split,
        growing,
        packed,
        packed_and_split,
        padded,
        cache_size,
        flops,
        alive,
        symmetric,
        precise,
        gates,
        generated,
        pruned,
        narrowed,
    )
)
"""Every law, the cheapest first where one explains another."""
