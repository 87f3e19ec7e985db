"""Every backend of the operators on their cases: speed, error, and the share of the machine's limit."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree import compiling, machine
from fusiontree.bench.limits import MachineLimits, Work, measure_limits
from fusiontree.bench.timing import measure
from fusiontree.core.model.memory import usable
from fusiontree.errors import FusionTreeError, suggest
from fusiontree.kernels import OPS, UnsupportedError
from fusiontree.kernels.common.cases import Case

FORWARD, TRAINING = "forward", "training"
TASKS = (FORWARD, TRAINING)
CASES: dict[str, Case] = {name: case for op in OPS.values() for name, case in op.cases.items()}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SMALL = 256
"""The tokens that errors are measured on, and the most that references are timed on which loop over them."""
LARGEST_ERROR = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""What rounding explains."""


class Form(NamedTuple):
    """A backend on a case, as it is or inside `torch.compile`."""

    case: str
    backend: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """Unique within the case."""
        return f"{self.backend}, compiled" if self.compiled else self.backend


@dataclass(frozen=True)
class Settings:
    """How forms are measured: `limits` are the device's for the dtype, `seconds` is how long each is timed."""

    tokens: int
    dtype: torch.dtype
    device: torch.device
    limits: MachineLimits
    tasks: tuple[str, ...] = TASKS
    seconds: float = 1.0


@dataclass(frozen=True)
class Speed:
    """Of one task.

    Attributes:
        tokens_per_second: the median.
        spread: half the distance between the quartiles, as a share of the median.
        share_of_limit: the least time the work can take by the machine's limits, over the median time.
        repeats: how many calls were timed.
        picked: whether this backend is what "auto" picks.
    """

    tokens_per_second: float
    spread: float
    share_of_limit: float
    repeats: int
    picked: bool


@dataclass
class Row:
    """What is known of a form: a speed or a refusal for each task.

    Attributes:
        tokens: how many it was timed on.
        speeds: by task.
        refusals: by task.
        failures: what went wrong that a backend should have refused, by task.
        error: of the results against the float64 reference, relative to its largest value; None if not served.
        wrong: whether rounding does not explain the error.
    """

    form: Form
    op: str
    tokens: int
    speeds: dict[str, Speed] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    error: float | None = None
    wrong: bool = False


def forms(ops: Iterable[str] = ()) -> list[Form]:
    """What there is to measure, of some operators or of all.

    Raises:
        FusionTreeError: an operator of that name does not exist.
    """
    wanted = set(ops) or {case.op for case in CASES.values()}
    for op in wanted:
        if op not in OPS:
            raise FusionTreeError(f"bench kernels: --op: unknown {op!r}{suggest(op, OPS)}")
    return [form for name, case in CASES.items() if case.op in wanted for form in _forms(name, case)]


def _forms(name: str, case: Case) -> list[Form]:
    """All backends, best first; behind those that have one, their compiled form."""
    ranked = sorted(OPS[case.op].backends.values(), key=lambda backend: -backend.priority)
    found = []
    for backend in ranked:
        found.append(Form(name, backend.name))
        if backend.name in case.compiled:
            found.append(Form(name, backend.name, compiled=True))
    return found


def tasks(train: bool | None) -> tuple[str, ...]:
    """Only training, only forward, or both."""
    return TASKS if train is None else (TRAINING if train else FORWARD,)


def settings(tokens: int, dtype: str, device: str, *, threads: int | None = None, **others: Any) -> Settings:
    """Settings from names; measures the limits, after setting the number of threads.

    Raises:
        FusionTreeError: the dtype is none of `DTYPES`, or nothing is computed on the device.
    """
    if dtype not in DTYPES:
        raise FusionTreeError(f"bench kernels: --dtype: unknown {dtype!r}{suggest(dtype, DTYPES)}")
    found = usable(device)
    if found.type == "meta":
        raise FusionTreeError("bench kernels: --device: nothing is computed on 'meta'")
    if threads is not None:
        torch.set_num_threads(threads)
    return Settings(tokens, DTYPES[dtype], found, measure_limits(DTYPES[dtype], found), **others)


