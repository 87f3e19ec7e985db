"""A node that runs with weights of another: `shared` at the top level of a spec names them (Zamba, arXiv 2405.16712).

Each use has a cache of its own, and may add low-rank maps of its own to maps that are shared (Zamba2, arXiv
2411.15242).

A use runs a twin of the shared node: other module objects with the same dictionaries of parameters, buffers and hooks.
The shared modules themselves could run in every place if each call told them where they are: the path under which they
find their cache, publish keys and report gates, and the adapters of the use. Every node would then read its path from
the call and not from itself, and adapters would be hooks that are put in and taken out in every forward pass, which
`torch.compile` would have to trace as state that changes. Twins keep that out of all other nodes; what they cost is
`is_attached`, which looks before each forward pass whether a tool has replaced a part of the shared node.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from fusiontree.components import (
    BranchSpec,
    Context,
    Count,
    FusionTreeError,
    Hook,
    LinearModule,
    Module,
    Name,
    NamedMap,
    Node,
    NodeSpec,
    Problems,
    Scope,
    SharedNodeUser,
    Spec,
    branches,
    constant,
    suggest,
)

Stream = Float[Tensor, "batch time width"]
Shape = tuple[int, int]
"""Of a map: outputs, inputs."""


class Adapter(Spec):
    """W x + up down x, of low `rank`, in the place of W x: for each of `maps`, paths inside the shared node, whose
    inputs are the same; they share `down`. `up` starts at 0 (LoRA, arXiv 2106.09685)."""

    maps: Annotated[tuple[str, ...], Field(min_length=1)]
    rank: Count


@branches.register
class Use(BranchSpec):
    """The shared node `of`, at this place.

    Attributes:
        of: its name in the spec's `shared`.
        adapters: low-rank maps that belong to this use alone.
    """

    hooks: ClassVar[frozenset[Hook]] = frozenset()
    kind: Literal["use"] = "use"
    of: Name
    adapters: NamedMap[Adapter] = NamedMap()

    @classmethod
    def examples(cls, width: int) -> Iterator[Self]:
        """A feed-forward network, two of whose maps are adapted together; and as it is."""
        yield cls(of="block", adapters=NamedMap(hidden=Adapter(maps=("gate", "up"), rank=2)))
        yield cls(of="block")

    @classmethod
    def example_needs(cls, width: int) -> Mapping[str, Any]:
        """The network, and another use of it."""
        return {
            "shared": {"block": {"kind": "swiglu", "hidden": 8}},
            "layers": [{"ffn": {"kind": "use", "of": "block"}}],
        }

    def problems(self, scope: Scope) -> Problems:
        """Reports an undefined shared node, and adapters of maps that do not exist."""
        yield from super().problems(scope)
        if self.of not in scope.shared:
            where = "" if scope.shared else "; none can be used inside a shared node, nor at another width"
            yield "of", f"no shared node is called {self.of!r}{suggest(self.of, scope.shared)}{where}"
            return
        if self.adapters and not any(True for _, node, inside in self._shared(scope) for _ in node.problems(inside)):
            yield from self._adapter_problems(self._maps(scope))

    def _adapter_problems(self, maps: Mapping[str, Shape]) -> Problems:
        adapted: list[str] = []
        for name, adapter in self.adapters.items():
            place = f"adapters.{name}.maps"
            for path in adapter.maps:
                if path not in maps:
                    yield place, f"{self.of} has no linear map {path!r}{suggest(path, maps)}"
                if path in adapted:
                    yield place, f"{path!r} is adapted twice"
                adapted.append(path)
            widths = dict.fromkeys(str(maps[path][1]) for path in adapter.maps if path in maps)
            if len(widths) > 1:
                yield place, f"expected maps of equal inputs, found the widths {', '.join(widths)}"

    def _shared(self, scope: Scope) -> Iterator[tuple[str, NodeSpec, Scope]]:
        """The nodes that run here, by their paths in the shared one."""
        yield from scope.shared[self.of].walk(scope.for_shared)

    def _maps(self, scope: Scope) -> dict[str, Shape]:
        """The shape of every linear map of the shared node, by its path."""
        if not self.adapters:
            return {}
        with torch.device("meta"):
            built = scope.shared[self.of].build(scope.for_shared)
        maps = ((path, part) for path, part in built.named_modules() if isinstance(part, LinearModule))
        return {path: (part.out_features, part.in_features) for path, part in maps}

    def output_width(self, scope: Scope) -> int:
        return scope.shared[self.of].output_width(scope.for_shared) if self.of in scope.shared else scope.width

    def build(self, scope: Scope) -> "UseModule":
        return UseModule(self, self._maps(scope))

    def flops(self, scope: Scope, length: int) -> float:
        """Those of the shared node, and of the adapters."""
        shared = sum(node.flops(inside, length) for _, node, inside in self._shared(scope))
        maps = self._maps(scope)
        return shared + 2.0 * sum(a.rank * sum(maps[path]) for a in self.adapters.values() for path in a.maps)

    def cache_bytes(self, scope: Scope, length: int, dtype: torch.dtype) -> int:
        return sum(node.cache_bytes(inside, length, dtype) for _, node, inside in self._shared(scope))

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Those of the adapters; their widths are those of the shared maps."""
        found: dict[str, tuple[str, ...]] = {}
        for name, adapter in self.adapters.items():
            found[f"adapters.{name}.down.weight"] = (f"{name}_rank", f"{name}_in_width")
            ups = ((f"adapters.{name}.up.{i}.weight", f"{name}_{i}_width") for i in range(len(adapter.maps)))
            found |= {path: (width, f"{name}_rank") for path, width in ups}
        return found

    def sizes(self, scope: Scope) -> Mapping[str, int]:
        maps, found = self._maps(scope), {"width": scope.width}
        for name, adapter in self.adapters.items():
            found |= {f"{name}_rank": adapter.rank, f"{name}_in_width": maps[adapter.maps[0]][1]}
            found |= {f"{name}_{index}_width": maps[path][0] for index, path in enumerate(adapter.maps)}
        return found

    def narrowed_fields(self, axis: str, keep: tuple[int, ...], scope: Scope) -> Mapping[str, Any]:
        """The ranks of adapters."""
        name = axis.removesuffix("_rank")
        if name == axis:
            return super().narrowed_fields(axis, keep, scope)
        narrower = self.adapters[name].model_copy(update={"rank": len(keep)})
        return {"adapters": {**self.adapters, name: narrower}}

    @property
    def uses(self) -> str:
        return self.of


