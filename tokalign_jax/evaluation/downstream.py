"""Downstream tasks through EleutherAI's lm-evaluation-harness, with its own PyTorch model: what
others will measure of the exported folder.

An optional extra (`pip install 'tokalign_jax[lm-eval]'`). Tasks are the harness's own, which fetch
their data, or those of a local folder (YAML files as the harness reads them, with data beside
them), which need no network: paths in them are taken from that folder.
"""

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tokalign_jax.errors import UserError

REMEDY = "pip install 'tokalign_jax[lm-eval]'"


def check(tasks: Sequence[str], task_folder: Path | None) -> None:
    """Looks whether the harness is there and knows the tasks.

    Raises:
      UserError: it is not installed, or a task is unknown; with the tasks of the folder.
    """
    if task_folder and not task_folder.is_dir():
        raise UserError(
            f"--task-folder '{task_folder}': there is no such folder; name the one that holds the"
            " tasks' YAML files"
        )
    manager = _manager(tasks, task_folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        there = ", ".join(_own(task_folder).all_tasks) if task_folder else ""
        of_folder = (
            f"those in '{task_folder}' are {there or 'none'}"
            if task_folder
            else "--task-folder names a folder with more"
        )
        raise UserError(f"--tasks names '{unknown[0]}', which lm-eval does not know; {of_folder}")


def run_apart(
    folders: Sequence[Path], tasks: Sequence[str], task_folder: Path | None, limit: int
) -> list[dict[str, Any]]:
    """`run` for each folder in a process of its own, whose memory, on a GPU too, is free again when
    it ends.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [pool.submit(run, folder, tasks, task_folder, limit).result() for folder in folders]


def run(
    folder: Path, tasks: Sequence[str], task_folder: Path | None = None, limit: int = 0
) -> dict[str, Any]:
    """The tasks' figures for the model in a Hugging Face folder.

    Args:
      limit: examples of each task; 0: all.

    Returns: For JSON: by task, each metric by its name (as "acc", "acc_norm") with `value` and
      `standard_error` (None where there is none).
    """
    manager = _manager(tasks, task_folder)
    model = str(
        Path(folder).absolute()
    )  # before the change of folder, which tasks with data of their own need
    import torch
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]

    with contextlib.chdir(task_folder or Path.cwd()):
        found: Any = simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "trust_remote_code": False},
            tasks=list(tasks),
            task_manager=manager,
            device="cuda" if torch.cuda.is_available() else "cpu",
            limit=limit or None,
            log_samples=False,
            bootstrap_iters=1000,
        )
    return {task: _metrics(found["results"][task]) for task in tasks}


def _metrics(result: dict[str, Any]) -> dict[str, Any]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1}` by metric."""
    metrics = {}
    for key, value in result.items():
        name, _, kind = key.partition(",")
        if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{name}_stderr,{kind}")
        label = name if kind == "none" else f"{name} ({kind})"
        metrics[label] = {
            "value": float(value),
            "standard_error": float(error) if isinstance(error, int | float) else None,
        }
    return metrics


def _manager(tasks: Sequence[str], task_folder: Path | None) -> Any:
    """What finds the tasks: the folder's own where they are all there, since reading the harness's
    takes long.
    """
    _quiet()
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval, which is not installed ({error}): {REMEDY}"
        ) from error
    if task_folder and set(tasks) <= set((own := _own(task_folder)).all_tasks):
        return own
    return TaskManager(include_path=str(task_folder.absolute()) if task_folder else None)


def _own(task_folder: Path) -> Any:
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    return TaskManager(include_path=str(task_folder.absolute()), include_defaults=False)


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
