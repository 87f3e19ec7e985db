"""Any spec as a model of transformers: `AutoConfig` and `AutoModelForCausalLM` know `fusiontree` once this is imported.

>>> import fusiontree.zoo.hf
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("DIRECTORY")  # doctest: +SKIP
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache as TransformersCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from fusiontree.core import weights
from fusiontree.core.cache import Cache
from fusiontree.core.initialise import initialise
from fusiontree.core.layer import Layer
from fusiontree.core.model import LanguageModel
from fusiontree.core.model_spec import ModelSpec
from fusiontree.data.tokenizer import ByteTokenizer
from fusiontree.data.tokenizer_files import byte_tokenizer, tokenizer_files
from fusiontree.errors import FusionTreeError
from fusiontree.zoo.carried import GENERATION, carried_by, end_tokens


class FusionTreeConfig(PreTrainedConfig):
    """A spec as a config. What tools ask of configs (vocab_size, hidden_size, num_hidden_layers) is read off it.

    Args:
        spec: a spec, or its YAML. It is kept as text: transformers sorts what it writes, and the order of branches
            means something.
        seed: of the starting weights of a model that is not loaded.
    """

    model_type = "fusiontree"

    def __init__(self, spec: ModelSpec | str | None = None, seed: int = 0, **options: Any) -> None:
        self.spec, self.seed = spec.to_yaml() if isinstance(spec, ModelSpec) else spec, seed
        if self.spec is not None:  # transformers makes empty configs to compare with
            parsed = ModelSpec.from_yaml(self.spec)
            self.vocab_size, self.hidden_size = parsed.vocab_size, parsed.width
            self.num_hidden_layers = len(parsed.expanded_layers())
            options = {"tie_word_embeddings": parsed.head.tied, **options}
            if parsed.longest is not None:
                self.max_position_embeddings = parsed.longest
        super().__init__(**options)


class FusionTreeCache(TransformersCache):
    """Our cache behind the little that `generate` asks of one."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.cache: Cache | None = None
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns the model has seen, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row continue another one."""
        if self.cache is not None:
            self.cache.select(beam_idx)


class FusionTreeForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` as transformers wants one; parameters are below `model.` under their own paths."""

    config: FusionTreeConfig
    config_class = FusionTreeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = [Layer.__name__]
    _is_stateful = True

    def __init__(self, config: FusionTreeConfig) -> None:
        super().__init__(config)
        if config.spec is None:
            raise FusionTreeError("spec: the config holds none")
        self.model = LanguageModel(ModelSpec.from_yaml(config.spec))
        if next(self.model.parameters()).device.type != "meta":
            initialise(self.model, config.seed)
        self.post_init()

    @classmethod
    def from_directory(cls, directory: Path | str, **options: Any) -> "FusionTreeForCausalLM":
        """The model in a directory of ours; `options` are those of `fusiontree.load`.

        Raises:
            FusionTreeError: see `fusiontree.load`; or a `generation_config.json` there cannot be read.
        """
        loaded = weights.load(directory, **options)
        with torch.device("meta"):
            config = FusionTreeConfig(loaded.spec, dtype=loaded.embedding.weight.dtype, **carried_by(loaded.spec))
            model = cls(config)
        model.model = loaded
        model.generation_config = _generation(Path(directory), model)
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, where it has a weight of its own."""
        return self.model.head if self.model.head.weight is not None else None

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Keep the inputs of layers alone."""
        self.model.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything."""
        self.model.checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers run again for their gradients."""
        return self.model.checkpointing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FusionTreeCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with `labels` (which are shifted here) the mean cross entropy.

        Args:
            input_ids: [batch, time].
            attention_mask: [batch, columns], those that the cache has seen included; 0 is padding, anywhere.
            position_ids: where there is neither mask nor cache, a new document begins at each 0.
            past_key_values: from the call before; an empty one is made where there is none and `use_cache`.
            logits_to_keep: only of the last positions; 0 is all.

        Raises:
            FusionTreeError: `inputs_embeds`, or another cache than ours.
        """
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise FusionTreeError("inputs_embeds: models of FusionTree read input_ids")
        memory = self._memory(past_key_values, use_cache, len(input_ids))
        documents = _documents(input_ids, attention_mask, position_ids if memory is None else None)
        positions = position_ids if documents is None or attention_mask is not None else None
        features = self.model.features(
            input_ids, positions=positions, documents=documents, cache=None if memory is None else memory.cache
        )
        if memory is not None:
            memory.columns += input_ids.shape[1]
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(features[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=memory)  # pyright: ignore

    def _memory(self, given: Any, wanted: bool | None, rows: int) -> FusionTreeCache | None:
        """The cache to use, made for its first call."""
        if given is None and not wanted:
            return None
        found = FusionTreeCache() if given is None else given
        if not isinstance(found, FusionTreeCache):
            raise FusionTreeError(f"past_key_values: a FusionTreeCache is needed, found {type(found).__name__}")
        if found.cache is None:
            found.cache = self.model.new_cache(rows)
        return found

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: recurrent states have no place in transformers' own."""
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = FusionTreeCache()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: values are drawn from (seed, path) as the model is made."""


def _generation(directory: Path, model: FusionTreeForCausalLM) -> GenerationConfig:
    """How a model in a directory of ours generates: what a file there says, else its config, else the end of bytes."""
    if (directory / GENERATION).is_file():
        ends = end_tokens(directory, model.model.spec)
        try:
            found = GenerationConfig.from_pretrained(directory)
        except Exception as error:  # whatever it is, the file says it
            raise FusionTreeError(f"{directory / GENERATION}: cannot be read: {error}") from None
        if found.eos_token_id is None and ends:
            found.eos_token_id = ends
        return found
    if model.config.vocab_size == ByteTokenizer.vocab_size and not tokenizer_files(directory):
        return GenerationConfig(**byte_tokenizer()[GENERATION])
    return model.generation_config


def _documents(tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Our document ids: -1 at padding; where there is no mask, a document for each position 0."""
    if mask is not None:
        real = mask[:, -tokens.shape[1] :].bool()
        return None if bool(real.all()) else real.long() - 1
    if positions is None:
        return None
    begins = positions.expand_as(tokens) == 0
    return None if int(begins.sum()) <= len(tokens) else begins.long().cumsum(1)


