"""The command line: every verb, its exit codes, and one line for bad input."""

import json
import subprocess
import sys

import pytest
import torch
from command_line import fusiontree
from tokenizers import Tokenizer, models, pre_tokenizers

import fusiontree as ft
from fusiontree.cli.doctor import _lines, _same_answers
from fusiontree.core.probes.gate_statistics import Observation
from fusiontree.kernels import OPS
from fusiontree.pruning import Evidence
from fusiontree.recipes.train import load_run

SMALL = """
vocab_size: 257
width: 16
layers:
  - repeat: 2
    layers:
      - mixer:
          kind: gated
          branches:
            a: {kind: mlp, hidden: 8}
            b: {kind: attention, heads: 2, kv_heads: 1, head_dim: 8, window: 4}
          gate: {kind: sigmoid, granularity: channel}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A spec file, a saved model and gate statistics."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(SMALL)
    model = ft.build(ft.load_spec(folder / "small.yaml"))
    ft.save(model, folder / "model")
    learned = model.spec.replace({"encodings.time": {"kind": "srte_learned", "max_length": 8}})
    ft.save(ft.build(learned), folder / "learned")
    with model.observe() as observation:
        model(torch.randint(0, 256, (1, 9)))
    assert isinstance(observation, Observation)
    evidence = Evidence.from_observation(observation, model.spec, steps_seen=600)
    (folder / "gates.json").write_text(json.dumps(evidence.data()))
    return folder


def test_show_counts_what_is_built(folder):
    done = fusiontree("show", folder / "small.yaml", "layers.*.mixer.gate.granularity=token", "--length", 9, "--json")
    data = json.loads(done.stdout)
    spec = ft.load_spec(folder / "small.yaml").replace({"layers.*.mixer.gate.granularity": "token"})
    assert data["digest"] == spec.digest()
    assert data["nodes"][0]["parameters"] == sum(p.numel() for p in ft.build(spec, device="meta").parameters())
    text = fusiontree("show", folder / "small.yaml").stdout
    assert "layers.0 to 1" in text
    assert "attention" in text


def test_kinds_schema_validate_doctor(folder):
    kinds = json.loads(fusiontree("kinds", "--json").stdout)
    assert {"family": "branch", "kind": "mamba2"}.items() <= next(k for k in kinds if k["kind"] == "mamba2").items()
    assert "mamba2" in fusiontree("schema").stdout
    assert ft.load_spec(folder / "small.yaml").digest() in fusiontree("validate", folder / "small.yaml").stdout
    report = json.loads(fusiontree("doctor", "--json").stdout)
    assert {row["op"] for row in report["kernels"]} == set(OPS)
    assert all(row["picked"] for row in report["kernels"])
    assert {"mamba-ssm", "fla-core", "flash-attn-4", "triton"} <= set(report["packages"])
    assert report["device"]["threads"] > 0 and "matrix_units" in report["device"]


def test_kinds_say_what_a_field_is():
    assert "of the map that makes dt (dt_rank)" in fusiontree("kinds", "mamba1").stdout.replace("`", "")


def test_doctor_says_once_what_holds_for_several():
    row = {"op": "ssd", "picked": "a", "others": {"b": "too old", "c": "too slow", "d": "too old"}}
    assert _lines(row) == (("a", "serves"), ("b, d", "too old"), ("c", "too slow"))
    calls = [{**row, "request": request} for request in ("training", "decoding")] + [{**row, "op": "x", "request": "y"}]
    assert [(op, said) for (op, _), said in _same_answers(calls)] == [("ssd", ["training", "decoding"]), ("x", ["y"])]
    text = fusiontree("doctor").stdout
    assert "kernels: what serves" in text and "\nssd: training" in text


def test_generate_equals_the_library(folder):
    words = ["generate", str(folder / "model"), "ab", "--max-new-tokens", "5", "--temperature", "0"]
    done = subprocess.run([sys.executable, "-m", "fusiontree.cli", *words], capture_output=True, check=True)
    rows = ft.load(folder / "model").generate([list(b"ab")], max_new_tokens=5, stop=[256])
    assert done.stdout == bytes(token for token in rows[0] if token != 256) + b"\n"


def test_prune_end_to_end(folder):
    plan, pruned = folder / "plan.json", folder / "pruned"
    done = fusiontree(
        "prune", "plan", folder / "model", plan, "count=1", "--gates", folder / "gates.json", "--policy", "topk"
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(plan.read_text())["drops"]) == 1
    changes = json.loads(fusiontree("prune", "diff", folder / "model", plan, "--json").stdout)
    assert changes["saved"]["parameters"][1] < changes["saved"]["parameters"][0]
    assert fusiontree("prune", "apply", folder / "model", plan, pruned).returncode == 0
    assert "pruned equals dropped" in fusiontree("prune", "verify", folder / "model", pruned, plan).stdout
    assert fusiontree("prune", "simplify", pruned, folder / "simple").returncode == 0
    x = torch.randint(0, 256, (1, 9))
    assert torch.allclose(ft.load(pruned)(x), ft.load(folder / "simple")(x), atol=1e-6)
    assert json.loads((folder / "simple" / "paths.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["validate", "quickstrat"], "did you mean 'quickstart'"),
        (
            ["validate", "quickstart", "layers.0.mixer.branches.mamba.stat=3"],
            "the nearest is 'layers.0.mixer.branches.mamba.state'",
        ),
        (
            ["validate", "quickstart", "layers.0.mixer.branches.attention.window=0"],
            "layers.0.mixer.branches.attention.window",
        ),
        (["validate", "quickstart", "width"], "an override is path=value"),
        (["shw", "quickstart"], "Did you mean 'show'"),
        (["show"], "model"),
        (["show", "no/such.yaml"], "no/such.yaml"),
        (["generate", "no/such", "x"], "not a model of ours"),
        (["prune", "plan", "{folder}/model", "{folder}/p.json"], "--gates"),
        (
            ["prune", "plan", "{folder}/model", "{folder}/p.json", "--drop", "layers.0.mixer.branches.z"],
            "nothing there can be dropped",
        ),
        (
            [
                "prune",
                "plan",
                "{folder}/model",
                "{folder}/p.json",
                "--gates",
                "{folder}/gates.json",
                "--policy",
                "treshold",
            ],
            "did you mean 'threshold'",
        ),
        (
            ["prune", "plan", "{folder}/model", "{folder}/p.json", "hihg=1", "--gates", "{folder}/gates.json"],
            "did you mean 'high'",
        ),
        (["prune", "apply", "{folder}/model", "{folder}/gates.json", "{folder}/out"], "gates.json"),
        (["train", "no/such.yaml"], "no/such.yaml"),
        (["eval", "{folder}/model", "--tasks", "no/such.yaml"], "no/such.yaml"),
        (["import", "{folder}", "{folder}/out"], "it has no config.json"),
        (["export", "{folder}/model", "{folder}/out", "--to", "lama"], "did you mean 'llama'"),
        (["export", "{folder}/model", "{folder}/out", "--to", "llama"], "llama has swiglu, found only gated"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder, arguments, said):
    done = fusiontree(*[argument.format(folder=folder) for argument in arguments])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (folder / "p.json").exists()
    assert not (folder / "out").exists()


def test_models_go_out_and_come_back(folder):
    done = fusiontree("export", folder / "model", folder / "theirs", "--to", "hf")
    assert (done.returncode, done.stdout) == (0, f"written to {folder / 'theirs'}\n")
    assert json.loads((folder / "theirs" / "config.json").read_text())["model_type"] == "fusiontree"
    done = fusiontree("import", folder / "theirs", folder / "back")
    digest = ft.load_spec(folder / "small.yaml").digest()
    assert done.stdout == f"imported from fusiontree, digest {digest}, written to {folder / 'back'}\n"
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("model", "back")]
    assert weights[0] == weights[1]


def test_generate_takes_any_bytes(folder):
    words = [sys.executable, "-m", "fusiontree.cli", "generate", str(folder / "model")]
    options = ["--max-new-tokens", "1", "--top-k", "99999999999999999999999"]
    named = subprocess.run([*words, b"a\xff", *options], capture_output=True, check=True).stdout
    piped = subprocess.run([*words, "-", *options], input=b"a\xff", capture_output=True, check=True).stdout
    assert named == piped
    assert named.startswith(b"a\xff")


def test_generate_reads_the_tokenizer_beside_a_model(folder, tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    model = ft.build(ft.load_spec(folder / "small.yaml").replace({"vocab_size": 3}))
    ft.save(model, tmp_path / "model", beside=[tmp_path / "tokenizer.json"])
    done = fusiontree("generate", tmp_path / "model", "a b", "--max-new-tokens", 3, "--temperature", 0)
    (row,) = model.generate([[0, 1]], max_new_tokens=3)
    assert (done.returncode, done.stdout) == (0, words.decode(row) + "\n")
    assert fusiontree("generate", tmp_path / "model", "a", "--stop", "").returncode == 2


def test_a_model_whose_encoding_is_short_can_be_pruned(folder):
    plan, pruned = folder / "short.json", folder / "short"
    drop = ["--drop", "layers.0.mixer.branches.b"]
    assert fusiontree("prune", "plan", folder / "learned", plan, *drop).returncode == 0
    done = fusiontree("prune", "apply", folder / "learned", plan, pruned)
    assert done.returncode == 0, done.stderr


def test_a_model_without_layers_is_shown(folder):
    (folder / "bare.yaml").write_text("{vocab_size: 257, width: 8, layers: []}")
    done = fusiontree("show", folder / "bare.yaml")
    assert done.returncode == 0, done.stderr
    assert "embedding" in done.stdout


def test_what_goes_to_a_file_is_not_wrapped(folder):
    plan = folder / "wide.json"
    fusiontree("prune", "plan", folder / "model", plan, "--drop", "layers.0.mixer.branches.b")
    lines = fusiontree("prune", "diff", folder / "model", plan).stdout.splitlines()
    assert max(map(len, lines)) > 80, lines
    assert all(line.startswith(("- ", "~ ", "parameters", "FLOPs", "cache")) for line in lines)


def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fusiontree.cli", "kinds"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device\n"


def test_validate_says_all_that_is_wrong_and_others_the_first(tmp_path):
    (tmp_path / "bad.yaml").write_text(SMALL.replace("width:", "widht:").replace("heads: 2", "heads: two"))
    done = fusiontree("validate", tmp_path / "bad.yaml")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and all(line.startswith(f"error: {tmp_path / 'bad.yaml'}: ") for line in lines)
    assert [line.split(": ")[2] for line in lines] == ["widht", "width", "layers.0.mixer.branches.b.heads"]
    done = fusiontree("show", tmp_path / "bad.yaml")
    assert (done.returncode, done.stderr) == (2, f"{lines[0]} (and 2 more)\n")


def test_validate_reads_run_files(tmp_path):
    (tmp_path / "run.yaml").write_text("{model: quickstart, training: {stepz: 3, rows: 0}}")
    done = fusiontree("validate", "--run", tmp_path / "run.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 5
    assert "training.stepz: unknown key" in done.stderr and "training.rows: expected a number" in done.stderr
    done = fusiontree("validate", "--run", "quickstart", "training.steps=3")
    digest = load_run("quickstart", ["training.steps=3"]).digest()
    assert (done.returncode, done.stdout) == (0, f"valid, digest {digest}\n")


def test_a_run_file_where_a_spec_is_wanted_and_the_reverse(folder, tmp_path):
    (tmp_path / "run.yaml").write_text("{model: quickstart, training: {steps: 3, rows: 1}}")
    said = fusiontree("validate", tmp_path / "run.yaml").stderr
    assert "model: unknown key of a spec; run files have it (fusiontree validate --run FILE)\n" in said
    said = fusiontree("validate", "--run", folder / "small.yaml").stderr
    assert "width: unknown key of a run file; specs have it, and a run file names its spec (model: PATH)\n" in said


def test_nothing_at_all_is_the_help():
    done = fusiontree()
    assert done.returncode == 2
    assert "Usage" in done.stdout + done.stderr
    assert "error:" not in done.stderr
