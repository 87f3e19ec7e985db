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
FLOORS = (
    {"errors", "files", "compiling"},
    {"machine"},
    {"products", "core.spec"},
    {"kernels", "core.contracts"},
    {"core.probes", "components"},
    {"branches", "fusions", "gates", "encodings", "core.model"},
    {"data", "bench", "doctor", "reference"},
    {"zoo"},
    {"evaluation"},
    {"training"},
    {"pruning", "recipes"},
    {"testing"},
    {"cli"},
)
"""The rooms of the house: each imports from floors below its own, annotations included."""
COMPONENTS = ("branches", "fusions", "gates", "encodings")
KIT = {"components", "kernels"}
"""All that the file of a component imports of the library, beside files of its own package."""
NEVER = {
    "core.model": {"kernels"},
    "core.probes": {"kernels"},
    "data": {"core.model", "core.contracts"},
    "training": {"pruning"},
}
"""Rooms that stand lower and are none of a room's business."""
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


MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sorted(ROOT.rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): file for name, file in MODULES.items() if name != "__init__"}


@cache
def imports(file: Path, *, annotations: bool = True) -> tuple[str, ...]:
    """The dotted names that a file imports anywhere, inside functions too, and where asked for type checkers alone."""
    return tuple(_imports(ast.parse(file.read_text(encoding="utf-8")), annotations))


def _imports(tree: ast.AST, annotations: bool) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not annotations:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ast.unparse(node)}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from _imports(node, annotations)


def uses(module: str) -> set[str]:
    """The modules of the library that one imports."""
    found = set()
    for name in imports(MODULES[module]):
        package, _, rest = name.partition(".")
        while package == "fusiontree" and rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]
        if package == "fusiontree" and rest and rest != module:
            found.add(rest)
    return found


def room(module: str) -> str:
    """The room of a module: a package, one of the core's packages, or a file that stands alone."""
    return ".".join(module.split(".")[: 2 if module.startswith("core.") else 1])


FLOOR = {name: height for height, rooms in enumerate(FLOORS) for name in rooms}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "core"])
def test_imports_point_down(module: str) -> None:
    here = room(module)
    for used in uses(module):
        there = room(used)
        assert there == here or FLOOR[there] < FLOOR[here], f"{module} imports {used}"
        assert there not in NEVER.get(here, ()), f"{module} imports {used}"


def test_no_modules_import_each_other() -> None:
    left = {module: uses(module) for module in MODULES}
    while left:
        free = {module for module, used in left.items() if not used & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {module: used for module, used in left.items() if module not in free}


@pytest.mark.parametrize("package", COMPONENTS)
def test_components_need_the_kit_and_kernels_alone(package: str) -> None:
    for module in MODULES:
        if room(module) == package:
            assert {room(used) for used in uses(module)} <= KIT | {package}, module


@pytest.mark.parametrize("file", sorted((ROOT.parent / "examples").rglob("plugin/**/*.py")), ids=lambda file: file.name)
def test_a_plugin_needs_what_is_public(file: Path) -> None:
    used = {name.split(".")[1] for name in imports(file) if name.startswith("fusiontree.")}
    assert used <= KIT | set(COMPONENTS), file


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_stay_in_their_place(package: str) -> None:
    for file in sorted(ROOT.rglob("*.py")):
        place = file.relative_to(ROOT).as_posix()
        if not place.startswith(ONLY_IN[package]):
            assert package not in {name.split(".")[0] for name in imports(file, annotations=False)}, place


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
