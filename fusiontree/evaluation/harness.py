"""Runs EleutherAI's lm-evaluation-harness (the extra `eval`) on FusionTree models, from their directories.

Importing this registers `fusiontree` in lm-eval: `simple_evaluate("fusiontree", {"pretrained": DIRECTORY}, tasks)`.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.api.metrics  # noqa: F401  # registers them
from jinja2 import Environment
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import evaluator, utils
from lm_eval.api.registry import metric_registry, register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn

from fusiontree.core.model.model import LanguageModel
from fusiontree.core.spec import yaml
from fusiontree.errors import FusionTreeError, suggest
from fusiontree.zoo.hf import FusionTreeForCausalLM, tokenizer_of

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast

Base: Any = HFLM
"""Typed as Any, because a decorator of HFLM hides its type from type checkers."""


class FusionTreeLM(Base):
    """A saved FusionTree model as a model of lm-eval: lm-eval's class for transformers models, around the model.

    Args:
        pretrained: the directory of the saved model.
        device: cpu, cuda, cuda:1, ...
        max_length: tokens in a window. Default: the limit of learned positions or of an imported model's config,
            else 2048 (lm-eval's own default).
        batch_size: texts that run at once, or "auto" for as many as fit.
        max_batch_size: the batch size that "auto" tries first.

    Raises:
        FusionTreeError: see `fusiontree.load` and `fusiontree.zoo.hf.tokenizer_of`.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
    ) -> None:
        model: Any = FusionTreeForCausalLM.from_directory(pretrained, device=device)
        tokenizer: Any = tokenizer_of(pretrained, model.model.spec)
        _check_ends(pretrained, tokenizer)
        if model.generation_config.eos_token_id is None:
            model.generation_config.eos_token_id = tokenizer.eos_token_id
        batching = {"batch_size": batch_size, "max_batch_size": max_batch_size}
        super().__init__(model, tokenizer=tokenizer, max_length=max_length, **batching)
        model.register_forward_hook(_check_logits)

    def get_model_info(self) -> dict[str, Any]:
        """The facts that lm-eval stores beside results. The spec's digest replaces the commit that a hub model has."""
        ours: LanguageModel = self.model.model
        count = sum(parameter.numel() for parameter in ours.parameters())
        return {"model_num_parameters": count, "model_dtype": str(self.model.dtype), "digest": ours.spec.digest()}