def tokenizer_of(directory: Path | str, spec: ModelSpec) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory of ours: that whose files stand there, else that of bytes.

    Raises:
        FusionTreeError: there is none and the vocabulary is not that of bytes, the files cannot be read, or the
            tokenizer has more tokens than the model.
    """
    found = _tokenizer(Path(directory))
    if found is None and spec.vocab_size != ByteTokenizer.vocab_size:
        text = f"holds no tokenizer, and {spec.vocab_size} tokens are not the {ByteTokenizer.vocab_size} of bytes"
        raise FusionTreeError(f"{directory}: {text}")
    tokenizer = found or byte_level()
    if len(tokenizer) > spec.vocab_size:
        text = f"has {len(tokenizer)} tokens, the model has {spec.vocab_size}"
        raise FusionTreeError(f"{directory}: the tokenizer {text}")
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """`ByteTokenizer` as one of transformers."""
    files = byte_tokenizer()
    found = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    return PreTrainedTokenizerFast(tokenizer_object=found, **files["tokenizer_config.json"])


def _tokenizer(directory: Path) -> Any:
    """What the files of a directory say; None where there are none."""
    names = {file.name for file in tokenizer_files(directory)}
    try:
        if "tokenizer_config.json" in names:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if "tokenizer.json" in names:
            return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    except Exception as error:  # whatever it is, one of these files says it
        raise FusionTreeError(f"{directory}: its tokenizer cannot be read: {error}") from None
    return None


AutoConfig.register(FusionTreeConfig.model_type, FusionTreeConfig)
AutoModelForCausalLM.register(FusionTreeConfig, FusionTreeForCausalLM)
