"""The language model that a spec describes, and how it is built."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree import products
from fusiontree.core.contracts.cache import Cache
from fusiontree.core.contracts.modules import Module, constant, normal, scaled
from fusiontree.core.model import generation, memory
from fusiontree.core.model.arguments import checked_labels
from fusiontree.core.model.chunked_loss import cross_entropy
from fusiontree.core.model.initialise import initialise
from fusiontree.core.model.spec import HeadSpec, ModelSpec
from fusiontree.core.model.stack import Stack
from fusiontree.core.probes import probes
from fusiontree.core.probes.gate_statistics import Observation
from fusiontree.errors import FusionTreeError

Ids = Int[Tensor, "batch time"]
Features = Float[Tensor, "batch time width"]
Logits = Float[Tensor, "batch time vocab"]


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


class LanguageModel(Stack):
    """Tokens to logits. Module paths are the paths of the expanded spec."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.head = Head(spec.head, spec.width, spec.vocab_size)

    def forward(
        self, tokens: Ids, *, positions: Ids | None = None, documents: Ids | None = None, cache: Cache | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token at every position.

        Args:
            tokens: integers in [0, vocab_size); values at padding are ignored. Values are checked on a CPU only: a
                check on another device would synchronise it.
            positions: of each token; by default they continue after the cached tokens and start at 0 in each new
                document.
            documents: equal numbers for tokens of one document, -1 for padding at any position, whose outputs are
                unspecified. By default there is one document.
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
        labels = checked_labels(self.spec, labels, tokens)
        features = self.features(tokens, positions=positions, documents=documents)
        return self.head.cross_entropy(features.flatten(0, 1), self._tied(), labels.flatten())

    def logits(self, features: Float[Tensor, "... width"]) -> Float[Tensor, "... vocab"]:
        """Apply the head."""
        return self.head(features, self._tied())

    def _tied(self) -> Float[Tensor, "vocab width"] | None:
        """What a tied head multiplies features with; None where the head has a weight of its own."""
        if self.head.weight is not None:
            return None
        return self.vectors(self.spec.vocab_size)

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
            compile: whether to call `compile()` before the first token; the model stays compiled. "auto": where
                something can
                be compiled here, and at least `generation.COMPILED_FROM` tokens are wanted.

        Raises:
            FusionTreeError: what those raise, or `compile` is True and nothing can be compiled.
        """
        sampling = generation.Sampling(temperature, top_k, top_p, seed)
        if not self.compiled and generation.compiles(compile, max_new_tokens, self.device.type):
            self.compile()
        return generation.generate(self, tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)


def build(
    spec: ModelSpec, *, seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of a spec, its parameters drawn from (seed, path); on the meta device, declared only.

    Raises:
        FusionTreeError: there is no such device here; or what is given is no spec, as a preset's name.
        WeightsError: the weights are larger than the device's free memory (nothing has been allocated).
    """
    if not isinstance(spec, ModelSpec):
        raise FusionTreeError(f"build: expected a ModelSpec, found {spec!r:.80}; load_spec reads presets and files")
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
