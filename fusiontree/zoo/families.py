"""Every public model family by its `model_type`: this module imports the files of all of them."""

from fusiontree.errors import FusionTreeError, suggest
from fusiontree.zoo import (  # noqa: F401 - each registers its families
    bamba,
    falcon_h1,
    gemma,
    granitemoehybrid,
    jamba,
    kimi_linear,
    lfm2,
    llama,
    mamba,
    mamba2,
    minimax,
    nemotron_h,
    olmo_hybrid,
    own,
    qwen3_next,
    recurrent_gemma,
    zamba2,
)
from fusiontree.zoo.family import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "family_of"]


def family_of(name: object) -> Family:
    """The family of a `model_type`.

    Raises:
        FusionTreeError: no family has this name.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise FusionTreeError(f"model_type: no family is called {name!r}{suggest(str(name), FAMILIES)}")
    return FAMILIES[name]
