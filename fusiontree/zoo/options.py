"""Reads the config.json of a model and refuses keys that nothing has read."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from fusiontree.encodings.rope import Rope
from fusiontree.encodings.rope_scaling import scalings, yarn_magnitude
from fusiontree.errors import FusionTreeError, suggest

ABOUT_OTHER_THINGS = frozenset(
    [
        *("_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
        *("_commit_hash", "_flash_attn_2_enabled", "_experts_implementation", "_experts_implementation_internal"),
        "is_llama_config",  # which of its own classes nanotron takes
        *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "auto_map", "name_or_path"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "use_cache", "pretraining_tp"),
        *("initializer_range", "rescale_prenorm_residual", "attn_implementation", "num_logits_to_keep"),
        *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "cache_implementation"),
        *("use_mamba_kernels", "use_mambapy", "use_falcon_mambapy", "use_associative_scan"),
        *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "is_encoder_decoder"),
    ]
)
"""Keys that do not change the function in evaluation."""
HINTS = {"quantization_config": "; quantised weights are not read, dequantise them first; if none are"}
"""The hint for an unknown key, in place of a suggestion of a similar key."""


class Options:
    """The fields of a config, with the defaults of the family's class for absent fields.

    The keys that a family reads are recorded. `finish` refuses keys that were not read, except keys to ignore. `last`
    is the key that was read last: the likely cause if reading fails.
    """

    def __init__(
        self, family: str, data: Mapping[str, Any], defaults: Mapping[str, Any], ignore: Iterable[str] = ()
    ) -> None:
        self.family, self._defaults = family, defaults
        self._data = {**defaults, **data}
        self._read: set[str] = set()
        self._ignore, self._passed = frozenset(ignore), set[str]()
        self.last = ""

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        if key not in self._data:
            raise FusionTreeError(f"config.json: {self.family} needs {key!r}{suggest(key, self._data)}")
        return self._data[key]

    def get(self, key: str, default: Any) -> Any:
        """A field, or the default where it is absent or null."""
        self._note(key)
        found = self._data.get(key)
        return default if found is None else found

    def _note(self, key: str) -> None:
        self._read.add(key)
        self.last = key

    def count(self, key: str, least: int = 1) -> int:
        """A field that is a count.

        Raises:
            FusionTreeError: it is not a whole number of at least `least`.
        """
        found = self[key]
        if type(found) is not int or found < least:
            text = f"config.json: {key}: expected a whole number of at least {least}, found {found!r:.60}"
            raise FusionTreeError(text)
        return found

    def number(self, key: str) -> float:
        """A field that is a positive number.

        Raises:
            FusionTreeError: it is not a finite number above 0.
        """
        found = self[key]
        if type(found) not in (int, float) or not 0 < found <= sys.float_info.max:
            raise FusionTreeError(f"config.json: {key}: expected a finite number above 0, found {found!r:.60}")
        return float(found)

    def places(self, key: str) -> frozenset[int]:
        """A set of layer indices; empty for null.

        Raises:
            FusionTreeError: the field is not a list of whole numbers.
        """
        found = self.get(key, ())
        if not isinstance(found, list | tuple) or any(type(index) is not int for index in found):
            raise FusionTreeError(f"config.json: {key}: expected a list of whole numbers, found {found!r:.60}")
        return frozenset(found)

    def words(self, key: str, meanings: Mapping[str, str]) -> list[str]:
        """The meaning of each word in a list with one word per layer; if all words are letters, the field is a text.

        Raises:
            FusionTreeError: the field is not a list or text, or has a word without a meaning.
        """
        found, letters = self[key], all(len(word) == 1 for word in meanings)
        if not isinstance(found, str if letters else list | tuple):
            form = "text" if letters else "list"
            raise FusionTreeError(f"config.json: {key}: expected a {form}, found {found!r:.60}")
        for word in found:
            if not isinstance(word, str) or word not in meanings:
                near = suggest(str(word), meanings)
                raise FusionTreeError(f"config.json: {key}: {self.family} knows no layer {word!r:.60}{near}")
        return [meanings[word] for word in found]

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a field with a value that is not in `allowed`; an absent or null field has the first value."""
        found = self.get(key, allowed[0])
        if found not in allowed:
            known = " or ".join(repr(value) for value in allowed)
            raise FusionTreeError(f"config.json: {key}: found {found!r}, {self.family} is known with {known}")

    def unknown(self, key: str, value: Any, known: Iterable[str], when: str = "") -> None:
        """Refuse a key that nothing has read, unless it is a key to ignore.

        Args:
            known: the keys to suggest from.
            when: the condition under which the key is unknown, for the message.

        Raises:
            FusionTreeError: the key is not to be ignored; says how to pass over it.
        """
        if key in self._ignore:
            self._passed.add(key)
            return
        text = f"config.json: {key}: {self.family} is not known to have it{when}, found {value!r:.60}"
        near = HINTS.get(key) or f"{suggest(key, known)}; if it changes nothing"
        raise FusionTreeError(f"{text}{near}, pass over it with --ignore {key} (ignore=[{key!r}] in Python)")

    def finish(self) -> None:
        """Refuse keys that were not read, unless null, false or empty, and keys to ignore that are known or absent."""
        for key, value in self._data.items():
            silent = value is None or value is False or value == [] or value == {}
            if key not in self._read | ABOUT_OTHER_THINGS and not silent:
                self.unknown(key, value, self._read)
        for key in sorted(self._ignore - self._passed - ABOUT_OTHER_THINGS):
            if key.partition(".")[0] not in self._data:
                raise FusionTreeError(f"--ignore {key}: config.json has no such key{suggest(key, self._data)}")
            raise FusionTreeError(f"--ignore {key}: {self.family} knows it; only unknown keys can be ignored")


