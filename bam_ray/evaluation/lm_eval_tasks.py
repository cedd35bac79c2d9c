"""Scores on tasks of lm-eval, EleutherAI's evaluation harness, that are defined in local files.

lm-eval belongs to the extra `lm-eval` and is imported only if a recipe has tasks.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bam_ray.errors import SettingsError
from bam_ray.evaluation.results import LmEvalScore

NO_FILTER = "none"
STDERR = "_stderr"


def digest_of_tasks(folder: Path) -> str:
    """Return the SHA-256 of the names and the content of all files in a folder of tasks.

    Raises:
        SettingsError: The folder does not exist on this node.
    """
    if not folder.is_dir():
        raise SettingsError(
            f"evaluate.lm_eval_tasks: there is no folder {folder} on this node: copy it to all nodes that evaluate"
        )
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def score_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, batch: int, max_length: int
) -> tuple[LmEvalScore, ...]:
    """Return the scores of a model on all tasks that the YAML files of a folder define.

    Args:
        model: The model, on its device.
        tokenizer: The tokenizer of the model.
        folder: The folder. Its tasks are those that lm-eval finds there.
        batch: The number of requests in a forward pass.
        max_length: The number of tokens that the model may see at once. Longer contexts lose their beginning.

    Raises:
        SettingsError: lm-eval is not installed, or a task cannot be read or run.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise SettingsError(
            "evaluate.lm_eval_tasks needs the package lm-eval: pip install 'bam-ray[lm-eval]'"
        ) from None
    try:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        names = manager.all_subtasks
        if not names:
            raise ValueError("it defines no task")
        evaluated = HFLM(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch, max_length=max_length
        )
        found: Any = simple_evaluate(model=evaluated, tasks=names, task_manager=manager, log_samples=False)
    except Exception as error:  # tasks contain code and templates, which can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingsError(
            f"evaluate.lm_eval_tasks: {folder}: {reason}: check with `lm_eval ls --include_path {folder}`"
        ) from error
    return tuple(_scores(found["results"]))


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[LmEvalScore]:
    """Yield the metrics in the results of lm-eval. Its keys are `<metric>,<filter>` and `<metric>_stderr,<filter>`."""
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, separator, filtered = key.partition(",")
            if separator and not metric.endswith(STDERR) and isinstance(value, int | float):
                stderr = metrics.get(f"{metric}{STDERR},{filtered}")
                yield LmEvalScore(
                    task=task,
                    metric=metric if filtered == NO_FILTER else f"{metric}, {filtered}",
                    value=value,
                    stderr=stderr if isinstance(stderr, int | float) else None,
                )
