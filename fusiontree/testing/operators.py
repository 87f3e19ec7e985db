"""The laws of operators: `check_op(OP)` runs them on every backend that serves here, on the operator's examples.

>>> from fusiontree.kernels.linear_recurrence import LINEAR_RECURRENCE
>>> check_op(LINEAR_RECURRENCE, laws=OP_LAWS[-1:])
['flops']
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fusiontree.errors import FusionTreeError
from fusiontree.kernels import Op
from fusiontree.kernels.common.cases import Case
from fusiontree.testing.subject import difference

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 8e-3}
LENGTHS = (1, 2, 3, 63, 64, 65, 130, 257)
ROWS = 6
STARTS = ((64,), (32, 256), (128, 192), (5, 40, 80, 127, 128, 129, 131), (255, 256, 257), (1, 63, 127, 320))
"""Where the documents of each row start: at the edges of the blocks that backends cut time into, and beside them."""
CUTS = ((1,), (1, 2, 3, 4), (64,), (7, 70, 71), (129,))
Segments = Int[Tensor, "batch time"]


class OperatorBroken(AssertionError):
    """A law that does not hold for an operator."""


class Trial(NamedTuple):
    """An operator on one of its examples, with the backends that are to be tried (none: all)."""

    op: Op[Any]
    case: Case
    only: tuple[str, ...] = ()

    def draw(self, time: int, dtype: torch.dtype = torch.float64, *, packed: bool | Segments = False) -> Any:
        """Random arguments of `ROWS` rows, with a state and, if wanted, random or given documents."""
        inputs = self.case.inputs(time, dtype, seed=time, rows=ROWS)
        changes: dict[str, Any] = {}
        if self.case.carried == "initial_state":
            like = inputs.results()[1]
            generator = torch.Generator().manual_seed(time)
            changes["initial_state"] = torch.randn(like.shape, generator=generator).to(like.dtype)
        if packed is not False:
            changes["segments"] = random_segments(time) if packed is True else packed
        return inputs._replace(**changes)

    def serving(self, inputs: Any) -> list[str]:
        """The backends that serve a call, the reference among them."""
        found = [choice.backend for choice in self.op.explain(inputs.request) if choice.refusal is None]
        return [name for name in found if not self.only or name in self.only]

    def run(self, inputs: Any, backend: str) -> list[Tensor]:
        """All results."""
        results = self.op(inputs, backend)
        return [results] if isinstance(results, Tensor) else list(results)

    def real(self, inputs: Any, backend: str) -> list[Tensor]:
        """All results, of outputs what is at real tokens."""
        return _real(self.run(inputs, backend), inputs.segments)

    def named(self, inputs: Any) -> dict[str, Tensor]:
        """The tensors among the arguments, by name; those of a named tuple inside are `past.keys`."""
        fields = {name: forms[0].of(inputs) for name, forms in self._shapes.items()}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def replaced(self, inputs: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
        """The same call with other tensors."""
        nested: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.named(inputs).items():
            outer, _, inner = name.partition(".")
            nested.setdefault(outer, {})[inner] = change(name, tensor)
        return inputs._replace(
            **{
                outer: parts[""] if "" in parts else getattr(inputs, outer)._replace(**parts)
                for outer, parts in nested.items()
            }
        )

    def at(self, inputs: Any, rows: slice, time: slice = slice(None)) -> Any:
        """The call for some rows and some tokens."""

        def cut(name: str, tensor: Tensor) -> Tensor:
            axes = self.axes(name)
            tensor = tensor[rows] if "batch" in axes else tensor
            return tensor[:, time] if "time" in axes else tensor

        return self.replaced(inputs, cut)

    def axes(self, name: str) -> list[str]:
        """The names of an argument's dimensions."""
        return [axis for axis, _ in self._shapes[name][0].dimensions]

    def tokens(self) -> list[str]:
        """The floating-point arguments that have a value for every token."""
        return [name for name, forms in self._shapes.items() if "time" in self.axes(name) and not forms[0].integers]

    @property
    def _shapes(self) -> dict[str, Any]:
        assert self.op.shapes is not None
        return self.op.shapes.forms


