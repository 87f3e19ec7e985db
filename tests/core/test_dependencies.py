"""The core is light, and dependencies point one way (seen from outside: by importing, and by reading imports)."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fusiontree

ROOT = Path(fusiontree.__file__).parent
COMPONENTS = {"branches", "fusions", "gates", "encodings"}
ABOVE = {"training", "evaluation", "pruning", "recipes", "zoo", "cli", "doctor", "testing"}
MAY_USE: dict[str, set[str]] = {
    "errors": set(),
    "machine": {"errors"},
    "compiling": set(),
    "products": {"machine", "compiling"},
    "kernels": {"errors", "compiling", "machine", "products"},
    "core": {"errors", "compiling", "machine", "products"},
    **{name: {"core", "kernels", "errors", "products"} for name in sorted(COMPONENTS)},
    "bench": {"core", "kernels", "errors", "compiling", "machine"},
    "data": {"core", "errors"},
    "zoo": {"core", "errors", "data"} | COMPONENTS,
    "evaluation": {"core", "kernels", "errors", "data", "zoo"} | COMPONENTS,
    "training": {"core", "kernels", "errors", "compiling", "machine", "data", "zoo", "evaluation"} | COMPONENTS,
    "pruning": {"core", "kernels", "errors", "compiling", "data", "zoo", "evaluation", "training"} | COMPONENTS,
}
ONLY_IN = {
    "torchtitan": "training/titan/",
    "typer": "cli",
    "rich": "cli",
    "transformers": "zoo/hf",
    "tokenizers": ("zoo/hf.py", "data/file_tokenizer.py"),
    "lm_eval": "evaluation/harness.py",
    "mamba_ssm": "kernels/",
    "flash_attn": "kernels/",
    "xformers": "kernels/",
    "causal_conv1d": "kernels/",
    "fla": "kernels/",
}


@cache
def imports(file: Path) -> tuple[str, ...]:
    """The dotted names that a file imports anywhere, those for type checkers left out."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = {id(node) for branch in for_types for statement in branch.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py")) or [ROOT / f"{part}.py"]


@pytest.mark.parametrize(
    "part", [part for part in MAY_USE if (ROOT / part).is_dir() or (ROOT / f"{part}.py").is_file()]
)
def test_dependencies_point_one_way(part: str) -> None:
    for file in files(part):
        for name in imports(file):
            package, _, rest = name.partition(".")
            if package == "fusiontree":
                used = rest.split(".")[0]
                assert used in MAY_USE[part] | {part}, f"{file.relative_to(ROOT)} imports {name}"


def test_every_package_has_a_rule() -> None:
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert packages <= set(MAY_USE) | ABOVE


def test_the_rules_have_no_circle() -> None:
    left = {part: set(used) for part, used in MAY_USE.items()}
    while left:
        free = [part for part, used in left.items() if not used]
        assert free, f"a circle among {sorted(left)}"
        left = {part: used - set(free) for part, used in left.items() if part not in free}


def test_components_do_not_know_each_other() -> None:
    for part in COMPONENTS:
        for file in files(part):
            others = [name for name in imports(file) if name.split(".")[:1] == ["fusiontree"]]
            assert not [n for n in others if n.split(".")[1] in COMPONENTS - {part}], file


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_stay_in_their_place(package: str) -> None:
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT).as_posix()
        if not place.startswith(ONLY_IN[package]):
            assert package not in {name.split(".")[0] for name in imports(file)}, place


@pytest.mark.parametrize("name", ["pickle", "dill", "cloudpickle", "joblib"])
def test_nothing_pickles(name: str) -> None:
    files = set(ROOT.rglob("*.py")) - {ROOT / "testing" / "laws.py"}  # a law says that models can be
    assert not [file for file in files if name in {n.split(".")[0] for n in imports(file)}]


BLOCKED = (
    "torchtitan",
    "transformers",
    "matplotlib",
    "typer",
    "rich",
    "datasets",
    "tokenizers",
    "lm_eval",
    "tensorboard",
    "pytest",
)


def test_the_core_works_without_anything_heavy(tmp_path: Path) -> None:
    job = f"""
        import importlib.abc, sys

        class Blocker(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {BLOCKED!r}:
                    raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

        sys.meta_path.insert(0, Blocker())
        import fusiontree, torch
        torch.set_num_threads(1)
        edits = {{"width": 16, "layers.*.ffn": None, "layers.*.mixer.branches.mamba.state": 4}}
        spec = fusiontree.load_spec("quickstart").replace(edits)
        model = fusiontree.build(spec)
        with model.observe() as seen:
            model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
        assert seen
        fusiontree.save(model, {str(tmp_path / "m")!r})
        assert len(fusiontree.load({str(tmp_path / "m")!r}).generate([[1, 2]], max_new_tokens=2)[0]) == 4
        assert not [name for name in sys.modules if name.split(".")[0] in {BLOCKED!r}]
        print("works")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(job)], capture_output=True, text=True, check=False)
    assert done.stdout == "works\n", done.stderr
