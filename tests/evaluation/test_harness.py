"""lm-evaluation-harness: exported, native and in any batch the same numbers, which are those of the model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

import fusiontree as ft
import fusiontree.zoo.hf
from fusiontree.errors import FusionTreeError
from fusiontree.evaluation.harness import FusionTreeLM, evaluate
from fusiontree.testing.subject import randomised
from fusiontree.zoo import family_of
from fusiontree.zoo.directory import export_model

torch.set_num_threads(1)
PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "window": 30, "encodings": ["rope"]}
MAMBA = {"kind": "mamba2", "heads": 4, "head_dim": 8, "state": 8}
MIXER = {"kind": "gated", "branches": {"mamba": MAMBA, "attention": ATTENTION}, "gate": {"kind": "sigmoid"}}
SPEC = {
    "vocab_size": 257,
    "width": 32,
    "encodings": {"rope": {"kind": "rope"}},
    "layers": [{"repeat": 2, "layers": [{"mixer": MIXER, "ffn": {"kind": "swiglu", "hidden": 48}}]}],
    "head": {"tied": False, "bias": True},
}
CONTINUE = """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["zzzz"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the page makes, a model of ours, and the same exported; everything runs from there."""
    folder = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        (folder / "tasks").mkdir()
        for text in [*re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL), CONTINUE]:
            (folder / "tasks" / f"{text.split()[1]}.yaml").write_text(text)
        code = re.search(r"```python\n(import json.*?)```", PAGE, re.DOTALL)
        assert code is not None
        exec(code[1], {})
        rows = (folder / "choice.jsonl").read_text().splitlines()
        (folder / "choice.jsonl").write_text("\n".join(rows[:9]) + "\n")
        model = randomised(ft.build(ft.ModelSpec.parse(SPEC)), 0).eval()
        with torch.no_grad():
            model.head.bias[256] += 2.5  # so that some generation ends
        ft.save(model, folder / "ours")
        export_model(folder / "ours", folder / "theirs", family_of("fusiontree"))
        yield folder


def numbers(found: Any) -> dict[str, float]:
    """Metrics by task and name, standard errors left out."""
    return {
        f"{task}.{name}": float(value)
        for task, results in found["results"].items()
        for name, value in results.items()
        if "," in name and "stderr" not in name
    }


def as_hf(directory: str, **options: Any) -> dict[str, float]:
    """lm-eval's own class, in lm-eval's own way."""
    manager = TaskManager(include_path="tasks", include_defaults=False)
    options = {"task_manager": manager, "device": "cpu", "log_samples": False, **options}
    return numbers(simple_evaluate("hf", {"pretrained": directory}, tasks=["text", "choice", "continue"], **options))


def log_probability(model: ft.LanguageModel, before: list[int], text: bytes) -> float:
    """Of a text behind tokens; of all at once, by the definition."""
    tokens = torch.tensor([[*before, *text]])
    with torch.no_grad():
        found = model(tokens).log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])
    return float(found[len(before) - 1 :].double().sum())


def prompts() -> list[str]:
    return [json.loads(line)["prompt"] for line in Path("choice.jsonl").read_text().splitlines()]


def test_exported_and_native_alone_and_in_batches_give_the_same_numbers(folder):
    found = [numbers(evaluate("ours", ["tasks"], batch_size=size)) for size in (1, 4)]
    found += [as_hf("theirs", batch_size=size) for size in (1, 4)]
    assert found[0].keys() == {"text.bits_per_byte,none", "text.byte_perplexity,none"} | {
        *("choice.acc,none", "choice.acc_norm,none", "continue.exact_match,none")
    }
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert 0 < found[0]["choice.acc,none"] < 1


def test_perplexity_is_that_of_the_model(folder):
    model = ft.load("ours")
    texts = [json.loads(line)["text"].encode() for line in Path("text.jsonl").read_text().splitlines()]
    expected = sum(log_probability(model, [256], text) for text in texts) / sum(map(len, texts))
    found = numbers(evaluate("ours", "tasks/text.yaml", max_length=10_000))
    assert found["text.bits_per_byte,none"] == pytest.approx(-expected / math.log(2), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_continuations_have_the_model_s_probability(folder, batch_size):
    model = ft.load("ours")
    pairs = [(prompt, text) for prompt in ("", "h\u00e9", *prompts()) for text in ("x", "yz  ", "\u00e9<|end|>")]
    found = FusionTreeLM("ours", batch_size=batch_size).loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    wanted = [log_probability(model, [*prompt.encode()] or [256], text.encode()) for prompt, text in moved(pairs)]
    assert [value for value, _ in found] == pytest.approx(wanted, rel=1e-5)


def moved(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Spaces at a prompt's end belong to what follows: lm-eval's rule."""
    return [(prompt.rstrip(), prompt[len(prompt.rstrip()) :] + text) for prompt, text in pairs]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_ours_and_stops_at_the_end_token(folder, batch_size):
    model, texts = ft.load("ours"), [prompt.strip() for prompt in prompts()]
    alone = model.generate([list(text.encode()) for text in texts], max_new_tokens=12, stop=[256])
    ended = [256 in row for row in alone]
    assert any(ended) and not all(ended)
    expected = [
        bytes(token for token in row[len(text.encode()) :] if token != 256).decode(errors="replace")
        for text, row in zip(texts, alone, strict=True)
    ]
    requests = [SimpleNamespace(args=(text, {"until": ["zzzz"], "max_gen_toks": 12})) for text in texts]
    assert FusionTreeLM("ours", batch_size=batch_size).generate_until(requests) == expected


def test_a_learned_encoding_bounds_the_window(folder, tmp_path):
    spec = ft.ModelSpec.parse(SPEC).replace({"encodings.rope": {"kind": "srte_learned", "max_length": 40}})
    ft.save(ft.build(spec), tmp_path / "short")
    model = FusionTreeLM(str(tmp_path / "short"))
    assert model.max_length == 40
    assert numbers(evaluate(tmp_path / "short", ["tasks/text.yaml"], batch_size=4))["text.bits_per_byte,none"] > 0


def test_the_command_line_prints_the_same(folder):
    words = [sys.executable, "-m", "fusiontree.cli", "eval", "ours", "--tasks", "tasks", "--batch-size", "4", "--json"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "git" not in done.stderr  # nor does lm-eval look for a repository
    data = json.loads(done.stdout)
    assert numbers(data) == pytest.approx(numbers(evaluate("ours", ["tasks"])), rel=1e-5)
    assert data["model"]["digest"] == ft.load_spec("ours").digest()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("task: a\nprocess_docs: !function os.system", "the tag '!function' is not plain data"),
        ("task: a\ninclude: ../b.yaml", "include: tasks in files are plain data"),
        ("task: a\nclass: os.PathLike", "class: tasks in files are plain data"),
        (CONTINUE.replace("dataset_path: json", "dataset_path: pandas"), "pandas reads pickles"),
        (CONTINUE.replace("{metric: exact_match}", "acc"), "metric_list: unknown 'acc'"),
        ("task: a\nuse_prompt: ../b.yaml:c", "use_prompt: tasks in files are plain data"),
        (CONTINUE.replace("exact_match", "./evil"), "metric_list: unknown './evil'"),
        (CONTINUE.replace("exact_match", "acc, hf_evaluate: true"), "metric_list: unknown 'acc'"),
        (CONTINUE.replace("{{prompt}}", "{{ ''.__class__.__mro__ }}"), "SecurityError"),
        (CONTINUE.replace("{{prompt}}", "{{ ''|attr('__class__') }}"), "attr"),
        ("dataset_path: json", "not a task, it names none under the key 'task'"),
        ("task: a\ndataset_path: json\ncolour: red", "unexpected keyword argument 'colour'"),
        (CONTINUE.replace("choice.jsonl", "absent.jsonl"), "Unable to find"),
        (CONTINUE.replace("{{prompt}}", "{{promt}}"), "'promt' is undefined"),
        (CONTINUE.replace("test_split: test", "test_split: tset"), "'tset'"),
    ],
)
def test_a_bad_task_is_one_line_that_names_its_file(folder, tmp_path, text, line):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(FusionTreeError) as caught:
        evaluate("ours", [tmp_path / "bad.yaml"])
    assert str(caught.value).startswith(f"{tmp_path / 'bad.yaml'}: ")
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("helaswag", "helaswag: neither a file nor a task of lm-eval, did you mean 'hellaswag'"),
        ("absent.yaml", "absent.yaml: No such file"),
        ("ours", "ours/spec.yaml: not a task"),
        ("theirs", "theirs: holds no task"),
    ],
)
def test_places_without_tasks_are_one_line(folder, task, line):
    with pytest.raises(FusionTreeError, match=line):
        evaluate("ours", [task])


@pytest.mark.parametrize("task", ["choice.yaml", "continue.yaml"])
def test_logits_that_say_nothing_are_not_scored(folder, monkeypatch, task):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ft.LanguageModel, "logits", lambda self, x: torch.full((*x.shape[:-1], 257), torch.nan))
    with pytest.raises(FusionTreeError, match=r"lm-eval: the largest logit of a token is not finite in float32"):
        evaluate("ours", [f"tasks/{task}"], limit=1)
