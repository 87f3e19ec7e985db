"""Fields of a config that do not change the function but matter to users: the longest text, end tokens, training. An
imported spec keeps them in its lineage (which takes no part in equality), through pruning and every other edit.
Export writes them back.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusiontree.core.model.spec import ModelSpec
from fusiontree.errors import FusionTreeError

LONGEST = "max_position_embeddings"
CARRIED = (
    *(LONGEST, "model_max_length"),  # servers and lm-eval cut there
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # generation
    *("chunk_size", "mamba_chunk_size"),  # kernels of servers
    *("initializer_range", "attention_dropout", "hidden_dropout"),  # training
    *("router_aux_loss_coef", "z_loss_coefficient"),  # losses
)
"""The keys to keep. Other keys without effect describe the class, the library's version, or one call."""
GENERATION = "generation_config.json"


def carried(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config to keep, without null fields."""
    return {key: config[key] for key in CARRIED if config.get(key) is not None}


def carried_by(spec: ModelSpec) -> dict[str, Any]:
    """The fields that the last import kept. `model_max_length` also fills a missing `max_position_embeddings`, because
    other tools read only that name."""
    kept = next((entry.data()["config"] for entry in reversed(spec.lineage) if entry.config), {})
    longest = kept.get("model_max_length")
    return kept if longest is None else {LONGEST: longest, **kept}


def end_tokens(directory: Path | str, spec: ModelSpec) -> list[int]:
    """The tokens that end generation: from the model's `generation_config.json`, else from its config.

    Raises:
        FusionTreeError: the file is not a JSON object, or a value is not a token of the vocabulary.
    """
    path = Path(directory) / GENERATION
    found = _object(path).get("eos_token_id") if path.is_file() else None
    found = carried_by(spec).get("eos_token_id") if found is None else found
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    for token in tokens:
        if type(token) is not int or not 0 <= token < spec.vocab_size:
            text = f"expected tokens below {spec.vocab_size}, found {token!r:.60}"
            raise FusionTreeError(f"{directory}: eos_token_id: {text}")
    return tokens


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FusionTreeError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise FusionTreeError(f"{path}: expected an object, found {type(found).__name__}")
    return found
