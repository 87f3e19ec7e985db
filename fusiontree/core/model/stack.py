"""From tokens to features: the embedding, the layers (compiled or not, checkpointed or not), the last norm."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusiontree.compiling import allow_forms, any_size, eagerly
from fusiontree.core.contracts.cache import Cache
from fusiontree.core.contracts.context import Context, State
from fusiontree.core.contracts.encoding import Encoding
from fusiontree.core.contracts.modules import Module, NormModule, normal, scaled
from fusiontree.core.contracts.node import Node, SharedNodeUser
from fusiontree.core.model import boundaries, memory
from fusiontree.core.model.arguments import Ids, check_count, check_positions, check_shapes, checked_tokens
from fusiontree.core.model.kv_sharing import SharingPass, SharingPlan
from fusiontree.core.model.layer import Layer
from fusiontree.core.model.prefix import Places, Prefix, insert
from fusiontree.core.model.spec import ModelSpec

Features = Float[Tensor, "batch time width"]


class Embedding(nn.Embedding, Module):
    """A vector for each token of the vocabulary. It derives from `nn.Embedding`, so that tools find it."""

    def __init__(self, vocab_size: int, width: int) -> None:
        Module.__init__(self)  # torch's would draw values
        self.num_embeddings, self.embedding_dim = vocab_size, width
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = self.declare("weight", (vocab_size, width), normal(0.02))

    def forward(self, input: Ids) -> Features:
        """Look up the vectors of tokens."""
        return F.embedding(input, self.weight)


class Stack(nn.Module):
    """Everything of a model below its head: tokens to features. Module paths are the paths of the expanded spec, so a
    language model is a stack, and has none inside."""

    compiled = False
    checkpointing = False
    """Whether training keeps the inputs of layers alone and runs each again for its gradient (arXiv 1604.06174)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, scope = spec, spec.scope
        self.embedding = Embedding(spec.vocab_size, spec.width)
        self.encodings = nn.ModuleDict(
            {name: e.build(spec.width, spec.rotated_channels(name)) for name, e in spec.encodings.items()}
        )
        self.shared = nn.ModuleDict({name: node.build(scope.for_shared) for name, node in spec.shared.items()})
        self.layers = nn.ModuleList(Layer(layer, scope) for layer in spec.expanded_layers())
        self.norm = NormModule(spec.norm, spec.width)
        self.prefix = Prefix(spec.prefix, spec.width) if spec.prefix else None
        self.reads_embedding = any(node.reads_embedding for _, node in spec.nodes())
        kv_sources = {path: node.kv_source for path, node in spec.nodes() if node.kv_source is not None}
        self.sharing = SharingPlan(kv_sources)
        for path, node in self.nodes():
            node.path, node.local_path = path, ".".join(path.split(".")[2:])
            node.is_kv_source = path in kv_sources.values()
        self.users = [node for _, node in self.nodes() if isinstance(node, SharedNodeUser)]
        self.attach()

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and tokens are looked up."""
        return self.embedding.weight.device

    def attach(self) -> None:
        """Let uses of shared nodes find them, again where a tool (LoRA, quantisation) has replaced parts of a node."""
        for node in self.users:
            if not node.is_attached():
                node.attach(self.shared)

    def compile(self, **options: Any) -> None:
        """Compile each layer as one graph; equal layers share a graph.

        The first call of each shape takes about a minute on a CPU and needs a C++ compiler; torch caches the result
        on disk. With a cache, only decode steps are compiled, and only if the cache has a `max_length`. Under
        `observe`, `force` and `drop` the layers run uncompiled. `options` are passed to `torch.compile`.
        """
        allow_forms()
        self.compiled = True
        for layer in self.layers:
            layer.compile(**{"dynamic": False, "fullgraph": True} | options)

    def nodes(self) -> Iterator[tuple[str, Node]]:
        """Every branch and fusion with its path."""
        for path, module in self.named_modules():
            if isinstance(module, Node):
                yield path, module

    def stateful_nodes(self) -> Iterator[Node]:
        """Every node that a forward pass meets; shared ones once for each use, with the path of the use."""
        for path, node in self.nodes():
            if path.startswith("layers."):
                yield from node.stateful_nodes()

    def new_states(self, batch_size: int, capacity: int | None, like: Tensor) -> dict[str, State]:
        """The empty states of every node with a cache, by path; a compiled stack takes any capacity without
        recompiling."""
        states = {node.path: node.new_state(batch_size, capacity, like) for node in self.stateful_nodes()}
        if self.compiled and capacity is not None:
            self._allow_other_lengths(states, batch_size, capacity)
        return {path: state for path, state in states.items() if state}

    def _allow_other_lengths(self, states: Mapping[str, State], batch_size: int, capacity: int) -> None:
        like = torch.empty(0, device="meta")
        for node in self.stateful_nodes():
            longer = node.new_state(batch_size, capacity + 1, like)
            for name, tensor in states[node.path].items():
                any_size(tensor, longer[name])

    def run_layers(
        self, x: Features, context: Context, cache: Cache | None, read: list[Features] | None = None
    ) -> Features:
        """Run the layers, each with its own part of the cache, normalise; what each layer reads is added to `read`."""
        context = replace(context, embedding=x) if self.reads_embedding else context
        sharing = SharingPass(self.sharing)
        for index, layer in enumerate(self.layers):
            own = sharing.enter(index, context) if self.sharing else context
            if read is not None:
                read.append(x)
            if cache is not None:
                x = layer(x, replace(own, states=cache.layers.get(f"layers.{index}", {})))
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, own, use_reentrant=False)
            else:
                x = layer(x, own)
        return self.norm(x)

    def features(
        self,
        tokens: Ids,
        *,
        positions: Ids | None = None,
        documents: Ids | None = None,
        cache: Cache | None = None,
        states: list[Features] | None = None,
    ) -> Features:
        """The features that the head reads.

        Args:
            tokens: as `forward` takes them, like positions, documents and cache.
            states: a list that receives the input of each layer, and last the input of the head.
        """
        self.attach()
        tokens = checked_tokens(self.spec, tokens, documents)
        check_shapes(self.spec, tokens, positions, documents, cache)
        if cache is not None:
            cache.leave_inference()
        one_form = (self.compiled and cache is None) or torch.compiler.is_exporting()
        layout = boundaries.arrange(tokens, documents, positions, cache, one_form=one_form)
        x, stream, places = self._embed(tokens, layout, cache)
        context = replace(self.context(stream), text=None if places is None else places.is_text)
        read = None if states is None else []
        if cache is None or layout.rows is None:
            x = self.run_layers(x, context, None, read)
        else:
            cache.check_room(tokens.shape[1])
            with nullcontext() if _is_step(stream) else eagerly():  # chunks come in any number of lengths
                x = self.run_layers(x, context, cache, read)
            cache.advance(layout.rows, tokens.shape[1])
        found = [_at_tokens(each, places, layout.order) for each in (*(read or ()), x)]
        if states is not None:
            states += found
        return found[-1]

    def _embed(
        self, tokens: Ids, layout: boundaries.Layout, cache: Cache | None
    ) -> tuple[Features, boundaries.Layout, Places | None]:
        """The stream that the first layer reads, its layout, and where tokens stand in it."""
        if layout.order is not None:
            tokens = tokens.gather(1, layout.order)
        x = scaled(self.embedding(tokens), self.spec.embedding.multiplier)
        if self.prefix is None:
            return x, layout, None
        stream, places = insert(layout, len(self.prefix.weight), cache)
        return self.prefix(x, places), stream, places

    def context(self, layout: boundaries.Layout) -> Context:
        """What the nodes are told of a chunk: the encodings are evaluated here, once."""
        check_positions(self.spec, layout.positions)
        tables = {name: self._encoding(name)(layout.positions) for name in self.spec.encodings}
        return Context(layout.positions, layout.segments, tables, layout.rows)

    def vectors(self, count: int) -> Float[Tensor, "vectors width"]:
        """The embedding's weight; where a tool stands in the place of the embedding or around its `forward` (adapters,
        new tokens, offloading) the first `count` vectors that it gives, since the weight is not all, or not there."""
        weight = self.embedding.weight
        if isinstance(self.embedding, nn.Embedding) and "forward" not in vars(self.embedding):
            return weight
        return self.embedding.forward(torch.arange(count, device="cpu" if weight.is_meta else weight.device))

    def new_cache(self, batch_size: int, max_length: int | None = None) -> Cache:
        """An empty cache; `max_length` bounds the tokens of a row (None: rings of global heads grow)."""
        like = self.vectors(0)
        check_count("batch_size", batch_size)
        check_count("max_length", 1 if max_length is None else max_length)
        if max_length is not None:
            row = self.spec.cache_bytes(max_length, like.dtype)
            memory.check_room(batch_size * row, like.device, what=f"a cache of {batch_size} x {max_length} tokens")
        capacity = None if max_length is None else max_length + self.spec.prefix_length
        counters = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return Cache(self.new_states(batch_size, capacity, like), counters, max_length, self.spec)

    def _encoding(self, name: str) -> Encoding:
        module = self.encodings[name]
        assert isinstance(module, Encoding)
        return module


def _is_step(layout: boundaries.Layout) -> bool:
    """Whether the chunk is a decode step in rings of fixed size, for which one compiled graph is enough."""
    fixed = layout.rows is not None and layout.rows.slots_needed is None
    return fixed and layout.positions.shape[1] == 1 and layout.segments is None and not torch.is_grad_enabled()


def _at_tokens(x: Float[Tensor, "batch longer width"], places: Places | None, order: Ids | None) -> Features:
    """The features at the tokens, in the callers' order."""
    x = x if places is None else places.text(x)
    return x if order is None else _scatter(x, order)


def _scatter(x: Features, order: Ids) -> Features:
    """Put features back to where their tokens stood."""
    return torch.empty_like(x).scatter(1, order[..., None].expand_as(x), x)