def rope_theta(options: Options, default: float = 10000.0) -> dict[str, Any]:
    """The rotary encoding of a config, in the form of transformers 5 (`rope_parameters`) or the one before
    (`rope_theta` and `rope_scaling`)."""
    found = options.get("rope_parameters", None) or options.get("rope_scaling", None) or {}
    return rope(options, found, options.get("rope_theta", default))


def rope(options: Options, parameters: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The rotary encoding that one `rope_parameters` describes; `theta` is its default theta."""
    given = {key: value for key, value in parameters.items() if value is not None}
    names = given.pop("rope_type", None), given.pop("type", None)  # the older name; some configs have both
    kind = names[0] or names[1] or "default"
    encoding = {"kind": "rope", "theta": float(given.pop("rope_theta", theta))}
    if given.get(PART) == 1.0:
        del given[PART]
    if kind != "default":
        return encoding | {"scaling": {"kind": kind, **_scaling(options, kind, given)}}
    for key, value in given.items():
        options.unknown(f"rope_parameters.{key}", value, (), " without a scaling")
    return encoding


def partial_rope(options: Options, head_dim: int, part: float) -> dict[str, Any]:
    """As `rope_theta`, with `dim`: how many first channels of a head rotate. `part` is their default share."""
    found = options.get("rope_parameters", None) or options.get("rope_scaling", None) or {}
    part = found.get(PART, part)
    if type(part) not in (int, float) or not 0 < part <= 1:
        text = f"expected a number above 0, at most 1, found {part!r:.60}"
        raise FusionTreeError(f"config.json: rope_parameters.{PART}: {text}")
    dim = int(head_dim * part)
    whole = rope(options, {**found, PART: None}, options.get("rope_theta", 10000.0))
    return whole | {"dim": None if dim == head_dim else dim}


PART = "partial_rotary_factor"
ORIGINAL_LENGTH = "original_max_position_embeddings"


def _scaling(options: Options, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a scaling. The default of the original length is `max_position_embeddings`."""
    if kind not in scalings.names():
        known = " or ".join(repr(name) for name in ("default", *scalings.names()))
        text = f"found {kind!r}, {options.family} is known with {known}"
        raise FusionTreeError(f"config.json: rope_parameters.rope_type: {text}")
    if kind == "yarn":
        given = _without_mscale(given)
    if "original_length" in scalings.get(kind).model_fields:
        length = given.pop(ORIGINAL_LENGTH, None) or options["max_position_embeddings"]
        given = given | {"original_length": length}
    fields = scalings.get(kind).model_fields.keys()
    for key in given.keys() - fields:
        options.unknown(f"rope_parameters.{key}", given[key], fields, f" with {kind!r}")
    return {key: value for key, value in given.items() if key in fields}


def _without_mscale(given: dict[str, Any]) -> dict[str, Any]:
    """YaRN's fields, with `mscale` and `mscale_all_dim` as one attention factor (DeepSeek-V2, arXiv 2405.04434)."""
    rest = {key: value for key, value in given.items() if key not in ("mscale", "mscale_all_dim")}
    if given.get("mscale") and given.get("mscale_all_dim") and "factor" in given:
        above, below = (yarn_magnitude(given["factor"], given[key]) for key in ("mscale", "mscale_all_dim"))
        return {"attention_factor": above / below, **rest}
    return rest


def partial_parameters(found: Rope | None, head_dim: int) -> dict[str, Any]:
    """The reverse of `partial_rope`."""
    part = found.dim / head_dim if found and found.dim else 1.0
    if found and found.dim and int(head_dim * part) != found.dim:
        part = math.nextafter(part, 1.0)  # rounding must not lose a channel
    return rope_parameters(found) | {PART: part}


def rope_parameters(found: Rope | None, theta: float = 10000.0) -> dict[str, Any]:
    """The reverse of `rope`, in the form of transformers 5; `theta` is used if the spec has no rotation."""
    if found is None or found.scaling is None:
        return {"rope_type": "default", "rope_theta": found.theta if found else theta}
    given = {key: value for key, value in found.scaling.data().items() if value is not None}
    kind, length = given.pop("kind"), given.pop("original_length", None)
    original = {} if length is None else {ORIGINAL_LENGTH: length}
    return {"rope_type": kind, "rope_theta": found.theta, **original, **given}
