"""What a spec costs, node by node: parameters, FLOPs a token, cache bytes. Nothing is allocated to find out."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fusiontree.core.model.model import build
from fusiontree.core.model.spec import ModelSpec


@dataclass(frozen=True)
class Cost:
    """The cost of one part of a model, everything below it included.

    Attributes:
        path: its path in the expanded spec; "" is the whole model.
        kind: the kind of a node, else the part's name.
        parameters: the number of learned values.
        flops: forward FLOPs a token, the mean over a sequence: matrix products only, 2 per multiply-add.
        cache_bytes: bytes of one sequence's cache.
    """

    path: str
    kind: str
    parameters: int
    flops: float
    cache_bytes: int


def costs(spec: ModelSpec, *, length: int, dtype: torch.dtype = torch.float32) -> list[Cost]:
    """The whole model first, then its parts in the order of the tree, parents before children.

    Args:
        spec: the model.
        length: tokens of the sequence.
        dtype: what weights and cached keys are stored in.
    """
    modules, stream = dict(build(spec, device="meta").named_modules()), length + spec.prefix_length
    share = stream / length  # what a prefix costs is spread over the tokens
    own = {
        p: (share * n.flops(scope, stream), n.cache_bytes(scope, stream, dtype)) for p, n, scope in spec.layer_nodes()
    }
    encodings = [(f"encodings.{name}", encoding) for name, encoding in spec.encodings.items()]
    kinds = {path: str(getattr(part, "kind", "")) for path, part in [*spec.nodes(), *encodings]}
    own["head"] = (2.0 * spec.width * spec.vocab_size, 0)
    own |= {path: (share * encoding.flops(spec.width), 0) for path, encoding in encodings}
    return [_cost(path, kinds.get(path), modules[path], own) for path in _parts(spec)]


def _parts(spec: ModelSpec) -> Iterator[str]:
    yield from ("", "embedding")
    yield from ["prefix"] if spec.prefix else []
    yield from (f"encodings.{name}" for name in spec.encodings)
    nodes = [path for path, _ in spec.nodes()]
    yield from (path for path in nodes if path.startswith("shared."))
    for index in range(len(spec.expanded_layers())):
        layer = f"layers.{index}"
        yield layer
        yield from (path for path in nodes if path.startswith(f"{layer}."))
    yield from ("norm", "head")


def _cost(path: str, kind: str | None, module: nn.Module, own: dict[str, tuple[float, int]]) -> Cost:
    inside = [cost for place, cost in own.items() if not path or place == path or place.startswith(f"{path}.")]
    flops, cache = sum(cost[0] for cost in inside), sum(cost[1] for cost in inside)
    name = kind or (path.split(".")[0] if path else "model")
    return Cost(path, name, sum(p.numel() for p in module.parameters()), flops, cache)
