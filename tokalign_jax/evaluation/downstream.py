"""Downstream tasks with EleutherAI's lm-evaluation-harness and its PyTorch model.

An optional extra (`pip install 'tokalign_jax[lm-eval]'`). Tasks are those of the harness, which
download their data, or those of a local folder (YAML files for the harness, with their data), which
need no network; relative paths in them are relative to that folder.
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
    """Checks that the harness is installed and knows the tasks.

    Raises:
      UserError: it is not installed, or a task is unknown; lists the tasks of the folder.
    """
    if task_folder and not task_folder.is_dir():
        raise UserError(
            f"--task-folder '{task_folder}': there is no such folder; give the folder of the tasks'"
            " YAML files"
        )
    manager = _task_manager(tasks, task_folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        available = ", ".join(_folder_tasks(task_folder).all_tasks) if task_folder else ""
        hint = (
            f"the tasks in '{task_folder}' are {available or 'none'}"
            if task_folder
            else "use --task-folder for tasks of your own"
        )
        raise UserError(f"--tasks names '{unknown[0]}', which lm-eval does not know; {hint}")


def run_in_subprocess(
    folders: Sequence[Path], tasks: Sequence[str], task_folder: Path | None, limit: int
) -> list[dict[str, Any]]:
    """Calls `run` for each folder in a subprocess, which frees its memory when it ends.

    Raises:
      UserError: a file that a task reads is missing.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = (pool.submit(run, folder, tasks, task_folder, limit) for folder in folders)
        try:
            return [one.result() for one in runs]
        except FileNotFoundError as error:
            where = (
                f"'{task_folder}', the folder of --task-folder" if task_folder else "the network"
            )
            raise UserError(
                f"--tasks {','.join(tasks)}: {error}; lm-eval reads the data of its tasks from"
                f" {where}"
            ) from error


def run(
    folder: Path, tasks: Sequence[str], task_folder: Path | None = None, limit: int = 0
) -> dict[str, Any]:
    """Runs the tasks on the model in a Hugging Face folder.

    Args:
      folder: the model's folder.
      tasks: names of the tasks.
      task_folder: the folder of their YAML files; None for the harness's own.
      limit: number of examples per task; 0 for all.

    Returns:
      By task, for JSON: each metric by name ("acc", "acc_norm") with `value` and `standard_error`
      (None if there is none).
    """
    manager = _task_manager(tasks, task_folder)
    # Absolute, since the working directory changes below, for tasks with their own data.
    model = str(Path(folder).absolute())
    import torch
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]

    with contextlib.chdir(task_folder or Path.cwd()):
        output: Any = simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "trust_remote_code": False},
            tasks=list(tasks),
            task_manager=manager,
            device="cuda" if torch.cuda.is_available() else "cpu",
            limit=limit or None,
            log_samples=False,
            bootstrap_iters=1000,
        )
    return {task: _metrics(output["results"][task]) for task in tasks}


def _metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Converts results such as `{"acc,none": 0.5, "acc_stderr,none": 0.1}` to metrics by name."""
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


def _task_manager(tasks: Sequence[str], task_folder: Path | None) -> Any:
    """Returns the task manager, that of the folder if it has all tasks.

    Reading the harness's own tasks is slow.
    """
    _quiet()
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval, which is not installed ({error}): {REMEDY}"
        ) from error
    if task_folder:
        manager = _folder_tasks(task_folder)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    return TaskManager(include_path=str(task_folder.absolute()) if task_folder else None)


def _folder_tasks(task_folder: Path) -> Any:
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    return TaskManager(include_path=str(task_folder.absolute()), include_defaults=False)


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
