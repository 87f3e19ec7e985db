"""Who imports torchtitan, and what happens without it."""

import ast
import subprocess
import sys
from pathlib import Path

import fusiontree

ROOT = Path(fusiontree.__file__).parent
TITAN = ROOT / "training" / "titan"
BLOCK = "import sys; sys.modules['torchtitan'] = None; "


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_only_titan_imports_torchtitan():
    users = {file for file in ROOT.rglob("*.py") if any(name.split(".")[0] == "torchtitan" for name in imported(file))}
    assert users
    assert all(TITAN in file.parents for file in users), users


def test_the_rest_of_training_needs_no_torchtitan():
    code = f"{BLOCK}import fusiontree.training, fusiontree.recipes.train, fusiontree.training.parallel"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_torchtitan_one_line_says_what_to_install(data, tmp_path):
    import training_runs as runs

    file = runs.write_run(tmp_path / "run.json", data)
    code = f"{BLOCK}from fusiontree.recipes.train import main; sys.exit(main([{str(file)!r}]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == (
        'error: training needs torchtitan, which is not installed: pip install "fusiontree[train]"\n'
    )
