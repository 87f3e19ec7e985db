"""What a config says beside the function comes back on export, through every edit; generation ends where it says."""

import json

import pytest
import torch
import transformers

import fusiontree as ft
from fusiontree.cli.exchange import import_
from fusiontree.cli.runs import generate
from fusiontree.data.tokenizer_files import write_byte_tokenizer
from fusiontree.errors import FusionTreeError
from fusiontree.pruning import Plan, apply, simplify
from fusiontree.zoo import FAMILIES, family_of
from fusiontree.zoo.carried import CARRIED, carried_by, end_tokens
from fusiontree.zoo.directory import export_model, import_model
from fusiontree.zoo.hf import FusionTreeForCausalLM

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BESIDE = {"max_position_embeddings": 131072, "bos_token_id": 3, "eos_token_id": [7, 9], "pad_token_id": 0}
BESIDE |= {"initializer_range": 0.041666666666666664, "attention_dropout": 0.1}


def llama(folder, vocabulary=61, **options):
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=4, vocab_size=vocabulary, **options)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carried")
    import_model(llama(folder / "theirs", **BESIDE), folder / "ours")
    return folder / "ours"


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def back(ours, tmp_path, family):
    """What export writes."""
    export_model(ours, tmp_path / family, family_of(family))
    return config_of(tmp_path / family)


@pytest.mark.parametrize("family", ["llama", "fusiontree"])
def test_export_says_it_again(ours, tmp_path, family):
    found = back(ours, tmp_path, family)
    assert {key: found[key] for key in BESIDE} == BESIDE


def test_it_takes_no_part_in_equality_and_survives_edits_and_our_own_class(ours, tmp_path):
    spec = ft.load(ours).spec
    edited = spec.replace({"layers.1.ffn": {"kind": "swiglu", "hidden": 48}})
    assert edited == ft.ModelSpec.parse({**spec.data(), "lineage": []})
    assert carried_by(edited) == BESIDE
    export_model(ours, tmp_path / "hf", family_of("fusiontree"))
    again = import_model(tmp_path / "hf", tmp_path / "again")
    assert [entry.edit for entry in again.lineage] == ["imported from llama", "imported from fusiontree"]
    assert carried_by(again) == BESIDE


def test_a_pruned_model_keeps_it(ours, tmp_path):
    model = ft.load(ours)
    plan = Plan(spec=model.spec.digest(), drops=("layers.1.ffn",))
    assert carried_by(simplify(apply(model, plan))[0].spec) == BESIDE


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"fusiontree"}))
def test_keys_are_those_that_no_family_reads_as_a_part_of_the_function(name):
    """Else an edited spec would be exported with what its first config said."""
    config = transformers.AutoConfig.for_model(name).to_dict()
    family = family_of(name)
    spec = family.spec_of(config)
    changed = {key: 17 for key in CARRIED if key in config}
    assert family.spec_of(config | changed) == spec
    assert not set(CARRIED) & {key for key, value in family.config_of(spec).items() if value is not None}


def test_a_length_by_another_name_is_the_longest_text_too():
    lineage = [{"parent": "0", "edit": "imported", "config": {"model_max_length": 1048576}}]
    spec = ft.load_spec("tiny-llama").model_copy(
        update={"lineage": tuple(ft.core.model.spec.Lineage.parse(each) for each in lineage)}
    )
    assert carried_by(spec) == {"max_position_embeddings": 1048576, "model_max_length": 1048576}
    assert carried_by(ft.load_spec("tiny-llama")) == {}


@pytest.mark.parametrize(
    ("key", "value"), [("eos_token_id", "</s>"), ("max_position_embeddings", {}), ("bos_token_id", [1.5])]
)
def test_other_types_are_one_line(tmp_path, key, value):
    folder = llama(tmp_path / "theirs")
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {key: value}))
    with pytest.raises(FusionTreeError) as caught:
        import_model(folder, tmp_path / "ours")
    assert f"config.{key}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_the_class_of_transformers_stops_where_the_files_say(ours, tmp_path):
    model = FusionTreeForCausalLM.from_directory(ours)
    assert model.generation_config.eos_token_id == [7, 9]
    assert model.config.max_position_embeddings == 131072
    (ours / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "temperature": 0.6, "do_sample": True}))
    found = FusionTreeForCausalLM.from_directory(ours).generation_config
    assert (found.eos_token_id, found.temperature, found.do_sample) == (5, 0.6, True)
    (ours / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert FusionTreeForCausalLM.from_directory(ours).generation_config.eos_token_id == [7, 9]
    (ours / "generation_config.json").unlink()
    assert FusionTreeForCausalLM.from_directory(ours).generation_config.eos_token_id == [7, 9]


def test_generation_ends_there(ours):
    model = FusionTreeForCausalLM.from_directory(ours)
    model.model.head.weight.data[7] = 100 * model.model.embedding.weight.data[11]
    found = model.generate(torch.tensor([[11]]), do_sample=False, max_new_tokens=8)
    assert found.shape[1] < 9
    assert int(found[0, -1]) in (7, 9)


def test_bytes_end_with_their_end(tmp_path):
    ft.save(ft.build(ft.load_spec("tiny-llama")), tmp_path / "ours")
    assert FusionTreeForCausalLM.from_directory(tmp_path / "ours").generation_config.eos_token_id == 256


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "generation_config.json: not JSON"),
        ("[]", "generation_config.json: expected an object, found list"),
        ('{"eos_token_id": "</s>"}', "eos_token_id: expected tokens below 61, found '</s>'"),
        ('{"eos_token_id": [7, 61]}', "eos_token_id: expected tokens below 61, found 61"),
    ],
)
def test_a_generation_config_that_cannot_be_read_is_one_line(ours, text, line):
    (ours / "generation_config.json").write_text(text)
    for read in (FusionTreeForCausalLM.from_directory, lambda place: end_tokens(place, ft.load(place).spec)):
        with pytest.raises(FusionTreeError) as caught:
            read(ours)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
    (ours / "generation_config.json").unlink()


def test_the_command_line_imports_says_what_it_leaves_and_ends_where_the_files_say(tmp_path, capsysbinary):
    folder = llama(tmp_path / "theirs", vocabulary=257)
    write_byte_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(257))}))
    (folder / "README.md").touch()
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {"novel": 1}))
    with pytest.raises(FusionTreeError, match=r"novel: llama is not known to have it, found 1.*--ignore novel"):
        import_(folder, tmp_path / "ours")
    import_(folder, tmp_path / "ours", ignore=["novel"])
    said = capsysbinary.readouterr().out.decode()
    assert "not read and not carried along: README.md" in said
    assert "imported from llama, passing over the config's novel" in said
    generate(tmp_path / "ours", "ab", max_new_tokens=9, seed=1)
    written = capsysbinary.readouterr().out.decode()
    assert written.startswith("ab") and len(written) <= len("ab?\n")  # a byte that is no UTF-8 is written as U+FFFD
