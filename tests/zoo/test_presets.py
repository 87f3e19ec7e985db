"""Presets of public models are their published configs, and have the sizes that their publishers state."""

import pytest
import torch
from published import PUBLISHED, TINY
from write_presets import MARKS, PAGE, SPECS, configs, table, text_of

import fusiontree as ft
from fusiontree.core.model.cost import costs
from fusiontree.core.spec import yaml
from fusiontree.zoo import FAMILIES, family_of
from fusiontree.zoo.presets import load_spec, presets

torch.set_num_threads(1)


def counted(parameters: int | float, like: str) -> str:
    """A number of parameters, rounded as another one is written."""
    digits = len(like.removesuffix("B").partition(".")[2])
    return f"{parameters / 1e9:.{digits}f}B"


def test_every_family_has_a_small_one_and_all_but_one_a_published_one():
    assert set(presets()) >= PUBLISHED.keys() | TINY.keys()
    families = FAMILIES.keys() - {"fusiontree"}
    assert {config["model_type"] for config in TINY.values()} == families
    # MiniMax-Text-01's config has a rotary_dim, which transformers' class does not read
    assert {found.config["model_type"] for found in PUBLISHED.values()} == families - {"minimax"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_built_has_the_published_size(name):
    found = PUBLISHED[name]
    parameters = costs(load_spec(name), length=1)[0].parameters
    if isinstance(found.parameters, int):
        assert parameters == found.parameters
    else:
        assert counted(parameters, found.parameters) == found.parameters


@pytest.mark.parametrize("name", [name for name, found in PUBLISHED.items() if found.cache])
def test_its_cache_has_the_published_size(name):
    assert PUBLISHED[name].cache is not None
    tokens, said, _ = PUBLISHED[name].cache
    size = costs(load_spec(name), length=tokens, dtype=torch.bfloat16)[0].cache_bytes
    assert (size if isinstance(said, int) else f"{size / 2**30:.0f} GB") == said


@pytest.mark.parametrize("name", configs())
def test_a_preset_is_what_its_family_reads_and_can_be_written_by_it(name):
    config, spec = configs()[name], load_spec(name)
    family = family_of(config["model_type"])
    assert spec == family.spec_of(config)
    assert family.spec_of(family.config_of(spec)) == spec
    assert (SPECS / f"{name}.yaml").read_text() == text_of(name, config)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_small_ones_are_small_and_run_on_bytes(name):
    model = ft.build(load_spec(name)).eval()
    assert model.spec.vocab_size == 257
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    tokens = torch.arange(2 * 37).reshape(2, 37) % 257
    cache = model.new_cache(2, 37)
    cut = torch.cat([model(part, cache=cache) for part in tokens.split([20, 17], 1)], 1)
    torch.testing.assert_close(cut, model(tokens), rtol=0, atol=1e-4)


def test_only_the_file_asked_for_is_read(monkeypatch):
    read, seen = yaml.read_file, []
    monkeypatch.setattr(yaml, "read_file", lambda path: (seen.append(path), read(path))[1])
    load_spec("jamba-1.5-mini")
    assert [path.name for path in seen] == ["jamba-1.5-mini.yaml"]


def test_the_page_shows_what_is_built():
    page = PAGE.read_text(encoding="utf-8")
    assert page.split(MARKS[0])[1].split(MARKS[1])[0].strip() == table()
