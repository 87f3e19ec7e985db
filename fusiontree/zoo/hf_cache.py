"""FusionTree's cache as a cache of transformers: supports what `generate` needs and refuses the rest."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from fusiontree.core.contracts.cache import Cache
from fusiontree.errors import FusionTreeError


class FusionTreeCache(TransformersCache):
    """Holds a `Cache`, which the first call makes. Keys, values and recurrent states are in `cache.states` by path, not
    by layer as in transformers. Recurrent states cannot be rolled back."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.cache: Cache | None = None
        self.columns = self.depth = 0

    def __len__(self) -> int:
        """The number of layers; 0 before the first call."""
        return 0 if self.cache is None else self.depth

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of columns that the model has seen, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The number of tokens that a row may have; -1 if there is no limit."""
        bounded = self.cache is not None and self.cache.capacity is not None
        return self.cache.capacity if bounded else -1  # pyright: ignore

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of mask columns after `query_length` more tokens, and the index of the first column."""
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the model has seen any column."""
        return self.columns > 0

    @property
    def batch_size(self) -> int:
        """The number of rows; -1 before the first call."""
        return -1 if self.cache is None else self.cache.batch

    @property
    def is_initialized(self) -> bool:
        """Whether the first call has made the cache."""
        return self.cache is not None

    @property
    def is_croppable(self) -> bool:
        """Never: see `crop`."""
        return False

    def reset(self) -> None:
        """Forget everything."""
        self.cache, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row i continue the row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.cache is not None:
            self.cache.select(indices.to(self.cache.lengths.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.batch_select_indices(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Accepts only 0: recurrent states cannot forget tokens, and windows have dropped older ones.

        Raises:
            FusionTreeError: `tokens_to_remove` is not 0.
        """
        if tokens_to_remove != 0:
            _refuse(f"crop({tokens_to_remove}): states have no way back; `copy.deepcopy` it before, or `reset` it")

    def activate_past_recording(self) -> None:
        """Not possible: generation with an assistant model or with n-grams of the prompt rolls the cache back."""
        _refuse("states have no way back, which generation with an assistant model or `prompt_lookup_num_tokens` needs")

    def update(self, *args: Any, **options: Any) -> NoReturn:
        """Not possible, like every method that reads or writes the keys, values or states of one layer."""
        _refuse("what it holds is by path in `cache.states`, not by layer as transformers' modules read and write it")

    early_initialization = update_conv_state = update_recurrent_state = update_indexer = update
    get_conv_state = get_recurrent_state = prefetch = offload = is_recording_past = update
    is_sliding = is_linear = is_dummy = property(update)  # pyright: ignore


def _refuse(why: str) -> NoReturn:
    raise FusionTreeError(f"past_key_values: {why}")
