"""What README and the documentation tell a reader to type, typed."""

import importlib
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import fusiontree

import fusiontree as fusiontree_package
from fusiontree.core.spec import yaml
from fusiontree.recipes.train import load_run
from fusiontree.zoo.presets import load_spec

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("[a-q]*.md")), *sorted((ROOT / "docs").glob("[s-z]*.md"))]
TEXT = {page.name: page.read_text() for page in PAGES}
CODE = [code for text in TEXT.values() for code in re.findall(r"`(fusiontree [^`\n]+)`|^(fusiontree .*)$", text, re.M)]
COMMANDS = sorted({shlex.join(shlex.split(one or other)) for one, other in CODE})
LOOKS = ("kinds", "show", "schema", "doctor")


def commands(*verbs: str) -> list[list[str]]:
    """The documented commands of these verbs, as words."""
    words = [shlex.split(command)[1:] for command in COMMANDS]
    return [line for line in words if line[0] in verbs and line not in (["show"], ["train"])]  # those are only named


def test_there_are_some():
    assert {line[0] for line in commands(*LOOKS, "train", "prune", "generate", "validate")} >= {
        *LOOKS,
        "train",
        "prune",
    }


@pytest.mark.parametrize("line", commands(*LOOKS), ids=" ".join)
def test_what_only_looks(line):
    done = fusiontree(*line)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", commands("train"), ids=" ".join)
def test_edits_of_a_run_are_valid(line, tmp_path):
    file = re.search(r"```yaml\n(format: 1\nmodel: quickstart.*?)```", TEXT["training.md"], re.DOTALL)
    assert file is not None
    (tmp_path / "run.yaml").write_text(file[1])
    name = "quickstart" if line[1] == "quickstart" else tmp_path / "run.yaml"
    assert load_run(name, [word for word in line[2:] if "=" in word and "DIR" not in word])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_a_clone_has(page):
    """The reference is made as the pages are built."""
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page.name]) if ":" not in link]
    absent = [link for link in links if link and not (page.parent / link).is_file()]
    assert not absent and not any(link.endswith("reference.md") for link in links)


def test_the_readme_s_model_runs(tmp_path, monkeypatch):
    spec, code = (re.search(rf"```{kind}\n(.*?)```", TEXT["README.md"], re.DOTALL) for kind in ("yaml", "python"))
    assert spec is not None and code is not None
    (tmp_path / "spec.yaml").write_text(spec[1])
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(code[1], found)
    logits = found["logits"]
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 8, 257)


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(format: 1\nvocab.*?)```", TEXT["concepts.md"], re.DOTALL))
def test_specs_are_valid(text):
    assert load_spec("quickstart").parse(yaml.read(text)).digest()


@pytest.mark.parametrize("symbol", re.findall(r"`(fusiontree\.[\w.]+)`", TEXT["index.md"].partition("## Where is")[2]))
def test_where_things_are_said_to_be(symbol):
    assert located(symbol)


ENTRIES = re.findall(r"\.\. auto\w+:: ([\w.]+)\n(?:   :members: (.+)\n)?", TEXT["api.md"])


@pytest.mark.parametrize(("symbol", "members"), ENTRIES, ids=[symbol for symbol, _ in ENTRIES])
def test_the_reference_names_what_there_is(symbol, members):
    part = located(symbol)
    for name in filter(None, members.split(", ")):
        assert hasattr(part, name), f"{symbol}.{name}"


def located(symbol):
    """The module, class or function of a dotted name, from the library on."""
    names, found = symbol.removeprefix("fusiontree.").split("."), importlib.import_module("fusiontree")
    for depth, name in enumerate(names, 1):
        if not hasattr(found, name):
            importlib.import_module(".".join(["fusiontree", *names[:depth]]))
        found = getattr(found, name)
    return found


def undocumented(cls: type) -> list[str]:
    """The public methods of a class that override nothing and say nothing of themselves."""
    inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
    own = {name: getattr(each, "fget", None) or getattr(each, "__func__", each) for name, each in vars(cls).items()}
    written = {name: each for name, each in own.items() if inspect.isfunction(each) and each.__name__ == name}
    return [name for name, each in written.items() if name[0] != "_" and name not in inherited and not each.__doc__]


def test_a_method_is_described_where_it_first_stands():
    """What overrides a method needs no docstring, since pages inherit it."""
    names = [module.name for module in pkgutil.walk_packages(fusiontree_package.__path__, "fusiontree.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    classes = {cls for module in modules for cls in vars(module).values() if inspect.isclass(cls)}
    ours = {cls for cls in classes if cls.__module__.startswith("fusiontree.") and cls.__name__[0] != "_"}
    assert len(ours) > 300
    assert {f"{cls.__module__}.{cls.__qualname__}": undocumented(cls) for cls in ours if undocumented(cls)} == {}
