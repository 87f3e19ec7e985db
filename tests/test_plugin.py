"""The example plugin as an installed package: found by its entry points, lawful, trained and pruned.

Each test runs in a process of its own, so that no other test sees the plugin's kinds.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fusiontree
from fusiontree import ModelSpec, build
from fusiontree.core.contracts.fusion import fusions
from fusiontree.core.contracts.gate import gates
from fusiontree.core.contracts.node import branches
from fusiontree.errors import SpecError

HERE = Path(__file__).parent
PLUGIN = HERE.parent / "examples" / "plugin"
PACKAGE = "fusiontree_example_plugin"
KINDS = {"ema": branches, "sparsemax": gates, "difference": fusions}
SPEC = """
format: 1
vocab_size: 29
width: 16
encodings:
  time: {kind: srte_sincos}
layers:
  - mixer:
      kind: gated
      branches:
        average: {kind: ema, hidden: 24, encodings: [time]}
        attention: {kind: attention, heads: 2, kv_heads: 1, head_dim: 8}
      gate: {kind: sparsemax, granularity: channel}
    ffn: {kind: swiglu, hidden: 24}
  - mixer:
      kind: difference
      minus: average
      branches:
        attention: {kind: attention, heads: 2, kv_heads: 1, head_dim: 8, encodings: [time]}
        average: {kind: ema, hidden: 24}
      branch_norm: {}
"""


def install(site: Path, name: str, points: dict[str, dict[str, str]]) -> None:
    """What an installer leaves behind of a package's metadata."""
    folder = site / f"{name.replace('-', '_')}-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in kinds.items()) for group, kinds in points.items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the plugin in it, as its pyproject.toml describes it."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    install(tmp_path, project["name"], project["entry-points"])
    shutil.copytree(PLUGIN / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def inside(site: Path, function: Callable[[], object]) -> object:
    """What a function of this file returns in a process that has the folder on its path."""
    library = Path(fusiontree.__file__).parents[1]
    code = f"import json, test_plugin; print(json.dumps(test_plugin.{function.__name__}()))"
    path = os.pathsep.join(str(p) for p in (site, HERE, library))
    process = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def imported() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith(f"{PACKAGE}."))


def discovery() -> dict[str, object]:
    listed = {kind: kind in registry.names() for kind, registry in KINDS.items()}
    before = imported()
    mixer = {"kind": "ema", "hidden": 4}
    ModelSpec.model_validate({"vocab_size": 5, "width": 8, "layers": [{"mixer": mixer}]})
    return {"listed": listed, "before": before, "after": imported()}


def test_kinds_are_listed_unimported_and_imported_one_by_one(site):
    found = inside(site, discovery)
    assert found == {"listed": dict.fromkeys(KINDS, True), "before": [], "after": [f"{PACKAGE}.ema"]}


def schema() -> list[str]:
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(ModelSpec.model_json_schema())
    good = ModelSpec.from_yaml(SPEC).data()
    wrong = [("ema", "hidden"), ("difference", "minus"), ("sparsemax", "granularity")]
    assert not list(validator.iter_errors(good))
    text = json.dumps(good)
    return [kind for kind, key in wrong if list(validator.iter_errors(json.loads(text.replace(key, "no_such_key"))))]


def test_json_schema_knows_the_kinds_and_their_fields(site):
    assert inside(site, schema) == ["ema", "difference", "sparsemax"]


def laws() -> None:
    from fusiontree.testing import check

    torch.set_num_threads(1)
    for kind, registry in KINDS.items():
        check(registry.get(kind))  # which raises where one does not hold


def test_laws_hold(site):
    inside(site, laws)


def shrinking() -> list[str]:
    from fusiontree.training.decay import decayed

    names = decayed(build(ModelSpec.from_yaml(SPEC), device="meta"))
    return [name.removeprefix("layers.0.mixer.branches.average.") for name in names if ".0.mixer.branches.av" in name]


def test_states_do_not_decay(site):
    assert inside(site, shrinking) == ["x.weight", "gate.weight", "out.weight"]


