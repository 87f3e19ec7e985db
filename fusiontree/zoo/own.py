"""Our own class in transformers (`fusiontree.zoo.hf`): its config holds the spec, in YAML; every spec has one."""

from collections.abc import Iterator
from typing import Any

from fusiontree.core.model.model import build
from fusiontree.core.model.spec import ModelSpec
from fusiontree.zoo.family import Family, Reader, register
from fusiontree.zoo.options import Options
from fusiontree.zoo.tensors import Renamed


@register
class Own(Family):
    """Any spec."""

    name = "fusiontree"
    architecture = "FusionTreeForCausalLM"

    def spec(self, options: Options) -> dict[str, Any]:
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "seed"):
            options.get(key, None)  # read off the spec
        return ModelSpec.from_yaml(options["spec"]).data(short=True)

    def config(self, reader: Reader) -> dict[str, Any]:
        spec = reader.spec
        sizes = {"hidden_size": spec.width, "num_hidden_layers": len(reader.layers), "vocab_size": spec.vocab_size}
        return {"spec": spec.to_yaml(), "tie_word_embeddings": spec.head.tied, **sizes}

    def tensors(self, spec: ModelSpec) -> Iterator[Renamed]:
        yield from (Renamed(f"model.{name}", (name,)) for name in build(spec, device="meta").state_dict())
