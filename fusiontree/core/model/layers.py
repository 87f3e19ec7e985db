"""Layers, and repeats of them: a deep stack written shortly, without a second meaning for a path."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import core_schema as cs

from fusiontree.core.contracts.fusion import AnyNode
from fusiontree.core.contracts.modules import Norm
from fusiontree.core.spec import paths
from fusiontree.core.spec.base import Count, OrderedMap, Real, Spec, invalid
from fusiontree.errors import SpecError

MAX_LAYERS = 10_000
"""So that a short file cannot ask for more memory than there is."""


class Residual(Spec):
    """How a sub-layer joins the stream: keep * source + add * f(...), the source being the stream itself or the
    sub-layer's normed input (MiniMax, arXiv 2501.08313)."""

    source: Literal["stream", "normed"] = Field(default="stream", alias="from")
    keep: Real = 1.0
    add: Real = 1.0


class LayerSpec(Spec):
    """Up to two residual sub-layers, `mixer` and `ffn`. `{}` is the identity.

    `placement` is the position of norms: `pre` x + f(norm(x)), `post` x + norm(f(x)), `sandwich` both, `none` x + f(x).
    """

    mixer: AnyNode | None = None
    ffn: AnyNode | None = None
    norm: Norm = Norm()
    placement: Literal["pre", "post", "sandwich", "none"] = "pre"
    residual: Residual = Residual()

    @model_validator(mode="after")
    def _source_exists(self) -> "LayerSpec":
        if self.placement in ("post", "none") and self.residual.source == "normed":
            raise invalid({("residual", "from"): f"'normed' needs placement pre or sandwich, found {self.placement}"})
        return self


class Repeat(Spec):
    """A period of layers, `repeat` times over. `vary` gives a path inside the period a value for each time:
    `{0.mixer.window: [128, 256, 512]}`."""

    repeat: Count
    layers: Annotated[tuple[LayerSpec, ...], Field(min_length=1)]
    vary: OrderedMap[tuple[Any, ...]] = OrderedMap()

    @model_validator(mode="after")
    def _varies_what_exists(self) -> "Repeat":
        if self.size > MAX_LAYERS:
            raise invalid({("repeat",): f"{self.size} layers, at most {MAX_LAYERS} are allowed"})
        period = [layer.data() for layer in self.layers]
        for path, values in self.vary.items():
            if len(values) != self.repeat:
                text = f"needs {self.repeat} values, one for each time, found {len(values)}"
                raise invalid({("vary", path): text})
            try:
                paths.find(period, path)
            except SpecError as error:
                raise invalid({("vary",): str(error)}) from None
        self.expand()
        return self

    @property
    def size(self) -> int:
        """How many layers there are."""
        return self.repeat * len(self.layers)

    def expand(self) -> tuple[LayerSpec, ...]:
        """The layers, one by one."""
        if not self.vary:
            return self.layers * self.repeat
        return tuple(layer for time in range(self.repeat) for layer in self._period(time))

    def refilled(self, layers: Sequence[LayerSpec]) -> "Repeat | None":
        """A repeat of as many times that gives these layers and varies no more than this one does; None if none can."""
        if tuple(layers) == self.expand():
            return self
        length = len(self.layers)
        times = [[layer.data() for layer in layers[n : n + length]] for n in range(0, len(layers), length)]
        vary = {path: values for path in self.vary if (values := _taken(times, path)) is not None}
        if any(time != times[0] for time in times):
            return None
        return Repeat.model_validate({"repeat": self.repeat, "layers": times[0], "vary": vary})

    def _period(self, time: int) -> list[LayerSpec]:
        period = [layer.data() for layer in self.layers]
        for pattern, values in self.vary.items():
            for path in paths.find(period, pattern):
                paths.put(period, path, values[time])
        return [LayerSpec.model_validate(layer) for layer in period]


def _taken(times: list[list[Any]], pattern: str) -> list[Any] | None:
    """The values of a pattern in each repetition, if they differ; afterwards all repetitions hold the first value."""
    try:
        places = [paths.find(time, pattern) for time in times]
    except SpecError:
        return None
    values = [paths.get(time, found[0]) for time, found in zip(times, places, strict=True)]
    alike = all(paths.get(t, path) == v for t, found, v in zip(times, places, values, strict=True) for path in found)
    if not alike or all(value == values[0] for value in values):
        return None
    for time, found in zip(times, places, strict=True):
        for path in found:
            paths.put(time, path, values[0])
    return values


class _Entry:
    """Marks the items of a stack: a mapping with `repeat` is a Repeat, any other a layer."""

    def parse(self, value: Any) -> LayerSpec | Repeat:
        """The item that plain data describes."""
        if isinstance(value, LayerSpec | Repeat):
            return value
        repeated = isinstance(value, Mapping) and "repeat" in value
        return (Repeat if repeated else LayerSpec).model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> cs.CoreSchema:
        write = cs.wrap_serializer_function_ser_schema(lambda value, write: write(value), schema=cs.any_schema())
        choices = handler.generate_schema(LayerSpec | Repeat)
        return cs.no_info_plain_validator_function(self.parse, serialization=write, json_schema_input_schema=choices)


Entry = Annotated[LayerSpec | Repeat, _Entry()]
"""A field that holds a layer or a repeat of layers."""


def expand(entries: Sequence[LayerSpec | Repeat]) -> tuple[LayerSpec, ...]:
    """One entry a layer."""
    parts = [entry.expand() if isinstance(entry, Repeat) else (entry,) for entry in entries]
    return tuple(layer for part in parts for layer in part)


def fold(layers: Sequence[LayerSpec]) -> tuple[LayerSpec | Repeat, ...]:
    """The shortest way, found greedily, to write layers down as repeats of equal periods."""
    folded: list[LayerSpec | Repeat] = []
    start = 0
    while start < len(layers):
        period, times = _best_period(layers[start:])
        part = tuple(layers[start : start + period])
        folded += [Repeat(repeat=times, layers=part)] if times > 1 else part
        start += period * times
    return tuple(folded)


def refold(layers: Sequence[LayerSpec], entries: Sequence[LayerSpec | Repeat]) -> tuple[LayerSpec | Repeat, ...]:
    """The layers, written with the repeats of `entries`; layers that fit none of them are folded."""
    folded: list[LayerSpec | Repeat] = []
    loose: list[LayerSpec] = []
    start = 0
    for entry in entries:
        size = entry.size if isinstance(entry, Repeat) else 1
        part, start = layers[start : start + size], start + size
        kept = entry.refilled(part) if isinstance(entry, Repeat) else None
        if kept is None:
            loose += part
        else:
            folded, loose = [*folded, *fold(loose), kept], []
    return (*folded, *fold(loose))


def _best_period(layers: Sequence[LayerSpec]) -> tuple[int, int]:
    """The period that saves most entries from the front, and how often it comes."""
    candidates = [(period, _times(layers, period)) for period in range(1, len(layers) // 2 + 1)]
    return max(candidates, key=lambda c: c[0] * (c[1] - 1), default=(1, 1))


def _times(layers: Sequence[LayerSpec], period: int) -> int:
    times = 1
    while layers[times * period : (times + 1) * period] == layers[:period]:
        times += 1
    return times