def average_one_by_one(inputs: torch.Tensor, decay: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, marks in zip(inputs, segments.tolist(), strict=True):
        state, sums = torch.zeros_like(row[0]), []
        for t, value in enumerate(row):
            state = value if t and marks[t] != marks[t - 1] else decay * state + value
            sums.append(state)
        rows.append(torch.stack(sums))
    return torch.stack(rows)


def recurrence_errors() -> float:
    from fusiontree_example_plugin.ema import recurrence

    torch.manual_seed(0)
    worst = 0.0
    for time in (1, 2, 3, 8, 13, 64, 65):
        inputs = torch.randn(2, time, 3, 2, dtype=torch.float64, requires_grad=True)
        decay = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
        segments = (torch.rand(2, time) < 0.2).long().cumsum(1)
        pair = [f(inputs, decay, segments) for f in (recurrence, average_one_by_one)]
        weights = torch.randn_like(inputs)
        grads = [
            torch.autograd.grad((y * weights).sum(), (inputs, decay), allow_unused=True, materialize_grads=True)
            for y in pair
        ]
        differences = [pair[0] - pair[1], *(a - b for a, b in zip(*grads, strict=True))]
        worst = max(worst, *(float(d.abs().max()) for d in differences))
    return worst


def test_recurrence_is_the_loop_over_time_with_gradients(site):
    error = inside(site, recurrence_errors)
    assert isinstance(error, float)
    assert error < 1e-12


def simplex() -> dict[str, float]:
    """p is the nearest point of the simplex to z if and only if (p - z) . (q - p) >= 0 at every corner q."""
    from fusiontree_example_plugin.sparsemax import sparsemax

    z = 2 * torch.randn(4, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = sparsemax(z)
    corners = (p - z) - ((p - z) * p).sum(0)
    closed = sparsemax(torch.cat([z, torch.full_like(z[:1], -torch.inf)]))
    return {
        "sum": float((p.sum(0) - 1).abs().max()),
        "lowest": float(p.min()),
        "slope": float(corners.min()),
        "closed": float((closed[:4] - p).abs().max()) + float(closed[4].abs().max()),
        "zeros": float((p == 0).double().mean()),
    }


def test_sparsemax_is_the_nearest_point_of_the_simplex(site):
    found = inside(site, simplex)
    assert isinstance(found, dict)
    assert found["sum"] < 1e-12
    assert found["lowest"] == 0
    assert found["slope"] > -1e-12
    assert found["closed"] < 1e-12
    assert found["zeros"] > 0.1


def training() -> list[float]:
    torch.set_num_threads(1)
    model = build(ModelSpec.from_yaml(SPEC))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(60).reshape(2, 30).square() % 29
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_loss_falls(site):
    losses = inside(site, training)
    assert isinstance(losses, list)
    assert losses[-1] < losses[0] / 4


def pruning() -> dict[str, list[str]]:
    from fusiontree.pruning import apply, plan_by_hand, verify

    torch.set_num_threads(1)
    model = build(ModelSpec.from_yaml(SPEC), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    left = {}
    for mixer in ("layers.0.mixer", "layers.1.mixer"):
        for branch in ("average", "attention"):
            plan = plan_by_hand(model.spec, [f"{mixer}.branches.{branch}"])
            pruned = apply(model, plan)
            verify(model, pruned, plan)
            left[f"{mixer}.{branch}"] = [n for n in pruned.state_dict() if n.startswith((f"{mixer}.sc", f"{mixer}.ga"))]
    return left


def test_pruned_models_are_the_dropped_ones_and_keep_only_what_they_need(site):
    assert inside(site, pruning) == {
        "layers.0.mixer.average": [],
        "layers.0.mixer.attention": [],
        "layers.1.mixer.average": [],
        "layers.1.mixer.attention": ["layers.1.mixer.scale"],
    }


def refusals() -> dict[str, str]:
    found = {}
    for kind in ("ema", "broken"):
        try:
            branches.get(kind)
        except SpecError as error:
            found[kind] = str(error)
    return found | {"difference": fusions.get("difference").__name__, "names": " ".join(branches.names())}


def test_rivals_and_broken_plugins_fail_when_used_and_only_then(site):
    install(site, "rival", {"fusiontree.branch": {"ema": "rival:Average", "broken": "no_such_module:Broken"}})
    found = inside(site, refusals)
    assert isinstance(found, dict)
    assert found["ema"] == (
        f"several packages offer the branch 'ema': {PACKAGE}.ema:Ema of fusiontree-example-plugin "
        "and rival:Average of rival"
    )
    assert found["broken"].startswith("the plugin of branch 'broken' (no_such_module:Broken) failed: ModuleNotFound")
    assert found["difference"] == "Difference"
    assert {"attention", "broken", "ema", "mamba2"} <= set(found["names"].split())


def test_without_the_plugin_the_error_names_the_path_and_the_kind():
    with pytest.raises(SpecError, match=r"^layers\.0\.mixer\.branches\.average\.kind: no node is called 'ema'"):
        ModelSpec.from_yaml(SPEC)