def _check_ends(directory: str, tokenizer: Any) -> None:
    """Refuse a tokenizer with neither start nor end token, because lm-eval puts one before every first token."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        needed = '{"eos_token_id": ...}'
        text = f"no token is known to end a text; name one in generation_config.json, {needed}"
        raise FusionTreeError(f"{directory}: the tokenizer: {text}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token


register_model("fusiontree")(FusionTreeLM)


def _check_logits(model: nn.Module, inputs: tuple[Any, ...], output: "CausalLMOutputWithPast") -> None:
    """Refuse logits whose largest value is not finite; lm-eval would score them like any others."""
    assert output.logits is not None
    if not bool(output.logits.amax(-1).isfinite().all()):
        kind = str(output.logits.dtype).removeprefix("torch.")
        raise FusionTreeError(
            f"lm-eval: the largest logit of a token is not finite in {kind}; the model has overflowed"
        )


def _sandboxed(theirs: Environment) -> Environment:
    """A sandboxed copy of a Jinja environment: templates cannot reach into Python. transformers does this for chats."""
    ours = ImmutableSandboxedEnvironment(
        loader=theirs.loader, undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline
    )
    ours.filters.update(theirs.filters)
    return ours


utils.env = _sandboxed(utils.env)


def evaluate(
    directory: Path | str, tasks: Sequence[str | Path] | str | Path, *, limit: int | None = None, **options: Any
) -> dict[str, Any]:
    """Run tasks on a saved model.

    Args:
        directory: the directory of the model.
        tasks: one or several: YAML files in lm-eval's format, folders of them, or names of tasks in lm-eval.
            Files are plain data: keys that would run code are refused, and templates are rendered in a sandbox.
        limit: the number of documents of each task to run, from the first on; None: all.
        options: the options of `FusionTreeLM`.

    Returns:
        lm-eval's `results` by task, `n-samples` by task, and `model`: parameter count, dtype and digest.

    Raises:
        FusionTreeError: not a saved FusionTree model, or a task that is unknown or cannot be read or built.
    """
    tasks = [tasks] if isinstance(tasks, str | Path) else tasks
    model: Any = FusionTreeLM(str(directory), **options)
    manager = TaskManager(include_defaults=not all(_is_path(each) for each in tasks))
    configs = [named for each in tasks for named in _configs(each, manager)]
    built: Any = [part for place, config in configs for part in _built(place, config, manager)]
    try:
        with _without_git():
            found: Any = simple_evaluate(model, tasks=built, task_manager=manager, limit=limit, log_samples=False)
    except AssertionError as error:  # lm-eval refuses incompatible options with assertions
        raise FusionTreeError(f"lm-eval: {' '.join(str(error).split())}") from None
    return {"model": model.get_model_info(), "results": found["results"], "n-samples": found["n-samples"]}


@contextmanager
def _without_git() -> Generator[None]:
    """Keep lm-eval from asking git for a commit, because git complains outside a repository."""
    before, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before


def _is_path(named: str | Path) -> bool:
    """Whether a name is a file or folder, not a task of lm-eval. lm-eval takes seconds to index its own tasks."""
    return Path(named).exists() or Path(named).suffix in (".yaml", ".yml")


def _configs(named: str | Path, manager: TaskManager) -> list[tuple[str, Any]]:
    """The tasks of a file, a folder or a name, each with its place for error messages."""
    path = Path(named)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        if not files:
            raise FusionTreeError(f"{path}: holds no task, which is a YAML file")
        return [(str(file), _read(file)) for file in files]
    if _is_path(named):
        return [(str(path), _read(path))]
    if str(named) not in manager.task_index:
        raise FusionTreeError(f"{named}: neither a file nor a task of lm-eval{suggest(str(named), manager.all_tasks)}")
    return [(str(named), str(named))]


REFUSED = ("include", "class", "group", "use_prompt", "custom_dataset", "unsafe_code")
"""Keys that name code or other files."""


def _read(file: Path) -> dict[str, Any]:
    found = yaml.read_file(file)
    if not isinstance(found, dict) or not isinstance(found.get("task"), str):
        raise FusionTreeError(f"{file}: not a task, it names none under the key 'task'")
    for key in REFUSED:
        if key in found:
            raise FusionTreeError(f"{file}: {key}: tasks in files are plain data; write out what it stands for")
    if found.get("dataset_path") == "pandas":
        raise FusionTreeError(f"{file}: dataset_path: pandas reads pickles, which could run code")
    metrics = found.get("metric_list") or []
    if not isinstance(metrics, list):
        raise FusionTreeError(f"{file}: metric_list: expected a list, found {metrics!r:.60}")
    for metric in metrics:
        _check_metric(file, metric)
    return found


def _check_metric(file: Path, metric: Any) -> None:
    """Refuse metrics that are not part of lm-eval: it would load them with `evaluate`, which runs code by name."""
    name = metric.get("metric") if isinstance(metric, dict) else metric
    known: Any = metric_registry
    if not isinstance(metric, dict) or name not in known or metric.get("hf_evaluate"):
        raise FusionTreeError(f"{file}: metric_list: unknown {name!r}{suggest(str(name), known)}")


def _built(place: str, config: Any, manager: TaskManager) -> list[Any]:
    """The task, the group, or the tasks under a tag."""
    try:
        found: Any = manager.load(config)
    except Exception as error:  # lm-eval, Jinja and datasets raise many types
        raise FusionTreeError(f"{place}: {type(error).__name__}: {error}") from None
    return [found["groups"][place]] if place in found["groups"] else list(found["tasks"].values())
