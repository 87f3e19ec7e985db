"""What families share that have gated delta rules in some layers and attention in the others."""

from collections.abc import Callable
from typing import Any

from fusiontree.branches import GatedDelta
from fusiontree.core.model.layers import MAX_LAYERS
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import parts
from fusiontree.zoo.family import Reader
from fusiontree.zoo.options import Options

LINEAR, FULL = "linear_attention", "full_attention"


def last_of(period: int) -> Callable[[int], bool]:
    """Returns a test of a layer's index: whether the layer is the last of its period."""
    return lambda index: index % period == period - 1


def attends(options: Options, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer has attention; `default` decides from the index if the config has no `layer_types`.

    At most MAX_LAYERS + 1 layers get a default: one layer too many is enough for the spec to be refused.

    Raises:
        FusionTreeError: `layer_types` is not a list with one known kind per layer.
    """
    layers = min(options.count("num_hidden_layers"), MAX_LAYERS + 1)
    kinds = options.get("layer_types", None)
    if kinds is None:
        return [default(index) for index in range(layers)]
    if not isinstance(kinds, list) or any(kind not in (LINEAR, FULL) for kind in kinds):
        text = f"expected a list of {LINEAR!r} and {FULL!r}, found {kinds!r:.80}"
        raise FusionTreeError(f"config.json: layer_types: {text}")
    if layers <= MAX_LAYERS and len(kinds) != layers:
        text = f"{len(kinds)} are given, num_hidden_layers says {layers}"
        raise FusionTreeError(f"config.json: layer_types: {text}")
    return [kind == FULL for kind in kinds]


def layer_types(reader: Reader) -> list[str]:
    """The reverse of `attends`."""
    return [LINEAR if isinstance(layer.mixer, GatedDelta) else FULL for layer in reader.layers]


def mixer(options: Options) -> dict[str, Any]:
    """The sizes of a gated delta rule."""
    return {
        "kind": "gated_delta",
        "heads": options.count("linear_num_value_heads"),
        "key_heads": options.count("linear_num_key_heads"),
        "head_dim": options.count("linear_key_head_dim"),
        "value_dim": options.count("linear_value_head_dim"),
        "conv": options["linear_conv_kernel_dim"],
    }


def mixer_of(found: Any) -> dict[str, Any]:
    """The reverse of `mixer`, from a `GatedDelta`; {} for None."""
    if found is None:
        return {}
    return {
        "linear_num_value_heads": found.heads,
        "linear_num_key_heads": found.key_heads,
        "linear_key_head_dim": found.head_dim,
        "linear_value_head_dim": found.value_dim or found.head_dim,
        "linear_conv_kernel_dim": found.conv,
    }


def rows(node: GatedDelta) -> dict[str, int]:
    """The number of rows of each of our maps."""
    keys, values = node.key_heads * node.head_dim, node.heads * (node.value_dim or node.head_dim)
    return {"q": keys, "k": keys, "v": values, "z": values, "beta": node.heads, "dt": node.heads}


def attention_of(found: Any) -> dict[str, Any]:
    """The options for the sizes and the bias of an `Attention`; {} for None."""
    return {**parts.attention_sizes(found), "attention_bias": found.bias} if found else {}
