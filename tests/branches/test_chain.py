"""A chain beside what its laws cover: one inside another, where features are wider than the stream."""

from fusiontree import ModelSpec
from fusiontree.testing import check_spec


def test_a_chain_of_other_features_reads_the_embedding_of_the_stream():
    inner = {
        "kind": "chain",
        "embedding": True,
        "norms": {"out": {}},
        "links": {"out": {"kind": "linear", "outputs": 8}},
    }
    outer = {"kind": "chain", "links": {"wide": {"kind": "linear", "outputs": 12}, "inner": inner}}
    spec = ModelSpec.model_validate({"vocab_size": 11, "width": 8, "layers": [{"mixer": outer}]})
    check_spec(spec)
