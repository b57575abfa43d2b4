"""Runner: does the stages of a run in order, skips finished ones and redoes outdated ones.

Each stage has a folder under the workdir. A stage is outdated if its fingerprint has changed; its
artifact is then moved to `outdated/`, never deleted, and restored when the old settings return. An
interrupted training stage resumes from its newest checkpoint, any other stage starts over.

If there are several processes, process 0 decides, keeps the records and does the stages that need
no model; the others join it for those that do. They share the workdir.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from tokalign_jax.config import TRAINING, Config, config_to_dict
from tokalign_jax.errors import UserError
from tokalign_jax.parallel.distributed import is_first, on_first
from tokalign_jax.pipeline import checks, identities, resources, stages
from tokalign_jax.pipeline.context import Context
from tokalign_jax.pipeline.graph import Stage, fingerprints, graph, model_states
from tokalign_jax.pipeline.records import OUTDATED, STATE_FILE, StageRecords, lock
from tokalign_jax.training.checkpoints import naming_a_full_disk
from tokalign_jax.utils import digests, stopping
from tokalign_jax.utils.files import partial_of, unused
from tokalign_jax.utils.progress import Log, duration


def run(config: Config, workdir: Path, selected: Sequence[str] | None, log: Log) -> Path:
    """Run the selected stages, and unfinished ones that they need.

    Args:
      workdir: folder for everything that the run writes; created if needed.
      selected: names of stages; None: all. `evaluate` stands for all evaluations.

    Returns:
      The workdir.

    Raises:
      UserError: bad input, before any long work.
    """
    context = Context(config, workdir, log)

    def check() -> None:
        _refuse_foreign(workdir, StageRecords(workdir), identities.run_identity(context))
        checks.check(context)

    on_first(check)
    all_stages = graph(context, _exported(model_states(config), selected))
    by_name = {stage.name: stage for stage in all_stages}
    needed = _with_needs(by_name, _expand(selected, by_name))
    on_first(lambda: resources.check_disk(context, needed))
    on_first(lambda: resources.warn_of_memory(context, needed))

    fingerprint_of = fingerprints(all_stages)
    with lock(workdir) if is_first() else nullcontext(), naming_a_full_disk(workdir):
        records = StageRecords(workdir)
        on_first(lambda: _begin(context, records))
        for stage in all_stages:
            if stage.name in needed:
                _bring_up(stage, fingerprint_of[stage.name], context, records)
                if stage.name == "tokens" and needed & {*TRAINING}:
                    on_first(lambda: stages.check_stream(context))
    return workdir


def _begin(context: Context, records: StageRecords) -> None:
    records.set_identity(identities.run_identity(context))
    context.digests.save()
    content = json.dumps(config_to_dict(context.config), indent=1)
    (context.workdir / "config.json").write_text(content + "\n", encoding="utf-8")


def _bring_up(stage: Stage, fingerprint: str, context: Context, records: StageRecords) -> None:
    """Skip, restore, resume or run a stage."""
    stopping.check()
    if not on_first(lambda: _prepare(stage, fingerprint, context, records)):
        return
    start = time.time()
    try:
        with resources.naming_full_memory(context, stage.name), naming_a_full_disk(context.workdir):
            if stage.on_all_processes:
                summary = stage.run(context)
            else:
                summary = on_first(lambda: stage.run(context))
    except BaseException:
        if stage.resumes and is_first():
            with suppress(OSError):  # a full disk must not hide the first error
                records.add_time(stage.name, time.time() - start)
        raise
    seconds = round(time.time() - start, 2)
    on_first(lambda: records.finish(stage.name, seconds, summary or {}))
    context.log(f"{stage.name}: done in {duration(seconds)}")


def _prepare(stage: Stage, fingerprint: str, context: Context, records: StageRecords) -> bool:
    """Prepare the folder and record of a stage; return whether it has to be run."""
    folder = context.folder(stage.name)
    record = records.current.get(stage.name)
    is_finished = (
        record and record["fingerprint"] == fingerprint and record["finished"] and folder.exists()
    )
    if is_finished and stage.is_whole(context):
        context.log(f"{stage.name}: finished, skipped")
        return False
    if is_finished and not stage.resumes:
        damaged = unused(folder.with_name(f"{folder.name}.damaged"))
        folder.rename(damaged)
        context.log(f"{stage.name}: warning: files are missing; it was renamed to '{damaged}'")
    if record and record["fingerprint"] != fingerprint:
        context.log(f"{stage.name}: to be redone, because {_what_changed(record, stage)}")
        records.set_aside(stage.name, folder)
    if records.restore(stage.name, fingerprint, folder):
        context.log(f"{stage.name}: done before with these settings, restored from {OUTDATED}")
        return False
    if folder.exists() and not (stage.resumes and stage.name in records.current):
        if stage.name not in records.current:
            raise UserError(
                f"'{folder}' exists but {STATE_FILE} has no record of it, so it is not of this "
                "run; move it away or choose another --workdir"
            )
        shutil.rmtree(folder.resolve())  # an unfinished artifact of this run
    context.log(f"{stage.name}: {stage.description}")
    _record_start(stage, fingerprint, records)
    folder.resolve().mkdir(parents=True, exist_ok=True)  # it may be a link to another disk
    return True


def _record_start(stage: Stage, fingerprint: str, records: StageRecords) -> None:
    record = {
        "fingerprint": fingerprint,
        "settings": stage.settings,
        "finished": False,
        "needs": list(stage.needs),
    }
    if stage.resumes and (before := records.current.get(stage.name, {}).get("seconds")):
        record["seconds"] = before
    records.put(stage.name, record)


def _what_changed(record: Mapping[str, Any], stage: Stage) -> str:
    """Describe the settings that changed since a stage was recorded, or else its inputs."""
    old, new = (
        _flatten(json.loads(json.dumps(settings, default=str)))
        for settings in (record["settings"], stage.settings)
    )
    changed = [
        f"{key} changed from {old.get(key)} to {new.get(key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    return "; ".join(changed) if changed else "a stage that it needs changed"


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {
        k: v for key, inner in value.items() for k, v in _flatten(inner, f"{prefix}{key}.").items()
    }


def _exported(models: Sequence[str], selected: Sequence[str] | None) -> str:
    """Return the last model state that is selected; the last of all if none is."""
    named = [model for model in models if selected and model in selected]
    return named[-1] if named else models[-1]


def _expand(selected: Sequence[str] | None, stages: Mapping[str, Stage]) -> list[str]:
    """Return the names of the selected stages, with all evaluations for `evaluate`."""
    if selected is None:
        return [*stages]
    evaluations = [name for name in stages if name.startswith("evaluate/")]
    names = [
        name for entry in selected for name in (evaluations if entry == "evaluate" else [entry])
    ]
    for name in names:
        if name not in stages:
            known = [n for n in stages if "/" not in n] + ["evaluate"]
            raise UserError(
                f"--stages names '{name}', which is no stage of this run; the stages are "
                f"{', '.join(known)}"
            )
    if not names:
        raise UserError(
            f"--stages is empty; name some of {', '.join(stages)}, or leave it out to run all"
        )
    return names


def _with_needs(stages: Mapping[str, Stage], names: Sequence[str]) -> set[str]:
    """Return the names of stages and of all that they need."""
    result: set[str] = set()
    queue = [*names]
    while queue:
        name = queue.pop()
        if name not in result:
            result.add(name)
            queue += stages[name].needs
    return result


def _refuse_foreign(workdir: Path, records: StageRecords, identity: Mapping[str, str]) -> None:
    """Refuse a workdir that is neither empty nor of a run with the same model and tokenizer."""
    if marks := set(str(workdir.absolute())) & set("[]*?\\"):
        # Orbax finds its files by glob patterns.
        raise UserError(
            f"--workdir '{workdir}' has {' '.join(sorted(marks))} in its path, where checkpoints "
            "could not be read again: name a folder whose path has none of [ ] * ? \\"
        )
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--workdir {str(workdir)!r} is not UTF-8, in which the libraries that write its files "
            "take paths: name a folder whose path is"
        ) from error
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir '{workdir}' is a file; name a folder")
    if not records.exists:
        own_files = {
            ".lock",
            partial_of(workdir / STATE_FILE).name,
            digests.CACHE,
            partial_of(workdir / digests.CACHE).name,
        }
        if workdir.exists() and any(path.name not in own_files for path in workdir.iterdir()):
            raise UserError(
                f"--workdir '{workdir}' is not empty and holds no run of tokalign_jax (no "
                f"{STATE_FILE}); nothing there is touched: choose an empty or a new folder"
            )
        return
    if records.identity and records.identity != identity:
        differences = ", ".join(
            f"{key} {records.identity.get(key)!r} there, {value!r} now"
            for key, value in identity.items()
            if records.identity.get(key) != value
        )
        raise UserError(
            f"--workdir '{workdir}' belongs to another run ({differences}); choose another "
            "--workdir for this one"
        )