class AdapterModule(Module):
    """The module of an `Adapter`."""

    def __init__(self, spec: Adapter, shapes: list[Shape]) -> None:
        super().__init__()
        self.down = LinearModule(shapes[0][1], spec.rank)
        self.up = nn.ModuleList(LinearModule(spec.rank, shape[0], init=constant(0.0)) for shape in shapes)


class Adapted(nn.Module):
    """A shared map with what one use adds."""

    def __init__(self, shared: nn.Module, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.shared, self.down, self.up = shared, down, up

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """The sum of both."""
        return self.shared(x) + self.up(self.down(x))


class UseModule(SharedNodeUser):
    """The module of `Use`. It runs a twin of the shared node, which has the same parameters but its own path.

    The twin is no submodule, so that parameters are found once, where they are shared.
    """

    twin: Node

    def __init__(self, spec: Use, maps: Mapping[str, Shape]) -> None:
        super().__init__()
        self.spec = spec
        built = {name: AdapterModule(a, [maps[path] for path in a.maps]) for name, a in spec.adapters.items()}
        self.adapters = nn.ModuleDict(built)
        self.parts: list[tuple[nn.Module, dict[str, Any], Any]] = []

    def attach(self, shared: nn.ModuleDict) -> None:
        """Make the twin.

        Raises:
            FusionTreeError: a tool stands around the shared node's own `forward`, which knows of one place alone.
        """
        for module in shared[self.spec.of].modules():
            if isinstance(module, Node) and "forward" in vars(module):
                found = f"shared.{self.spec.of}: a tool (offloading) stands around the `forward` of {module.path}"
                raise FusionTreeError(f"{found}, which runs in more than one place")
        adapted = {}
        for name, adapter in self.spec.adapters.items():
            maps = cast(AdapterModule, self.adapters[name])
            adapted |= {path: (maps.down, maps.up[index]) for index, path in enumerate(adapter.maps)}
        twin = _twin(shared[self.spec.of], "", adapted)
        for path, module in twin.named_modules():
            if isinstance(module, Node):
                below = f".{path}" if path else ""
                module.path, module.local_path = self.path + below, self.local_path + below
        object.__setattr__(self, "twin", twin)  # nn.Module's own would register it
        parts = [*shared[self.spec.of].modules(), *self.adapters.modules()]
        self.parts = [(part, dict(part._modules), vars(part).get("forward")) for part in parts]

    def is_attached(self) -> bool:
        """Whether no part of the shared node, and no adapter, has been replaced by another module or `forward`."""
        current = (part._modules == then and vars(part).get("forward") is around for part, then, around in self.parts)
        return bool(self.parts) and all(current)

    def forward(self, x: Stream, context: Context) -> Float[Tensor, "batch time features"]:
        return self.twin(x, context)

    def train(self, mode: bool = True) -> Self:
        """In its twin, too."""
        self.twin.train(mode)
        return super().train(mode)

    def stateful_nodes(self) -> Iterator[Node]:
        """The shared nodes at this place."""
        yield from (module for module in self.twin.modules() if isinstance(module, Node))


def _twin(module: nn.Module, path: str, adapted: Mapping[str, tuple[nn.Module, nn.Module]]) -> nn.Module:
    """A clone of a module that shares the dictionaries of parameters, buffers and hooks; children are cloned likewise.

    Code that replaces parameters (moves, shards, loads them) writes to these dictionaries, so that both modules always
    hold the same.
    """
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)  # copy.copy would ask classes that refuse
    children = ((name, child, f"{path}.{name}" if path else name) for name, child in module.named_children())
    twin._modules = {name: _twin(child, below, adapted) for name, child, below in children}
    return Adapted(twin, *adapted[path]) if path in adapted else twin
