"""Our cache as one of transformers: what `generate` asks of one, and a refusal of what it cannot give."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from fusiontree.core.contracts.cache import Cache
from fusiontree.errors import FusionTreeError


class FusionTreeCache(TransformersCache):
    """A `Cache` that is made by the first call. What transformers keeps by layer, keys and values, is here in
    `cache.states` by path, with the states of recurrences; of those there is no way back."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.cache: Cache | None = None
        self.columns = self.depth = 0

    def __len__(self) -> int:
        """How many layers have been seen: all, or none before the first call."""
        return 0 if self.cache is None else self.depth

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns the model has seen, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How many tokens a row may have; -1: any number."""
        bounded = self.cache is not None and self.cache.capacity is not None
        return self.cache.capacity if bounded else -1  # pyright: ignore

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many columns a mask has with so many more, and which is its first."""
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything has been seen."""
        return self.columns > 0

    @property
    def batch_size(self) -> int:
        """The number of rows; -1 before the first call."""
        return -1 if self.cache is None else self.cache.batch

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been seen."""
        return self.cache is not None

    @property
    def is_croppable(self) -> bool:
        """Never: see `crop`."""
        return False

    def reset(self) -> None:
        """Forget everything."""
        self.cache, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row continue another one."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.cache is not None:
            self.cache.select(indices.to(self.cache.lengths.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row be so many."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove no tokens; others are in the states of recurrences and have left their windows.

        Raises:
            FusionTreeError: any are to be removed.
        """
        if tokens_to_remove != 0:
            _refuse(f"crop({tokens_to_remove}): states have no way back; `copy.deepcopy` it before, or `reset` it")

    def activate_past_recording(self) -> None:
        """Not possible: generation with an assistant or a prompt's n-grams rolls the cache back."""
        _refuse("states have no way back, which generation with an assistant model or `prompt_lookup_num_tokens` needs")

    def update(self, *args: Any, **options: Any) -> NoReturn:
        """Not possible, like all that reads or writes a layer's keys, values and states."""
        _refuse("what it holds is by path in `cache.states`, not by layer as transformers' modules read and write it")

    early_initialization = update_conv_state = update_recurrent_state = update_indexer = update
    get_conv_state = get_recurrent_state = prefetch = offload = is_recording_past = update
    is_sliding = is_linear = is_dummy = property(update)  # pyright: ignore


def _refuse(why: str) -> NoReturn:
    raise FusionTreeError(f"past_key_values: {why}")
