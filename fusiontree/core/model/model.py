"""The language model that a spec describes, and how it is built."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusiontree import products
from fusiontree.compiling import allow_forms, any_size, eagerly
from fusiontree.core.contracts.cache import Cache
from fusiontree.core.contracts.context import Context, State
from fusiontree.core.contracts.encoding import Encoding
from fusiontree.core.contracts.modules import Module, Normalise, constant, normal, scaled
from fusiontree.core.contracts.node import Binds, Node
from fusiontree.core.model import boundaries, generation, memory
from fusiontree.core.model.chunked_loss import NO_LABEL, cross_entropy
from fusiontree.core.model.initialise import initialise
from fusiontree.core.model.kv_sharing import Ledger, Loans
from fusiontree.core.model.layer import Layer
from fusiontree.core.model.prefix import Places, Prefix, insert
from fusiontree.core.model.spec import HeadSpec, ModelSpec
from fusiontree.core.probes import probes
from fusiontree.core.probes.gate_statistics import Observation
from fusiontree.errors import FusionTreeError

Ids = Int[Tensor, "batch time"]
Features = Float[Tensor, "batch time width"]
Logits = Float[Tensor, "batch time vocab"]


class Embedding(nn.Embedding, Module):
    """A vector for each token of the vocabulary. One of torch's, so that tools that look for those find it."""

    def __init__(self, vocab_size: int, width: int) -> None:
        Module.__init__(self)  # torch's would draw values
        self.num_embeddings, self.embedding_dim = vocab_size, width
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = self.declare("weight", (vocab_size, width), normal(0.02))

    def forward(self, tokens: Ids) -> Features:
        """Look up the vectors."""
        return F.embedding(tokens, self.weight)


