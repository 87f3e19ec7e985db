"""Sampling: greedy, temperature, top-k, top-p, stop sequences, one seed a row; prompts of unequal length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusiontree import machine
from fusiontree.core.contracts.cache import Cache
from fusiontree.core.model.boundaries import check_vocabulary
from fusiontree.core.model.spec import ModelSpec
from fusiontree.core.probes import probes
from fusiontree.errors import FusionTreeError

Prompts = Int[Tensor, "batch time"] | Sequence[Sequence[int]]
Stop = Sequence[int | Sequence[int]]
PADDING = -1
COMPILED_FROM = 4096
"""New tokens from which on compiling pays: it takes half a minute, and a step is then some milliseconds shorter."""


class Decoder(probes.HasMode, Protocol):
    """The methods that generation needs; `LanguageModel` has them."""

    @property
    def spec(self) -> ModelSpec:
        """Its spec, for the size of the vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tokens are looked up."""
        ...

    def new_cache(self, batch_size: int, max_length: int | None = None) -> Cache:
        """An empty cache."""
        ...

    def features(
        self, tokens: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None, cache: Cache
    ) -> Float[Tensor, "batch time width"]:
        """What the head reads."""
        ...

    def logits(self, features: Float[Tensor, "... width"]) -> Float[Tensor, "... vocab"]:
        """Apply the head."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_k` and `top_p` (arXiv 1904.09751) cut the
    distribution before it is drawn from. A row's draws depend on its own seed alone; one seed for all gives row
    i the seed + i."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise FusionTreeError(f"temperature: expected at least 0, found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise FusionTreeError(f"top_k: expected at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise FusionTreeError(f"top_p: found {self.top_p}, it is in (0, 1]")

    def generators(self, rows: int) -> list[torch.Generator]:
        """One for each row."""
        seeds = [self.seed + row for row in range(rows)] if isinstance(self.seed, int) else list(self.seed)
        if len(seeds) != rows:
            raise FusionTreeError(f"seed: {len(seeds)} seeds for {rows} prompts")
        for seed in seeds:
            if not -(2**63) <= seed < 2**64:
                raise FusionTreeError(f"seed: found {seed}, it has 64 bits")
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits: Float[Tensor, "batch vocab"], generators: list[torch.Generator]) -> Int[Tensor, "batch"]:
        """The next token of each row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        below = logits.double() - logits.double().amax(-1, keepdim=True)  # so that tiny temperatures cannot overflow
        ordered, tokens = torch.sort(below / self.temperature, stable=True, dim=-1, descending=True)
        mass = ordered.softmax(-1)
        mass = mass.masked_fill(self._beyond(mass), 0.0)
        draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
        reached = mass.cumsum(-1)
        index = torch.searchsorted(reached, draws * reached[:, -1:]).clamp(max=self._last(mass))
        return tokens.gather(1, index)[:, 0]

    def _beyond(self, mass: Float[Tensor, "batch vocab"]) -> Tensor:
        """Which of the tokens, most likely first, are cut off; never the first."""
        rank = torch.arange(mass.shape[-1], device=mass.device).expand_as(mass)
        beyond = rank >= min(self.top_k or mass.shape[-1], mass.shape[-1])
        if self.top_p is not None:
            beyond = beyond | ((mass.cumsum(-1) - mass >= self.top_p) & (rank > 0))
        return beyond

    @staticmethod
    def _last(mass: Float[Tensor, "batch vocab"]) -> Tensor:
        """The last token of each row with any mass, so that rounding cannot draw one without; the first of none."""
        return ((mass > 0).sum(-1, keepdim=True) - 1).clamp(min=0)


def compiles(asked: object, max_new_tokens: int, device: str) -> bool:
    """Whether a model on a type of device is to be compiled before it generates.

    Raises:
        FusionTreeError: neither False, True nor "auto" was asked, or True where nothing can be compiled.
    """
    if asked not in (False, True, "auto"):
        raise FusionTreeError(f"compile: expected False, True or 'auto', found {asked!r:.60}")
    if asked is False or (asked == "auto" and max_new_tokens < COMPILED_FROM):
        return False
    reason = machine.compile_refusal(device)
    if reason is not None and asked is True:
        raise FusionTreeError(f"compile: nothing can be compiled for {device}: {reason}")
    return reason is None


@torch.no_grad()
def stream(
    model: Decoder, prompts: Prompts, *, max_new_tokens: int, sampling: Sampling, stop: Stop = ()
) -> Iterator[list[int | None]]:
    """Yield the next token of every row, step by step; None for a row that has ended.

    A row ends with the token that completes a stop sequence. Ends when all rows have, or after
    `max_new_tokens` steps. Gates make no noise meanwhile: the model is in evaluation mode for each step.

    Raises:
        FusionTreeError: bad arguments, or logits that say nothing, since the largest is infinite or not a number.
    """
    tokens, documents = _entered(prompts, model)
    if max_new_tokens < 0:
        raise FusionTreeError(f"max_new_tokens: expected at least 0, found {max_new_tokens}")
    generators, endings = sampling.generators(tokens.shape[0]), _endings(stop)
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
    with probes.evaluating(model):
        features = _at_last(model.features(tokens, documents=documents, cache=cache), documents)
    written: list[list[int]] = [[] for _ in range(tokens.shape[0])]
    live = [True] * tokens.shape[0]
    for step in range(max_new_tokens):
        logits = model.logits(features)
        chosen = sampling.choose(logits, generators)
        new = _read(chosen, logits, live, step)
        for row, token in enumerate(new):
            if token is not None:
                written[row].append(token)
                live[row] = not any(tuple(written[row][-len(end) :]) == end for end in endings)
        yield new
        if not any(live) or step + 1 == max_new_tokens:
            return
        # Rows that have ended go on unread, at a position that every encoding has.
        positions = cache.positions * torch.tensor(live, device=chosen.device)
        with probes.evaluating(model):
            features = model.features(chosen[:, None], positions=positions[:, None], cache=cache)[:, 0]


def _read(chosen: Tensor, logits: Tensor, live: list[bool], step: int) -> list[int | None]:
    """The tokens of the rows that go on, read from the device once with whether their logits say anything."""
    found = torch.where(logits.amax(-1).isfinite(), chosen, PADDING).tolist()
    for row, (token, alive) in enumerate(zip(found, live, strict=True)):
        if alive and token == PADDING:
            kind = str(logits.dtype).removeprefix("torch.")
            text = f"the largest logit is not finite in {kind}; the model has overflowed, or holds what is no number"
            raise FusionTreeError(f"generate: row {row}, new token {step + 1}: {text}")
    return [token if alive else None for token, alive in zip(found, live, strict=True)]


def _endings(stop: Stop) -> list[tuple[int, ...]]:
    if not isinstance(stop, Sequence):
        raise FusionTreeError(f"stop: expected a list of tokens and of sequences of tokens, found {stop!r:.60}")
    endings = [tuple(ending) if isinstance(ending, Sequence) else (ending,) for ending in stop]
    for ending in endings:
        if not ending or not all(isinstance(token, int) for token in ending):
            raise FusionTreeError(f"stop: tokens are whole numbers, at least one of them, found {ending!r:.60}")
    return endings


def generate(
    model: Decoder, prompts: Prompts, *, max_new_tokens: int, sampling: Sampling, stop: Stop = ()
) -> Int[Tensor, "batch longer"] | list[list[int]]:
    """Prompts with their continuations, in the form the prompts came in.

    A tensor gives an int64 tensor [batch, time + new], -1 behind rows that ended early; sequences give lists.
    """
    steps = list(stream(model, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop))
    if not isinstance(prompts, Tensor):
        rows = enumerate(prompts)
        return [[*prompt, *(new for step in steps if (new := step[row]) is not None)] for row, prompt in rows]
    columns = [[PADDING if token is None else token for token in step] for step in steps]
    new = torch.tensor(columns, dtype=torch.long).reshape(len(columns), prompts.shape[0]).T
    return torch.cat([prompts.long(), new.to(prompts.device)], 1)


def _entered(prompts: Prompts, model: Decoder) -> tuple[Tensor, Tensor | None]:
    """Padded prompts on the model's device, where nobody looks at them again, and their documents."""
    tokens, documents = pad(prompts)
    if tokens.numel():
        check_vocabulary("tokens", tokens, model.spec.vocab_size)
    return tokens.to(model.device), None if documents is None else documents.to(model.device)


def pad(prompts: Prompts) -> tuple[Tensor, Tensor | None]:
    """Prompts as one tensor, padded at the end, and the document ids that mark padding; None if all prompts are equally
    long.

    Raises:
        FusionTreeError: not a matrix, or not sequences of at least one integer.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2:
            raise FusionTreeError(f"prompts: expected a tensor [batch, time], found {list(prompts.shape)}")
        return prompts, None
    rows = [_integers(prompt) for prompt in prompts]
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) == 0:
        raise FusionTreeError("prompts: expected at least one, of at least one token each")
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    documents = torch.full_like(tokens, PADDING)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row, dtype=torch.long)
        documents[place, : len(row)] = 0
    return tokens, documents if min(lengths) < max(lengths) else None


def _integers(prompt: Sequence[int]) -> list[int]:
    try:
        return [index(token) for token in prompt]
    except TypeError:
        raise FusionTreeError(f"prompts: expected sequences of integers, found {prompt!r:.60}") from None


def _at_last(features: Tensor, documents: Tensor | None) -> Float[Tensor, "batch width"]:
    if documents is None:
        return features[:, -1]
    last = (documents >= 0).sum(1) - 1
    return features[torch.arange(len(last), device=last.device), last]
