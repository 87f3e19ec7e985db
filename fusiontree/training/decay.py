"""Which parameters shrink by weight decay."""

from torch import nn

from fusiontree.core.contracts.modules import Module


def decayed(model: nn.Module) -> list[str]:
    """The names of the parameters declared with `decay`, and of the weights of linear maps that a tool added (LoRA)."""
    return [name for name, _ in model.named_parameters() if _decays(model, name)]


def _decays(model: nn.Module, name: str) -> bool:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Module):
        return own in module.decayed
    return isinstance(module, nn.Linear) and own == "weight"
