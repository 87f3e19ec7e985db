"""The three 130M presets, composed in Python; each equals its YAML. Run: python examples/compose.py"""

from fusiontree import LayerSpec, ModelSpec, Norm, Repeat, load_spec
from fusiontree.branches import Attention, Mamba2, SwiGLU
from fusiontree.core.spec.base import NamedMap, OrderedMap
from fusiontree.encodings import Rope, SrteSincos
from fusiontree.fusions import AlignSpec, ExchangeSpec, Gated, ProjectionSpec
from fusiontree.gates import Sigmoid

mixer = Gated(
    branches=NamedMap(
        mamba=Mamba2(encodings=("time",), heads=20, head_dim=64, state=128),
        attention=Attention(
            encodings=("time", "rope"),
            heads=16,
            kv_heads=4,
            head_dim=64,
            window=256,
            global_heads=4,
            global_kv_heads=1,
        ),
    ),
    branch_norm=Norm(gain="none"),
    align=AlignSpec(hidden=256),
    gate=Sigmoid(granularity="channel", rank=64),
    projection=ProjectionSpec(),
    mlp=SwiGLU(hidden=768),
)

v1 = ModelSpec(
    vocab_size=257,
    width=1024,
    encodings=NamedMap(time=SrteSincos(multiplier=0.1), rope=Rope()),
    layers=(Repeat(repeat=12, layers=(LayerSpec(mixer=mixer),)),),
)

# Windows that grow with depth: a repeat may vary anything inside its period.
windows = tuple(64 * 2 ** (layer // 2) for layer in range(12))
growing = OrderedMap({"0.mixer.branches.attention.window": windows})
v2 = v1.model_copy(update={"layers": (Repeat(repeat=12, layers=(LayerSpec(mixer=mixer),), vary=growing),)})

# Messages between the branches: an edit by path, as an ablation grid would make it.
v3 = v1.replace({"layers.*.mixer.exchange": ExchangeSpec(rank=16)})


def main() -> None:
    """Compare with the YAML and print digests."""
    for name, spec in {"v1": v1, "v2": v2, "v3": v3}.items():
        assert spec == load_spec(name), spec.diff(load_spec(name))
        print(f"{name}: digest {spec.digest()}, equal to its YAML")


if __name__ == "__main__":
    main()
