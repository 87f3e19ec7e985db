"""Any spec as a model of transformers. Importing it registers `fusiontree` with AutoConfig and AutoModelForCausalLM.

>>> import fusiontree.zoo.hf
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("DIRECTORY")  # doctest: +SKIP
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from transformers.modeling_outputs import CausalLMOutputWithPast

from fusiontree.core.contracts.modules import Module
from fusiontree.core.model import weights
from fusiontree.core.model.chunked_loss import NO_LABEL
from fusiontree.core.model.initialise import own, start
from fusiontree.core.model.layer import Layer
from fusiontree.core.model.model import LanguageModel
from fusiontree.core.model.spec import ModelSpec
from fusiontree.data.file_tokenizer import FileTokenizer
from fusiontree.data.tokenizer import ByteTokenizer
from fusiontree.data.tokenizer_files import byte_tokenizer, tokenizer_files
from fusiontree.errors import FusionTreeError
from fusiontree.zoo.carried import GENERATION, carried_by, end_tokens
from fusiontree.zoo.hf_cache import FusionTreeCache
from fusiontree.zoo.hf_inputs import FLATTENED, LOSS, check_options, counted_labels, documents_of


class FusionTreeConfig(PreTrainedConfig):
    """A spec as a config. The fields that tools need (vocab_size, hidden_size, num_hidden_layers) are copied from it.

    Args:
        spec: a spec, or its YAML. It is kept as text, because transformers sorts the keys that it writes and the order
            of branches has a meaning.
        seed: the seed for drawing weights that no checkpoint gives.
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


class FusionTreeForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` with the interface of transformers; its parameters have `model.` in front of their names."""

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
        spec = ModelSpec.from_yaml(config.spec)
        _check_overrides(config, spec)
        self.model = LanguageModel(spec)
        self.post_init()

    @classmethod
    def from_directory(cls, directory: Path | str, **options: Any) -> "FusionTreeForCausalLM":
        """Loads a FusionTree directory; `options` are the options of `fusiontree.load`.

        Raises:
            FusionTreeError: see `fusiontree.load`; or its `generation_config.json` cannot be read.
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

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding by another of the same size."""
        if value is self.model.embedding:
            return
        plain = isinstance(value, nn.Embedding) and value.max_norm is None and not value.scale_grad_by_freq
        if not plain or value.weight.shape != self.model.embedding.weight.shape:
            size = list(self.model.embedding.weight.shape)
            raise FusionTreeError(f"set_input_embeddings: expected a plain nn.Embedding {size}, found {value}")
        self.model.embedding = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module | None:
        """The head if it has its own weight; None if it is tied."""
        return self.model.head if self.model.head.weight is not None else None

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Give the head, which must not be tied, the weight and the bias of a linear map."""
        head, weight = self.model.head, getattr(new_embeddings, "weight", None)
        bias = getattr(new_embeddings, "bias", None)
        if new_embeddings is head:
            return
        if head.weight is None or weight is None or (bias is None) != (head.bias is None):
            have = "a tied head has no weight of its own" if head.weight is None else f"the head is {head.spec}"
            raise FusionTreeError(f"set_output_embeddings: {have}, found {new_embeddings}")
        if weight.shape != self.model.embedding.weight.shape:
            found = f"{list(weight.shape)}, the embedding is {list(self.model.embedding.weight.shape)}"
            raise FusionTreeError(f"set_output_embeddings: found {found}; `resize_token_embeddings` changes both")
        head.weight, head.bias = weight, bias

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """Resize as transformers does, and update the spec. New rows are drawn around the mean of the old rows."""
        found = super().resize_token_embeddings(*args, **options)
        count, head = len(self.model.embedding.weight), self.model.head
        if count != self.model.spec.vocab_size:
            spec = self.model.spec.replace({"vocab_size": count})
            self.model.spec, self.config.spec = spec, spec.to_yaml()
        if head.bias is not None and len(head.bias) != count:  # of a tied head; the bias of new tokens is 0
            kept = head.bias.data[:count]
            head.bias = nn.Parameter(F.pad(kept, (0, count - len(kept))), requires_grad=head.bias.requires_grad)
        return found

    def _get_resized_lm_head(self, old_lm_head: nn.Module, *args: Any, **options: Any) -> nn.Linear:
        """Resize the head's weight and bias as if the head were a linear map."""
        vocab_size, width = self.model.head.weight.shape  # pyright: ignore[reportOptionalMemberAccess]
        linear = nn.Linear(width, vocab_size, bias=False, device="meta")
        linear.weight, linear.bias = old_lm_head.weight, old_lm_head.bias  # pyright: ignore
        return super()._get_resized_lm_head(linear, *args, **options)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only the inputs of layers, and run layers again for gradients. `use_reentrant` has no effect.

        Raises:
            FusionTreeError: an option has another value than its default, or is unknown.
        """
        given = {**(gradient_checkpointing_kwargs or {}), "every_n_layers": every_n_layers, "offload": offload}
        allowed = {"use_reentrant": (True, False), "every_n_layers": (1,), "offload": (False,)}
        for name, value in given.items():
            if value not in allowed.get(name, (None,)):
                raise FusionTreeError(f"gradient checkpointing: {name}={value!r} cannot be: every layer runs again")
        self.model.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass."""
        self.model.checkpointing = False

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers run again for their gradients."""
        return self.model.checkpointing

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Returns logits and, if there are `labels` (which are shifted here), the mean cross entropy.

        Args:
            input_ids: [batch, time].
            attention_mask: [batch, columns], including the columns in the cache. 0 is padding, at any place;
                1, 2, 3, ... number the samples of a packed row.
            position_ids: without a cache, a new document begins at each 0.
            past_key_values: the cache of the previous call. If None and `use_cache`, an empty cache is made.
            labels: [batch, time]; labels of padding and of a document's first token do not count.
            logits_to_keep: the number of last positions to return logits for, or their indices; 0 means all.
            output_hidden_states: whether to return the input of each layer and, last, the input of the head.
            return_dict: False returns a tuple of the values that are not None.
            options: options of the loss, and the arguments of collators of packed samples (see `FLATTENED`).

        Raises:
            FusionTreeError: for `inputs_embeds`, attention weights, a cache that is not a `FusionTreeCache`, or an
                option that `forward` would have to ignore.
        """
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise FusionTreeError("inputs_embeds: models of FusionTree read input_ids")
        if self._wanted(output_attentions, "output_attentions"):
            raise FusionTreeError("output_attentions: attention weights are never made here")
        memory = self._memory(past_key_values, use_cache, len(input_ids))
        check_options(options, 0 if memory is None else memory.columns)
        documents, positions = self._placed(input_ids, attention_mask, position_ids, memory, options)
        states: list[Tensor] | None = [] if self._wanted(output_hidden_states, "output_hidden_states") else None
        features = self.model.features(
            input_ids,
            positions=positions,
            documents=documents,
            cache=None if memory is None else memory.cache,
            states=states,
        )
        if memory is not None:
            memory.columns += input_ids.shape[1]
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(features[:, kept])
        loss = self._loss(logits, labels, documents, options)
        found = CausalLMOutputWithPast(loss, logits, memory, None if states is None else tuple(states))  # pyright: ignore
        as_tuple = return_dict is False or (return_dict is None and not self.config.return_dict)
        return found.to_tuple() if as_tuple else found

    def _wanted(self, given: bool | None, name: str) -> bool:
        """The value of an argument, or of the config if the argument is None."""
        return bool(getattr(self.config, name, False) if given is None else given)

    @staticmethod
    def _placed(
        tokens: Tensor, mask: Tensor | None, positions: Tensor | None, memory: Any, options: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Documents and positions in the form that `LanguageModel.features` takes."""
        samples = options.get("seq_idx")
        if mask is None and positions is None and samples is None:
            found = next((name for name in FLATTENED if options.get(name) is not None), None)
            if found is not None:
                raise FusionTreeError(f"{found}: give `position_ids` that begin at 0 in each sample beside it")
            return None, None
        if positions is not None and positions.shape[:1] == (1,):
            positions = positions.expand(len(tokens), -1)
        documents = documents_of(tokens, mask, positions, samples, cached=memory is not None)
        return documents, positions

    def _loss(
        self, logits: Tensor, labels: Tensor | None, documents: Tensor | None, options: dict[str, Any]
    ) -> Tensor | None:
        options = {name: options[name] for name in LOSS if options.get(name) is not None}
        if labels is None and "shift_labels" not in options:
            return None
        given = options.get("shift_labels", labels)
        if given.shape != logits.shape[:2]:
            found = f"{list(given.shape)}, the logits are {list(logits.shape[:2])}"
            raise FusionTreeError(f"labels: found {found}; `logits_to_keep` is for no loss")
        labels = None if labels is None else counted_labels(labels, documents, options.get("ignore_index", NO_LABEL))
        return self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)

    def _memory(self, given: Any, wanted: bool | None, rows: int) -> FusionTreeCache | None:
        """The cache to use, if any; the first call makes its states."""
        if given is None and not wanted:
            return None
        found = FusionTreeCache() if given is None else given
        if not isinstance(found, FusionTreeCache):
            raise FusionTreeError(f"past_key_values: expected a FusionTreeCache, found {type(found).__name__}")
        if found.cache is None:
            found.cache, found.depth = self.model.new_cache(rows), len(self.model.layers)
        return found

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No: the default cache of transformers cannot hold recurrent states."""
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        kind = generation_config.cache_implementation
        if kind is not None:
            raise FusionTreeError(f"cache_implementation: found {kind!r}, our models have a cache of their own")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = FusionTreeCache()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters of a module that no checkpoint gave, from (seed, path) as `build` does. transformers
        calls it for each module, and for the rows that `resize_token_embeddings` adds."""
        if not isinstance(module, Module):
            super()._init_weights(module)
            return
        path = next(path for path, each in self.model.named_modules() if each is module)
        given = {name for name, tensor in own(module) if getattr(tensor, "_is_hf_initialized", False)}
        start(module, path, self.config.seed, but=given)


def _check_overrides(config: FusionTreeConfig, spec: ModelSpec) -> None:
    """Refuse a config whose copies of fields of the spec were changed: only the spec has an effect."""
    wanted = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": len(spec.expanded_layers()),
        "tie_word_embeddings": spec.head.tied,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            found = f"found {getattr(config, name)}, the spec says {value}"
            raise FusionTreeError(f"{name}: {found}; edit the spec (`ModelSpec.replace`), it is what is built")


def _generation(directory: Path, model: FusionTreeForCausalLM) -> GenerationConfig:
    """The generation config of a directory: its file; else, for bytes, the byte tokenizer's; else the model's."""
    if (directory / GENERATION).is_file():
        ends = end_tokens(directory, model.model.spec)
        try:
            found = GenerationConfig.from_pretrained(directory)
        except Exception as error:  # any error comes from the file
            raise FusionTreeError(f"{directory / GENERATION}: cannot be read: {error}") from None
        if found.eos_token_id is None and ends:
            found.eos_token_id = ends
        return found
    if model.config.vocab_size == ByteTokenizer.vocab_size and not tokenizer_files(directory):
        return GenerationConfig(**byte_tokenizer()[GENERATION])
    return model.generation_config


def tokenizer_of(directory: Path | str, spec: ModelSpec) -> PreTrainedTokenizerFast:
    """The tokenizer of a FusionTree directory: read from its files, else the byte tokenizer.

    Raises:
        FusionTreeError: there are no files and the vocabulary does not have the size of bytes, the files cannot be
            read, or the tokenizer has more tokens than the model.
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
    """`ByteTokenizer` as a tokenizer of transformers."""
    files = byte_tokenizer()
    found = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    return PreTrainedTokenizerFast(tokenizer_object=found, **files["tokenizer_config.json"])


def _tokenizer(directory: Path) -> Any:
    """The tokenizer in the files of a directory; None if there are no files."""
    names = {file.name for file in tokenizer_files(directory)}
    try:
        if "tokenizer_config.json" in names:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if "tokenizer.json" in names:
            return _with_special(FileTokenizer(directory))
    except FusionTreeError:
        raise
    except Exception as error:  # any error comes from one of these files
        raise FusionTreeError(f"{directory}: its tokenizer cannot be read: {error}") from None
    return None


def _with_special(read: FileTokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with its tokens for the start and the end of a text."""
    ids = {"bos_token": read.start, "eos_token": next(iter(read.ends), None)}
    names = {name: read.tokenizer.id_to_token(token) for name, token in ids.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=read.tokenizer, **names)


AutoConfig.register(FusionTreeConfig.model_type, FusionTreeConfig)
AutoModelForCausalLM.register(FusionTreeConfig, FusionTreeForCausalLM)