class Head(Module):
    """From features to logits; a tied head has no weight of its own."""

    def __init__(self, spec: HeadSpec, width: int, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = None if spec.tied else self.declare("weight", (vocab_size, width), normal(0.02), decay=True)
        self.bias = self.declare("bias", (vocab_size,), constant(0.0)) if spec.bias else None

    def forward(self, features: Float[Tensor, "... width"], embedding: Tensor | None) -> Float[Tensor, "... vocab"]:
        """softcap * tanh(multiplier * (W x + b) / softcap); `embedding` is the W of a tied head."""
        return self._logits(features, *self._parameters_with(embedding))

    def cross_entropy(
        self, features: Float[Tensor, "tokens width"], embedding: Tensor | None, labels: Int[Tensor, "tokens"]
    ) -> Float[Tensor, ""]:
        """The sum of -log p of the labels, without all logits in memory."""
        return cross_entropy(self._logits, labels, features, *self._parameters_with(embedding))

    def _parameters_with(self, embedding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = embedding if self.weight is None else self.weight
        assert weight is not None
        return weight, self.bias

    def _logits(self, features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Float[Tensor, "... vocab"]:
        logits = products.linear(features, weight, bias)
        logits = scaled(logits, self.spec.multiplier)
        softcap = self.spec.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class LanguageModel(nn.Module):
    """Tokens to logits. Module paths are the paths of the expanded spec."""

    compiled = False
    checkpointing = False
    """Whether training keeps the inputs of layers alone and runs each again for its gradient (arXiv 1604.06174)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        scope = spec.scope
        self.embedding = Embedding(spec.vocab_size, spec.width)
        self.encodings = nn.ModuleDict(
            {name: e.build(spec.width, spec.rotated_channels(name)) for name, e in spec.encodings.items()}
        )
        self.shared = nn.ModuleDict({name: node.build(scope.for_shared) for name, node in spec.shared.items()})
        self.layers = nn.ModuleList(Layer(layer, scope) for layer in spec.expanded_layers())
        self.norm = Normalise(spec.norm, spec.width)
        self.head = Head(spec.head, spec.width, spec.vocab_size)
        self.prefix = Prefix(spec.prefix, spec.width) if spec.prefix else None
        self.reads_embedding = any(node.reads_embedding for _, node in spec.nodes())
        borrows = {path: node.borrows for path, node in spec.nodes() if node.borrows is not None}
        self.loans = Loans(borrows)
        for path, node in self.nodes():
            node.path, node.place = path, ".".join(path.split(".")[2:])
            node.lends = path in borrows.values()
        self.binding = [node for _, node in self.nodes() if isinstance(node, Binds)]
        self._bind()

    def _bind(self) -> None:
        """Let uses of shared nodes find them, again where a tool (LoRA, quantisation) has replaced parts of those."""
        for node in self.binding:
            if not node.is_current():
                node.bind(self.shared)

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and tokens are looked up."""
        return self.embedding.weight.device

    def compile(self, **options: Any) -> None:
        """Compile the layers, each as one graph; layers of one form and shape share it.

        The first call of each shape takes a minute on a CPU, which needs a C++ compiler; torch keeps what it made
        on disk. Of calls with a cache only decode steps are compiled, in a cache that has a `max_length`. Under
        `observe`, `force` and `drop` the layers run as plain Python. `options` are those of `torch.compile`.
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

    def running(self) -> Iterator[Node]:
        """Every node that a forward pass meets; shared ones once for each use, with the path of the use."""
        for path, node in self.nodes():
            if path.startswith("layers."):
                yield from node.stands()

    def forward(
        self, tokens: Ids, *, positions: Ids | None = None, documents: Ids | None = None, cache: Cache | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token at every position.

        Args:
            tokens: integers in [0, vocab_size); what stands at padding is not looked at. Values are checked on a
                CPU alone: to look at those of another device is to wait for it.
            positions: where each token stands; 0, 1, ... after what the cache holds when not given, from 0 in
                each new document.
            documents: equal numbers for tokens of one document, -1 for padding, wherever it stands; the
                outputs there are unspecified. One document when not given.
            cache: from `new_cache`; updated in place.

        Raises:
            FusionTreeError: a token outside the vocabulary, a position beyond an encoding, no room in the cache,
                or shapes that do not agree.
        """
        return self.logits(self.features(tokens, positions=positions, documents=documents, cache=cache))

    def cross_entropy(
        self, tokens: Ids, labels: Ids, *, positions: Ids | None = None, documents: Ids | None = None
    ) -> Float[Tensor, ""]:
        """The sum over all labels of -log p, in nats; logits are made and forgotten some tokens at a time.

        Args:
            tokens: as `forward` takes them, like positions and documents.
            labels: the token to predict at each position, -100 where there is none.

        Raises:
            FusionTreeError: as `forward`, or labels of another shape than the tokens or outside the vocabulary.
        """
        labels = self._checked_labels(labels, tokens)
        features = self.features(tokens, positions=positions, documents=documents)
        return self.head.cross_entropy(features.flatten(0, 1), self._tied(), labels.flatten())

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
            states: a list to which what each layer reads is added, and last what the head reads.
        """
        self._bind()
        tokens = self._checked(tokens, documents)
        self._check_shapes(tokens, positions, documents, cache)
        if cache is not None:
            cache.leave_inference()
        one_form = (self.compiled and cache is None) or torch.compiler.is_exporting()
        layout = boundaries.arrange(tokens, documents, positions, cache, one_form=one_form)
        if layout.order is not None:
            tokens = tokens.gather(1, layout.order)
        stream, places = (layout, None) if self.prefix is None else insert(layout, len(self.prefix.weight), cache)
        x = scaled(self.embedding(tokens), self.spec.embedding.multiplier)
        x = x if self.prefix is None else self.prefix(x, places)
        context = replace(self.context(stream), text=None if places is None else places.is_text)
        read = None if states is None else []
        if cache is None or layout.rows is None:
            x = self.stack(x, context, read=read)
        else:
            cache.check_room(tokens.shape[1])
            with nullcontext() if _is_step(stream) else eagerly():  # chunks come in any number of lengths
                x = self.stack(x, context, cache, read=read)
            cache.advance(layout.rows, tokens.shape[1])
        found = [_at_tokens(each, places, layout.order) for each in (*(read or ()), x)]
        if states is not None:
            states += found
        return found[-1]

    def context(self, layout: boundaries.Layout) -> Context:
        """What the nodes are told of a chunk: the encodings are evaluated here, once."""
        self._check_positions(layout.positions)
        tables = {name: self._encoding(name)(layout.positions) for name in self.spec.encodings}
        return Context(layout.positions, layout.segments, tables, layout.rows)

    def stack(
        self, x: Features, context: Context, cache: Cache | None = None, *, read: list[Features] | None = None
    ) -> Features:
        """Run the layers, each with its own part of the cache, normalise; what each reads is added to `read`."""
        context = replace(context, embedding=x) if self.reads_embedding else context
        ledger = Ledger(self.loans)
        for index, layer in enumerate(self.layers):
            own = ledger.enter(index, context) if self.loans else context
            if read is not None:
                read.append(x)
            if cache is not None:
                x = layer(x, replace(own, states=cache.layers.get(f"layers.{index}", {})))
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, own, use_reentrant=False)
            else:
                x = layer(x, own)
        return self.norm(x)

    def logits(self, features: Float[Tensor, "... width"]) -> Float[Tensor, "... vocab"]:
        """Apply the head."""
        return self.head(features, self._tied())

    def _tied(self) -> Float[Tensor, "vocab width"] | None:
        """What a tied head multiplies features with; None where the head has a weight of its own."""
        if self.head.weight is not None:
            return None
        return self.embedding.weight if _is_plain(self.embedding) else self._looked_up(self.spec.vocab_size)

    def _looked_up(self, count: int) -> Float[Tensor, "count width"]:
        """The first vectors as the embedding gives them: its weight is not all, or not there, where a tool stands in
        its place or around its `forward` (adapters, new tokens, offloading)."""
        weight = self.embedding.weight
        return self.embedding.forward(torch.arange(count, device="cpu" if weight.is_meta else weight.device))

    def new_cache(self, batch_size: int, max_length: int | None = None) -> Cache:
        """An empty cache; `max_length` bounds the tokens of a row (None: rings of global heads grow)."""
        like = self.embedding.weight if _is_plain(self.embedding) else self._looked_up(0)
        for name, count in (("batch_size", batch_size), ("max_length", 1 if max_length is None else max_length)):
            if not isinstance(count, int) or count < 1:
                raise FusionTreeError(f"{name}: a whole number from 1 on is needed, found {count!r}")
        if max_length is not None:
            row = self.spec.cache_bytes(max_length, like.dtype)
            memory.check_room(batch_size * row, like.device, what=f"a cache of {batch_size} x {max_length} tokens")
        capacity = None if max_length is None else max_length + self.spec.prefix_length
        states = {node.path: node.new_state(batch_size, capacity, like) for node in self.running()}
        if self.compiled and capacity is not None:
            self._allow_other_lengths(states, batch_size, capacity)
        counters = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        return Cache({path: state for path, state in states.items() if state}, counters, max_length, self.spec)

    def _allow_other_lengths(self, states: Mapping[str, State], batch_size: int, capacity: int) -> None:
        """One compiled form of a step for all capacities."""
        like = torch.empty(0, device="meta")
        for node in self.running():
            longer = node.new_state(batch_size, capacity + 1, like)
            for name, tensor in states[node.path].items():
                any_size(tensor, longer[name])

    def observe(self) -> AbstractContextManager[Observation]:
        """Collect statistics of every gate, by path and branch name, while a `with` block runs."""
        return probes.observe(self)

    def force(self, values: Mapping[str, Mapping[str, float]]) -> AbstractContextManager[None]:
        """Give gates constant values while a `with` block runs: `{path: {branch: value}}`."""
        return probes.force(self, values)

    def drop(self, paths: Iterable[str]) -> AbstractContextManager[None]:
        """Silence branches, sub-layers or layers while a `with` block runs."""
        return probes.drop(self, paths)

    def generate(
        self,
        tokens: generation.Prompts,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: generation.Stop = (),
        compile: Literal[False, True, "auto"] = False,
    ) -> Ids | list[list[int]]:
        """Prompts with their continuations; see `generation.Sampling` and `generation.generate`.

        Args:
            compile: as `compile()` does it, once and for good, before the first token. "auto": where something can
                be compiled here, and at least `generation.COMPILED_FROM` tokens are wanted.

        Raises:
            FusionTreeError: what those raise, or `compile` is True and nothing can be compiled.
        """
        sampling = generation.Sampling(temperature, top_k, top_p, seed)
        if not self.compiled and generation.compiles(compile, max_new_tokens, self.device.type):
            self.compile()
        return generation.generate(self, tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)

    def _encoding(self, name: str) -> Encoding:
        module = self.encodings[name]
        assert isinstance(module, Encoding)
        return module

    def _checked(self, tokens: Ids, documents: Ids | None) -> Ids:
        _check_ids(tokens)
        tokens = tokens.long()
        if documents is not None and documents.shape == tokens.shape:
            tokens = torch.where(documents < 0, 0, tokens)
        self._check_vocabulary("tokens", tokens)
        return tokens

    def _checked_labels(self, labels: Ids, tokens: Ids) -> Ids:
        _check_ids(tokens)
        _check_like("labels", labels, tokens)
        labels = labels.long()
        self._check_vocabulary("labels", torch.where(labels == NO_LABEL, 0, labels))
        return labels

    def _check_vocabulary(self, name: str, ids: Ids) -> None:
        if boundaries.readable(ids):
            boundaries.check_vocabulary(name, ids, self.spec.vocab_size)

    def _check_shapes(self, tokens: Ids, positions: Ids | None, documents: Ids | None, cache: Cache | None) -> None:
        for name, ids in (("positions", positions), ("documents", documents)):
            if ids is not None:
                _check_like(name, ids, tokens)
        if cache is not None and cache.batch != tokens.shape[0]:
            raise FusionTreeError(f"cache: made for {cache.batch} rows, found {tokens.shape[0]} in tokens")
        if cache is not None and cache.made_for is not self.spec and cache.made_for != self.spec:
            other = cache.made_for
            made_for = other.digest() if isinstance(other, ModelSpec) else f"{other!r:.60}"
            raise FusionTreeError(f"cache: made for the spec {made_for}, found {self.spec.digest()}")

    def _check_positions(self, positions: Ids) -> None:
        limits = {name: e.limit for name, e in self.spec.encodings.items() if e.limit is not None}
        if not limits or not boundaries.readable(positions):
            return
        name = min(limits, key=lambda n: limits[n])
        low, high = (int(value) for value in positions.aminmax())
        if low < 0 or high >= limits[name]:
            before = self.spec.prefix_length  # callers count positions without the prefix
            found = f"position {(low if low < 0 else high) - before}"
            raise FusionTreeError(f"encodings.{name}: found {found}, it was made for {limits[name] - before} positions")


def _is_plain(embedding: nn.Module) -> bool:
    """Whether an embedding gives its weight's rows, and no tool stands in its place or around its `forward`."""
    return isinstance(embedding, nn.Embedding) and "forward" not in vars(embedding)


def _is_step(layout: boundaries.Layout) -> bool:
    """Whether a chunk is the next token of every row, of documents that go on in rings of one size: one form."""
    fixed = layout.rows is not None and layout.rows.room is None
    return fixed and layout.positions.shape[1] == 1 and layout.segments is None and not torch.is_grad_enabled()


def _check_ids(tokens: object) -> None:
    if not _are_ids(tokens) or tokens.shape[1] == 0:
        raise FusionTreeError(f"tokens: an integer tensor [batch, time >= 1] is needed, found {_kind(tokens)}")


def _check_like(name: str, ids: object, tokens: Ids) -> None:
    if not (_are_ids(ids) and ids.shape == tokens.shape):
        found = f"an integer tensor {list(tokens.shape)} is needed, as tokens are, found {_kind(ids)}"
        raise FusionTreeError(f"{name}: {found}")


def _are_ids(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a matrix of integers."""
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in integers


def _kind(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _at_tokens(x: Float[Tensor, "batch longer width"], places: Places | None, order: Ids | None) -> Features:
    """What stands at the tokens, in the order in which they came."""
    x = x if places is None else places.text(x)
    return x if order is None else _scatter(x, order)


def _scatter(x: Features, order: Ids) -> Features:
    """Put features back to where their tokens stood."""
    return torch.empty_like(x).scatter(1, order[..., None].expand_as(x), x)


def build(
    spec: ModelSpec, *, seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of a spec, its parameters drawn from (seed, path); on the meta device, declared only.

    Raises:
        FusionTreeError: there is no such device here; or what is given is no spec, as a preset's name.
        WeightsError: the weights are larger than the device's free memory (nothing has been allocated).
    """
    if not isinstance(spec, ModelSpec):
        raise FusionTreeError(f"build: a ModelSpec is needed, found {spec!r:.80}; load_spec reads presets and files")
    device = memory.usable(device or "cpu")
    with torch.device("meta"):
        model = LanguageModel(spec).to(dtype or torch.float32)
    if device.type != "meta":
        memory.check_room(sum(p.nbytes for p in model.parameters()), device)
        _allocate(model, device)
        initialise(model, seed)
    return model


def _allocate(model: LanguageModel, device: torch.device) -> None:
    """`to_empty`, which goes through functions of torch that import sympy first."""
    state = {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
