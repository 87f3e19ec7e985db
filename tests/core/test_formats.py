"""Files of weights that older versions wrote: `format_1/` was, when attention's windowed and global heads had one map
(its logits are beside it, as that version computed them)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusiontree import load, save
from fusiontree.errors import WeightsError

OLD = Path(__file__).parent / "format_1"
TOKENS = torch.arange(11)[None]


def metadata(directory):
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return file.metadata()


def test_format_1_gives_the_logits_that_it_gave(tmp_path):
    model, wanted = load(OLD), load_file(OLD / "logits.safetensors")["logits"]
    assert metadata(OLD) == {"format": "pt"}
    torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-5, atol=1e-5)
    save(model, tmp_path / "new")
    assert metadata(tmp_path / "new") == {"format": "pt", "weights": "2"}
    assert torch.equal(load(tmp_path / "new")(TOKENS), model(TOKENS))


def test_rows_go_to_the_heads_that_they_were_of():
    packed, model = load_file(OLD / "model.safetensors"), load(OLD)
    for path in ("layers.0.mixer", "shared.block"):
        q, v = (model.get_submodule(f"{path}.{name}") for name in ("q", "v"))
        assert torch.equal(
            torch.cat([q["windowed_heads"].weight, q["global_heads"].weight]), packed[f"{path}.q.weight"]
        )
        assert [v["windowed_heads"].bias.tolist(), v["global_heads"].bias.tolist()] == [
            packed[f"{path}.v.bias"][:4].tolist(),
            packed[f"{path}.v.bias"][4:].tolist(),
        ]


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(OLD, tmp_path / "model", ignore=shutil.ignore_patterns("logits*"))
    return tmp_path / "model"


def rewrite(directory, edit, numbers=None):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt", **(numbers or {})})


@pytest.mark.parametrize(
    ("edit", "numbers", "text"),
    [
        (lambda t: None, {"weights": "3"}, "format: expected 1 or 2, found '3'; a newer FusionTree wrote it"),
        (
            lambda t: None,
            {"weights": ""},
            "model.safetensors: the number of the weights' format: expected 1 or 2, found ''",
        ),
        (lambda t: None, {"weights": "two"}, "expected 1 or 2, found 'two'"),
        (lambda t: None, {"weights": "2"}, "tensor 'shared.block.q.windowed_heads.weight' is missing"),
        (
            lambda t: t.update({"layers.0.mixer.q.bias": torch.ones(23)}),
            {},
            "'layers.0.mixer.q.bias' has the shape (23,), the spec says (24,)",
        ),
        (
            lambda t: t.update({"layers.0.mixer.q.global_heads.weight": torch.ones(8, 16)}),
            {},
            "'layers.0.mixer.q.weight' of format 1 and 'layers.0.mixer.q.global_heads.weight', which stands for it now",
        ),
        (lambda t: t.pop("layers.0.mixer.k.weight"), {}, "'layers.0.mixer.k.windowed_heads.weight' is missing"),
    ],
)
def test_what_is_no_such_file_is_refused(copied, edit, numbers, text):
    rewrite(copied, edit, numbers)
    with pytest.raises(WeightsError) as caught:
        load(copied)
    assert text in str(caught.value)


def test_new_names_without_a_number_are_as_other_tools_write_them(tmp_path):
    save(load(OLD), tmp_path / "new")
    rewrite(tmp_path / "new", lambda tensors: None)
    assert torch.equal(load(tmp_path / "new")(TOKENS), load(OLD)(TOKENS))


def test_equal_weights_are_equal_files_whoever_writes_them(tmp_path):
    code = f"from fusiontree import load, save; import sys; save(load({str(OLD)!r}), sys.argv[1])"
    for name in "abc":
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}) == 1
