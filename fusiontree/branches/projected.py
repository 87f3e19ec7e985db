"""Branches whose last map leads from their inner features back to the stream, unless a fusion projects for them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from fusiontree.components import BranchSpec, LinearModule, Narrowing, Node, Scope, SpecError, axes, invalid


class ProjectedSpec(BranchSpec):
    """A branch with the fields `project` (false: return the inner features) and `out_bias`, and with `inner`, a field
    or a property: the width of its inner features, which run over the axes of the dimension `inner_axes`. Examples
    have 3/2 of the stream's width inside, so that they can meet in a fusion."""

    inner_axes: ClassVar[str]

    if TYPE_CHECKING:
        project: bool
        out_bias: bool

        @property
        def inner(self) -> int:
            """The width of the inner features."""
            ...

    @model_validator(mode="after")
    def _has_an_output_map(self) -> Self:
        if self.out_bias and not self.project:
            raise invalid({("out_bias",): "project is false: there is no output map"})
        return self

    def output_width(self, scope: Scope) -> int:
        """The stream's width, or the inner features'."""
        return scope.width if self.project else self.inner

    def output_axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of the output map."""
        axes: dict[str, tuple[str, ...]] = {"out.weight": ("width", self.inner_axes)} if self.project else {}
        return axes | ({"out.bias": ("width",)} if self.out_bias else {})

    def narrow(self, axis: str, keep: Sequence[int], scope: Scope) -> Narrowing[Self]:
        if not self.project and axis in axes.names([self.inner_axes]):
            raise SpecError(f"{axis}: the branch returns features along it (project: false); narrow what reads it")
        return super().narrow(axis, keep, scope)

    def narrow_output(self, channels: Sequence[int], scope: Scope) -> Narrowing[Self]:
        """Whole parts of the axes that the inner features run over."""
        if self.project:
            return super().narrow_output(channels, scope)
        kept = axes.kept_along(self.inner_axes, self.sizes(scope), channels)
        spec = self
        for axis, keep in kept.items():
            spec = spec.narrowed(axis, keep, scope).spec
        return Narrowing(spec, {"": kept})


class ProjectedModule(Node):
    """The module of a `ProjectedSpec`."""

    out: LinearModule | None

    def add_output_map(self, spec: ProjectedSpec, width: int) -> None:
        """Build the output map, if the branch has one."""
        self.out = LinearModule(spec.inner, width, bias=spec.out_bias) if spec.project else None

    def projected(self, y: Float[Tensor, "batch time inner"]) -> Float[Tensor, "batch time features"]:
        """What the branch returns."""
        return y if self.out is None else self.out(y)