def measure_form(form: Form, settings: Settings) -> Row:
    """Time each task that the form serves, and say why not the others; then look at its values."""
    case = CASES[form.case]
    short = case.loops and form.backend == "reference"
    row = Row(form, case.op, min(settings.tokens, SMALL) if short else settings.tokens)
    for task in settings.tasks:
        try:
            row.speeds[task] = _speed(row, task, settings)
        except UnsupportedError as error:
            row.refusals[task] = str(error)
        except Exception as error:  # of a package that is broken here; the others are still to be measured
            row.failures[task] = _told(error)
    if row.speeds:
        row.error = error_of(form, settings.dtype, settings.device)
        row.wrong = not row.error <= LARGEST_ERROR[settings.dtype]
    return row


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _speed(row: Row, task: str, settings: Settings) -> Speed:
    case = CASES[row.form.case]
    if task != FORWARD and not case.learns:
        raise UnsupportedError("it is for decoding")
    inputs = case.inputs(row.tokens, settings.dtype, settings.device)
    inputs = inputs if task == FORWARD else _learning(inputs)
    with torch.set_grad_enabled(task != FORWARD):
        request = inputs.request
        _check(row.form, request, settings.device)
        call = _call(row.form, inputs, case.results(inputs)[0])
        timing = measure(call, settings.device, seconds=settings.seconds)
    return Speed(
        tokens_per_second=case.made(row.tokens) / timing.seconds,
        spread=timing.spread,
        share_of_limit=settings.limits.seconds(work(case, row.tokens, inputs, task)) / timing.seconds,
        repeats=timing.repeats,
        picked=not row.form.compiled and OPS[case.op].pick(request).name == row.form.backend,
    )


def work(case: Case, tokens: int, inputs: Any, task: str) -> Work:
    """What no backend can do without.

    Forward reads the arguments and writes the results, each once. Training has three times the FLOPs; its backward
    reads the arguments again, and the results' gradients, and writes those of the arguments.
    """
    read, written = _bytes(inputs), _bytes(case.results(inputs))
    if task == FORWARD:
        return Work(case.flops(tokens), read + written)
    return Work(3 * case.flops(tokens), 3 * read + 2 * written)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _check(form: Form, request: Any, device: torch.device) -> None:
    refusal = OPS[CASES[form.case].op].backends[form.backend].supports(request)
    if refusal is None and form.compiled:
        found = machine.compile_refusal(device.type)
        refusal = found and f"nothing can be compiled: {found}"
    if refusal is not None:
        raise UnsupportedError(refusal)


def _learning(inputs: Any) -> Any:
    return _mapped(inputs, lambda tensor: tensor.requires_grad_())


def _mapped(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same call with other floating-point tensors."""
    learns = [isinstance(value, Tensor) and value.is_floating_point() for value in inputs]
    return type(inputs)(*(change(value) if one else value for value, one in zip(inputs, learns, strict=True)))


def _run(form: Form) -> Callable[[Any], Any]:
    op = OPS[CASES[form.case].op]
    if not form.compiled:
        return lambda inputs: op(inputs, form.backend)
    compiling.allow_forms()
    return torch.compile(lambda inputs: op(inputs, form.backend), dynamic=False)


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _call(form: Form, inputs: Any, like: Tensor) -> Callable[[], object]:
    """Forward, and where arguments learn backward from the first result; `like` has its shape."""
    run, grad = _run(form), torch.ones_like(like)
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    if not leaves:
        return lambda: run(inputs)
    return lambda: torch.autograd.grad(_listed(run(inputs))[0], leaves, grad)


@torch.no_grad()
def error_of(form: Form, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of any result on a small case of the same features, relative to its largest value.

    The reference has the same inputs, in float64, on the CPU.
    """
    case = CASES[form.case]
    found = _listed(_run(form)(case.inputs(SMALL, dtype, device, seed=1)))
    true = OPS[case.op](_mapped(case.inputs(SMALL, dtype, seed=1), Tensor.double), "reference")
    return max(_relative(one.cpu().double(), other) for one, other in zip(found, _listed(true), strict=True))


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found - true).abs().max() / true.abs().max())
