"""Whole configs as they were published, and as transformers writes them: all are read, whatever else they say; a key
that could matter is refused by name."""

import json
from pathlib import Path

import pytest
import transformers

from fusiontree.core.spec import yaml
from fusiontree.errors import FusionTreeError
from fusiontree.zoo import FAMILIES, family_of
from fusiontree.zoo.directory import read_config
from fusiontree.zoo.presets import load_spec, presets

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*.json"))
SOURCES = yaml.read_file(CONFIGS / "sources.yaml")
PUBLIC = FAMILIES.keys() - {"fusiontree"}


def read(name, folder):
    """A file as import reads it."""
    (folder / "config.json").write_bytes((CONFIGS / f"{name}.json").read_bytes())
    return read_config(folder)


def written(config, folder):
    """What transformers writes of a config: the whole of it, and what differs from the class's defaults."""
    config.save_pretrained(folder)
    return [config.to_dict(), read_config(folder)]


def test_every_file_has_a_source_and_every_family_a_published_one_or_a_reason():
    assert sorted(SOURCES["files"]) == NAMES
    published = {name.split("/")[0] for name, source in SOURCES["files"].items() if source["model"]}
    assert published | SOURCES["without"].keys() == PUBLIC
    assert not published & SOURCES["without"].keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_published_config_is_read_and_says_what_transformers_makes_of_it(name, tmp_path):
    config = read(name, tmp_path)
    family = family_of(config["model_type"])
    spec = family.spec_of(config)
    theirs = transformers.AutoConfig.for_model(**json.loads((CONFIGS / f"{name}.json").read_text()))
    assert [family.spec_of(each) for each in written(theirs, tmp_path)] == [spec, spec]


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("/")[1] in presets()])
def test_a_preset_is_what_the_whole_config_says(name, tmp_path):
    config = read(name, tmp_path)
    assert family_of(config["model_type"]).spec_of(config) == load_spec(name.split("/")[1])


@pytest.mark.parametrize("family", sorted(PUBLIC))
def test_what_transformers_writes_for_a_class_of_its_own_defaults_is_read(family, tmp_path):
    found = [FAMILIES[family].spec_of(each) for each in written(transformers.AutoConfig.for_model(family), tmp_path)]
    assert found[0] == found[1]


LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"attention_sink": 4},
            "config.json: attention_sink: llama is not known to have it, found 4, did you mean 'attention_bias'? ",
        ),
        ({"attention_sink": 4}, "; if it changes nothing, pass over it with --ignore attention_sink (ignore=["),
        ({"_block_types": ["recurrent"]}, "_block_types: llama is not known to have it, found ['recurrent']"),
        ({"rope_parameters": {"high": 2}}, "rope_parameters.high: llama is not known to have it without a scaling"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "high": 2}},
            "pass over it with --ignore rope_parameters.high",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config: llama is not known to have it, found {'quant_method': 'fp8'}; quantised weights are"
            " not read, dequantise them first; if none are, pass over it with --ignore quantization_config",
        ),
    ],
    ids=str,
)
def test_a_key_that_could_matter_is_refused_with_the_way_to_pass_over_it(changes, line):
    with pytest.raises(FusionTreeError) as caught:
        family_of("llama").spec_of(LLAMA | changes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_to_be_ignored_are_passed_over_and_no_others():
    family, wanted = family_of("llama"), family_of("llama").spec_of(LLAMA)
    assert family.spec_of(LLAMA | {"attention_sink": 4, "other": 1}, ignore=["attention_sink", "other"]) == wanted
    assert family.spec_of(LLAMA | {"rope_parameters": {"high": 2}}, ignore=["rope_parameters.high"]) == wanted
    with pytest.raises(FusionTreeError, match="other: llama is not known to have it"):
        family.spec_of(LLAMA | {"attention_sink": 4, "other": 1}, ignore=["attention_sink"])


@pytest.mark.parametrize(
    ("ignore", "line"),
    [
        ("num_hidden_layers", "--ignore num_hidden_layers: llama knows it; only unknown keys can be ignored"),
        ("rope_parameters.factor", "--ignore rope_parameters.factor: llama knows it; only unknown keys can be ignored"),
        ("attention_sinks", "--ignore attention_sinks: config.json has no such key"),
    ],
)
def test_what_matters_or_is_not_there_cannot_be_ignored(ignore, line):
    config = LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(FusionTreeError) as caught:
        family_of("llama").spec_of(config, ignore=[ignore])
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("falcon_h1/falcon-h1-0.5b", {"mamba_use_mlp": False}, "mamba_use_mlp: found False"),
        ("llama/smollm2-135m", {"rope_interleaved": True}, "rope_interleaved: llama is not known to have it"),
        ("nemotron_h/nemotron-3-nano-30b-a3b", {"norm_eps": 1e-6}, "norm_eps: found 1e-06, nemotron_h is known with"),
        ("nemotron_h/nemotron-h-8b", {"attention_head_dim": 64}, "attention_head_dim: found 64"),
        ("gemma2/gemma-2-27b", {"sliding_window_size": 5}, "sliding_window_size: found 5, gemma2 is known with 4096"),
        ("mamba2/mamba-codestral-7b", {"intermediate_size": 4096}, "intermediate_size: found 4096, mamba2 is known"),
        ("mamba2/mamba-codestral-7b", {"rms_norm": False}, "rms_norm: found False"),
        ("recurrent_gemma/recurrentgemma-2b", {"_block_types": ["attention"]}, "_block_types: found ['attention']"),
    ],
    ids=str,
)
def test_what_is_said_twice_has_to_agree(name, changes, line, tmp_path):
    config = read(name, tmp_path) | changes
    with pytest.raises(FusionTreeError) as caught:
        family_of(config["model_type"]).spec_of(config)
    assert line in str(caught.value)