def _real(results: list[Tensor], segments: Segments | None) -> list[Tensor]:
    return results if segments is None else [results[0][segments >= 0], *results[1:]]


def random_segments(time: int, seed: int = 0) -> Segments:
    """Six rows: one document; from segment 0 on; from 1 on; half padding; all padding; ragged; documents of 1 and 2
    tokens are among them."""
    generator = torch.Generator().manual_seed(1000 * seed + time)
    starts = torch.rand(ROWS, time, generator=generator) < 4 / (time + 4)
    starts[:, time // 2 : time // 2 + 2] = True
    rows = starts.long().cumsum(1) * torch.randint(1, 3, (ROWS, 1), generator=generator)
    rows[0] = 0
    rows[1] -= rows[1, 0].clone()
    rows[2] += 1 - rows[2, 0]
    rows[3, (time + 1) // 2 :] = -1
    rows[4] = -1
    rows[5, time - int(torch.randint(time, (), generator=generator)) :] = -1
    return rows


def segments_from(starts: tuple[int, ...], time: int) -> Segments:
    """Segments with a new document at each of `starts`, equal in all rows."""
    begins = torch.zeros(time, dtype=torch.long)
    begins[list(starts)] = 1
    return begins.cumsum(0).expand(ROWS, -1)


def differs(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype = torch.float64) -> str | None:
    """How results differ beyond rounding; in bfloat16, where rounding an output is half a percent of its largest, by
    the root mean square (one rounding is 1.1e-3)."""
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        problem = _differs(one.detach().double(), other.detach().double(), dtype)
        if problem:
            return f"{problem} (tensor {index})"
    return None


def _differs(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> str | None:
    if found.shape != wanted.shape or dtype != torch.bfloat16 or not found.numel():
        return difference(found, wanted, TOLERANCE[dtype])
    error = float((found - wanted).norm() / wanted.norm().clamp(min=math.sqrt(wanted.numel()) / 1e3))
    return None if error <= TOLERANCE[dtype] else f"off by {error:.3g} of its size (allowed {TOLERANCE[dtype]})"


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of one fixed random functional of the outputs."""
    generator = torch.Generator().manual_seed(99)
    weighted = [
        (torch.randn(output.shape, generator=generator, dtype=torch.float64) * output.double()).sum()
        for output in outputs
    ]
    return list(torch.autograd.grad(sum(weighted[1:], weighted[0]), leaves, materialize_grads=True))


def learning(trial: Trial, inputs: Any, dtype: torch.dtype | None = None) -> tuple[Any, list[Tensor]]:
    """The call on leaves, in another dtype if one is given, and the leaves."""
    leaves: list[Tensor] = []

    def leaf(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_())
        return leaves[-1]

    return trial.replaced(inputs, leaf), leaves


@cache
def _truth(op: Op[Any], case: Case, time: int, packed: bool, dtype: torch.dtype) -> list[Tensor]:
    """The reference's results and gradients in float64, for arguments that are exact in `dtype`."""
    trial = Trial(op, case)
    inputs, leaves = learning(trial, trial.draw(time, dtype, packed=packed), torch.float64)
    results = trial.real(inputs, "reference")
    return [result.detach() for result in (*results, *gradients(results, leaves))]


def _agrees(trial: Trial) -> Iterator[str | None]:
    for dtype in DTYPES:
        pairs: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
        for time, packed in product(LENGTHS, (False, True)):
            drawn = torch.float32 if dtype == torch.float64 else dtype  # one truth for both
            cast = dtype if drawn != dtype else None
            inputs, leaves = learning(trial, trial.draw(time, drawn, packed=packed), cast)
            wanted = _truth(trial.op, trial.case, time, packed, drawn)
            for backend in trial.serving(inputs):
                results = trial.real(inputs, backend)
                kinds = [result.dtype for result in results]
                if kinds != [like.dtype for like in trial.case.results(inputs)]:
                    yield f"{backend}: results in {kinds} for {dtype}"
                found = [result.detach().double() for result in (*results, *gradients(results, leaves))]
                problem = None if dtype == torch.bfloat16 else differs(found, wanted, dtype)
                yield problem and f"{backend}, {time} tokens, packed {packed}, {dtype}: {problem}"
                pairs.setdefault(backend, []).append((found, wanted))
        # Sums over tokens can cancel, and what rounding left is then most of them: all lengths together count.
        for backend, found_and_wanted in pairs.items() if dtype == torch.bfloat16 else ():
            found, wanted = (_joined(side) for side in zip(*found_and_wanted, strict=True))
            problem = differs(found, wanted, dtype)
            yield problem and f"{backend}, {dtype}: {problem}"


def _joined(results: Iterable[list[Tensor]]) -> list[Tensor]:
    """The results of several calls, each flat and one after another."""
    return [torch.cat([tensor.flatten() for tensor in same]) for same in zip(*results, strict=True)]


def _gradcheck(trial: Trial) -> Iterator[str | None]:
    segments = torch.tensor([[0, 0, 1, 1, -1], [1, 1, 3, 3, 3]])
    inputs = trial.at(trial.draw(5), slice(2, 4))._replace(segments=segments)
    inputs, leaves = learning(trial, inputs)
    names = [name for name, tensor in trial.named(inputs).items() if tensor.is_floating_point()]
    for backend in trial.serving(inputs):

        def call(*tensors: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
            own = dict(zip(names, tensors, strict=True))
            return tuple(trial.real(trial.replaced(inputs, lambda name, tensor: own.get(name, tensor)), backend))

        holds = torch.autograd.gradcheck(call, leaves, fast_mode=True, raise_exception=False)
        yield None if holds else f"{backend}: gradients are not those of finite differences"


def _alone(trial: Trial) -> Iterator[str | None]:
    inputs = trial.draw(150, packed=True)
    for backend in trial.serving(inputs):
        results = trial.run(inputs, backend)
        for row in range(ROWS):
            last = None if len(results) == 1 else inputs.initial_state[row]
            for number, span in documents(inputs.segments[row]):
                one = trial.at(inputs, slice(row, row + 1), span)._replace(segments=None)
                one = one if number == 0 else one._replace(**{trial.case.carried: None})
                y, *state = trial.run(one, "reference" if backend not in trial.serving(one) else backend)
                problem = differs([results[0][row, span]], [y[0]])
                yield problem and f"{backend}, row {row}, document {number}: {problem}"
                last = state[0][0] if state else None
            if last is not None:
                problem = differs([results[1][row]], [last])
                yield problem and f"{backend}, final state of row {row}: {problem}"


def documents(row: Int[Tensor, "time"]) -> Iterator[tuple[int, slice]]:
    """Each segment number of a row, and where it is."""
    for number in row[row >= 0].unique().tolist():
        (times,) = torch.nonzero(row == number, as_tuple=True)
        yield number, slice(int(times[0]), int(times[-1]) + 1)


def _edges(trial: Trial) -> Iterator[str | None]:
    each = torch.cat([segments_from(starts, 330)[:1] for starts in STARTS])
    for segments in (each, segments_from(STARTS[2], 330)):
        inputs, leaves = learning(trial, trial.draw(330, packed=segments))
        results = trial.real(inputs, "reference")
        wanted = [*results, *gradients(results, leaves)]
        for backend in trial.serving(inputs):
            results = trial.real(inputs, backend)
            problem = differs([*results, *gradients(results, leaves)], wanted)
            yield problem and f"{backend}, documents that start at {STARTS}: {problem}"


def _forgets(trial: Trial) -> Iterator[str | None]:
    segments, start = segments_from((41,), 90), 41
    inputs = trial.draw(90, packed=segments)
    large = {*trial.case.values, "initial_state", "past.values"}

    def enlarge(name: str, tensor: Tensor) -> Tensor:
        if name not in large:
            return tensor
        early = torch.arange(tensor.shape[1]) < start if "time" in trial.axes(name) else torch.tensor(True)
        return torch.where(early.reshape(1, -1, *[1] * (tensor.ndim - 2)), tensor * 1e30, tensor)

    disturbed = trial.replaced(inputs, enlarge)
    for backend in trial.serving(inputs):
        (y, *state), (other, *other_state) = trial.run(inputs, backend), trial.run(disturbed, backend)
        problem = differs([y[:, start:], *state], [other[:, start:], *other_state])
        yield problem and f"{backend}: what a document leaves in the next one: {problem}"


def _split(trial: Trial) -> Iterator[str | None]:
    inputs = trial.draw(130, packed=True)
    if trial.case.carried != "initial_state":
        inputs = inputs._replace(**{trial.case.carried: None})
    for backend in trial.serving(inputs):
        whole = trial.real(inputs, "reference")
        for cuts in CUTS:
            parts, results, carried = [], [], getattr(inputs, trial.case.carried)
            for start, stop in zip((0, *cuts), (*cuts, 130), strict=True):
                part = trial.at(inputs, slice(None), slice(start, stop))
                own = continued(inputs.segments, start)[:, : stop - start]
                part = part._replace(segments=own, **{trial.case.carried: carried})
                results = trial.run(part, backend if backend in trial.serving(part) else "reference")
                parts.append(results[0])
                carried = trial.case.carry(trial.at(inputs, slice(None), slice(0, stop)), results)
                if carried is None:
                    return
            found = _real([torch.cat(parts, 1), *results[1:]], inputs.segments)
            problem = differs(found, whole)
            yield problem and f"{backend}, cut at {cuts}: {problem}"


def continued(segments: Segments, cut: int) -> Segments:
    """The segments from `cut` on, numbered as a call that continues the last document before it."""
    if cut == 0:
        return segments
    before = segments[:, :cut].amax(1, keepdim=True).clamp(min=0)
    return torch.where(segments[:, cut:] < 0, segments[:, cut:], segments[:, cut:] - before)


def _padding(trial: Trial) -> Iterator[str | None]:
    drawn = trial.draw(140, packed=True)
    inputs, leaves = learning(trial, drawn)
    pads: Bool[Tensor, "batch time"] = inputs.segments < 0
    names = [name for name, tensor in trial.named(inputs).items() if tensor.is_floating_point()]
    for backend in trial.serving(inputs):
        results = trial.run(inputs, backend)
        if not all(torch.isfinite(result).all() for result in results):
            yield f"{backend}: outputs at padding are not finite"
        grads = dict(zip(names, gradients(results, leaves), strict=True))
        touched = [name for name in trial.tokens() if name in grads and grads[name][pads].any()]
        yield f"{backend}: gradients at padding of {touched}" if touched else None
        if len(results) > 1 and not torch.equal(results[1][4], inputs.initial_state[4]):
            yield f"{backend}: a row of padding changes its state"
        for disturbed in trial.tokens():
            noisy = trial.replaced(drawn, lambda name, tensor, it=disturbed: _noise(tensor, pads, name == it))
            problem = differs(trial.real(noisy, backend), _real(results, inputs.segments))
            yield problem and f"{backend}, other {disturbed} at padding: {problem}"


def _noise(tensor: Tensor, at: Bool[Tensor, "batch time"], wanted: bool) -> Tensor:
    return tensor.masked_fill(at.reshape(*at.shape, *[1] * (tensor.ndim - 2)), 9.0) if wanted else tensor


def _steps(trial: Trial) -> Iterator[str | None]:
    for time, dtype in ((150, torch.float64), (1, torch.bfloat16)) if trial.case.decodes else ():
        inputs = trial.draw(time, dtype)
        y, end = trial.run(inputs, "reference")
        state = inputs.initial_state.clone()
        found = torch.stack([trial.case.step(state, *_token(trial, inputs, t)) for t in range(time)], 1)
        yield None if found.dtype == y.dtype else f"a step gives {found.dtype} for {dtype}"
        problem = differs([found], [y], dtype) or differs([state], [end], dtype)
        yield problem and f"one token at a time, {dtype}: {problem}"


def _token(trial: Trial, inputs: Any, t: int) -> list[Tensor]:
    """The arguments of a step."""
    named = trial.named(inputs).items()
    own = [(name, tensor) for name, tensor in named if name not in (trial.case.carried, "segments")]
    return [tensor[:, t] if "time" in trial.axes(name) else tensor for name, tensor in own]


def _rows(trial: Trial) -> Iterator[str | None]:
    whole = trial.draw(9)
    for inputs in (whole, whole._replace(**{trial.case.carried: None})):
        for rows in (0, 1, 3):
            some = trial.at(inputs, slice(0, rows))
            for backend in trial.serving(some):
                problem = differs(trial.run(some, backend), [r[:rows] for r in trial.run(inputs, "reference")])
                yield problem and f"{backend}, {rows} rows: {problem}"


def _compiles(trial: Trial) -> Iterator[str | None]:
    if trial.case.decodes:
        inputs = trial.draw(1)
        state, again, token = inputs.initial_state.clone(), inputs.initial_state.clone(), _token(trial, inputs, 0)
        y, found = trial.case.step(state, *token), _one_graph(trial.case.step)(again, *token)
        problem = differs([found, again], [y, state])
        yield problem and f"a compiled step: {problem}"
    if trial.case.compiled:  # what a backend makes inside a compiled model is its own, and is tested with it
        return
    for packed in (False, True):
        drawn = trial.draw(150, torch.float32, packed=packed)
        (plain, leaves), (again, others) = learning(trial, drawn), learning(trial, drawn)
        graph = _one_graph(lambda inputs: trial.run(inputs, "auto"))
        wanted, found = trial.run(plain, "auto"), graph(again)
        wanted, found = _real(wanted, plain.segments), _real(found, plain.segments)
        problem = differs(found, wanted, torch.float32)
        problem = problem or differs(gradients(found, others), gradients(wanted, leaves), torch.float32)
        yield problem and f"compiled, packed {packed}: {problem}"


def _one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def _flops(trial: Trial) -> Iterator[str | None]:
    inputs = trial.case.inputs(40, torch.float32)._replace(**{trial.case.carried: None})
    with FlopCounterMode(display=False) as counter:
        trial.run(inputs, "reference")
    found, told = counter.get_total_flops(), trial.case.flops(40)
    yield None if found == told else f"the reference makes {found} FLOPs, the case says {told}"


class OpLaw(NamedTuple):
    """A law; `problems` yields what is wrong, None where nothing is."""

    name: str
    text: str
    problems: Callable[[Trial], Iterator[str | None]]


OP_LAWS = (
    OpLaw(
        "agrees", "Every backend is the reference, in values and gradients, within what its dtype can hold.", _agrees
    ),
    OpLaw("gradcheck", "Gradients are those of finite differences.", _gradcheck),
    OpLaw("alone", "Packed documents are the documents alone.", _alone),
    OpLaw("edges", "Documents may start anywhere, at the edges of blocks too.", _edges),
    OpLaw("forgets", "Nothing of a document is left in the next.", _forgets),
    OpLaw("split", "A split sequence is the whole.", _split),
    OpLaw("padding", "Padding changes nothing, gets no gradient, and outputs there are finite.", _padding),
    OpLaw("steps", "One token at a time is the whole, and updates the state in place.", _steps),
    OpLaw("rows", "Any number of rows is served, none too.", _rows),
    OpLaw("compiles", "A compiled model gives the same, as one graph.", _compiles),
    OpLaw("flops", "The reference's matrix products are the FLOPs of the closed form.", _flops),
)


def check_op(op: Op[Any], *, laws: tuple[OpLaw, ...] = OP_LAWS, backends: tuple[str, ...] = ()) -> list[str]:
    """Run laws on the examples of an operator and return the names of those that hold.

    A law that no example can be tried on (`steps`, where decoding is an operator of its own) is not among them.

    Args:
        op: with `examples`, and a backend "reference".
        laws: which ones.
        backends: which ones are compared with the reference; none is all that serve here.

    Raises:
        FusionTreeError: there are no examples, or no backend of a name.
        OperatorBroken: the first law that does not hold, with the example.
    """
    if not op.examples:
        raise FusionTreeError(f"check_op: {op.name} has no examples")
    for name in backends:
        op.named(name)
    return [law.name for law in laws if sum([_holds(law, Trial(op, case, backends)) for case in op.examples])]


def _holds(law: OpLaw, trial: Trial) -> int:
    """How often a law was tried, and held."""
    tried = 0
    for problem in law.problems(trial):
        if problem:
            raise OperatorBroken(f"{law.name}: {law.text}\n  broken: {problem}\n  in {trial.case}")
        tried += 1
    return tried
