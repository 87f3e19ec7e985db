"""Is a pruned model the model with those parts silent? Checked, not believed (law 8)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusiontree.core.model.model import LanguageModel
from fusiontree.core.probes.probes import evaluating
from fusiontree.pruning.evidence import PruneError
from fusiontree.pruning.plan import Plan
from fusiontree.pruning.precision import computing_in

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Verdict:
    """The largest difference of logits, relative to max(1, max |logit|), by precision, and bytes before and after."""

    differences: dict[str, float]
    bytes_before: int
    bytes_after: int

    @property
    def text(self) -> str:
        """One line."""
        found = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        return f"pruned equals dropped within {found}; weights {self.bytes_before} -> {self.bytes_after} bytes"


@torch.no_grad()
def verify(model: LanguageModel, pruned: LanguageModel, plan: Plan, *, rows: int = 2, length: int = 64) -> Verdict:
    """Compare a pruned model with the original, the plan's parts dropped: a prefill and decode steps.

    Raises:
        PruneError: the logits differ by more than 1e-10 (float64) or 1e-5 (float32), or tensors are left over.
    """
    _check_bytes(pruned, plan, model)
    generator = torch.Generator().manual_seed(0)
    length = min(length, model.spec.longest or length)
    tokens = torch.randint(0, model.spec.vocab_size, (rows, length), generator=generator)
    differences = {
        str(dtype).removeprefix("torch."): _difference(model, pruned, plan, tokens, dtype) for dtype in TOLERANCES
    }
    for (name, found), allowed in zip(differences.items(), TOLERANCES.values(), strict=True):
        if not found <= allowed:
            raise PruneError(f"verify: pruned and dropped differ by {found:.3g} in {name}, {allowed} is allowed")
    return Verdict(differences, _bytes(model), _bytes(pruned))


def _difference(model: LanguageModel, pruned: LanguageModel, plan: Plan, tokens: Tensor, dtype: torch.dtype) -> float:
    """Both computed in float64 or float32, so that bf16 weights are compared exactly."""
    tokens = tokens.to(model.device)
    with model.drop(plan.drops):
        wanted = _logits(model, tokens, dtype)
    return float((_logits(pruned, tokens, dtype) - wanted).abs().max() / max(1.0, float(wanted.abs().max())))


def _logits(model: LanguageModel, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """A prefill of all but the last four tokens (of a short sequence, all but the first), then those one by one."""
    prefill = max(tokens.shape[1] - 4, 1)
    first, last = tokens[:, :prefill], tokens[:, prefill:]
    with computing_in(model, dtype), evaluating(model):
        cache = model.new_cache(tokens.shape[0], tokens.shape[1])
        return torch.cat([model(first, cache=cache), *(model(step, cache=cache) for step in last.split(1, 1))], 1)


def _check_bytes(pruned: LanguageModel, plan: Plan, model: LanguageModel) -> None:
    if pruned.spec != plan.edit(model.spec):
        raise PruneError("verify: the pruned spec is not what the plan makes of the original")
    left = {
        name for name in pruned.state_dict() if not torch.equal(pruned.state_dict()[name], model.state_dict()[name])
    }
    if left:
        raise PruneError(f"verify: tensor {min(left)!r} is not the original's")


def _bytes(model: LanguageModel) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())
