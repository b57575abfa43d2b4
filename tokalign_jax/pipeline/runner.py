"""Run the stages in order: each is a folder under the workdir, skipped when finished and redone
when its inputs changed.

A stage whose fingerprint no longer fits is done again; what it had left is moved to `outdated/`,
never deleted, and moved back when the old settings return. Training stages resume from their newest
checkpoint; the others start over when they were interrupted.

Of several processes the first decides, keeps the records and does what needs no model; the others
join it in stages that do. They share the workdir.
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
      workdir: holds everything the run leaves; made if absent.
      selected: names of stages, or None for all of them. `evaluate` stands for all evaluations.

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
    found = {
        stage.name: stage for stage in graph(context, _exported(model_states(config), selected))
    }
    wanted = _closure(found, _expand(selected, found))
    on_first(lambda: resources.check_disk(context, wanted))
    on_first(lambda: resources.warn_of_memory(context, wanted))

    by_stage = fingerprints(list(found.values()))
    with lock(workdir) if is_first() else nullcontext():
        state = StageRecords(workdir)
        on_first(lambda: _begin(context, state))
        for stage in found.values():
            if stage.name in wanted:
                _bring_up(stage, by_stage[stage.name], context, state)
                if stage.name == "tokens" and wanted & {*TRAINING}:
                    on_first(lambda: stages.check_stream(context))
    return workdir


def _begin(context: Context, state: StageRecords) -> None:
    state.remember(identities.run_identity(context))
    context.digests.save()
    content = json.dumps(config_to_dict(context.config), indent=1)
    (context.workdir / "config.json").write_text(content + "\n", encoding="utf-8")


def _bring_up(stage: Stage, fingerprint: str, context: Context, state: StageRecords) -> None:
    """Skip, restore, resume or run one stage."""
    stopping.check()
    if not on_first(lambda: _is_due(stage, fingerprint, context, state)):
        return
    start = time.time()
    try:
        with resources.naming_full_memory(context, stage.name), naming_a_full_disk(context.workdir):
            summary = (
                stage.run(context)
                if stage.on_all_processes
                else on_first(lambda: stage.run(context))
            )
    except BaseException:
        if stage.resumes and is_first():
            with suppress(OSError):  # a full disk is told by what found it first
                state.count(stage.name, time.time() - start)
        raise
    seconds = round(time.time() - start, 2)
    on_first(lambda: state.finish(stage.name, seconds, summary or {}))
    context.log(f"{stage.name}: done in {duration(seconds)}")


def _is_due(stage: Stage, fingerprint: str, context: Context, state: StageRecords) -> bool:
    """Whether the stage is to be run; if so its folder is ready, and the books say that it has
    begun.
    """
    folder = context.folder(stage.name)
    record = state.current.get(stage.name)
    finished = (
        record and record["fingerprint"] == fingerprint and record["finished"] and folder.exists()
    )
    if finished and stage.is_whole(context):
        context.log(f"{stage.name}: finished, skipped")
        return False
    if finished and not stage.resumes:
        damaged = unused(folder.with_name(f"{folder.name}.damaged"))
        folder.rename(damaged)
        context.log(
            f"{stage.name}: warning: what it left is not whole any more; it was renamed to "
            f"'{damaged}'"
        )
    if record and record["fingerprint"] != fingerprint:
        context.log(f"{stage.name}: to be done again, {_what_changed(record, stage)}")
        state.set_aside(stage.name, folder)
    if state.restore(stage.name, fingerprint, folder):
        context.log(f"{stage.name}: done before with these settings, restored from {OUTDATED}")
        return False
    if folder.exists() and not (stage.resumes and stage.name in state.current):
        if stage.name not in state.current:
            raise UserError(
                f"'{folder}' exists and is not of this run ({STATE_FILE} does not know it); move "
                f"it away or choose another "
                "--workdir"
            )
        shutil.rmtree(folder.resolve())  # our own, and unfinished
    context.log(f"{stage.name}: {stage.description}")
    record = {
        "fingerprint": fingerprint,
        "settings": stage.settings,
        "finished": False,
        "needs": list(stage.needs),
    }
    if stage.resumes and (before := state.current.get(stage.name, {}).get("seconds")):
        record["seconds"] = before
    state.put(stage.name, record)
    folder.resolve().mkdir(parents=True, exist_ok=True)  # it may be a link to another disk
    return True


def _what_changed(record: Mapping[str, Any], stage: Stage) -> str:
    """The settings that differ, or the stages before that were redone."""
    old, new = (
        _flat(json.loads(json.dumps(s, default=str))) for s in (record["settings"], stage.settings)
    )
    changed = [
        f"{k} changed from {old.get(k)} to {new.get(k)}"
        for k in sorted({*old, *new})
        if old.get(k) != new.get(k)
    ]
    return "; ".join(changed) if changed else "because what it builds on changed"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {
        k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()
    }


def _exported(models: Sequence[str], selected: Sequence[str] | None) -> str:
    """The last model state that the selection names; the last of all where it names none."""
    named = [m for m in models if selected and m in selected]
    return named[-1] if named else models[-1]


def _expand(selected: Sequence[str] | None, found: Mapping[str, Stage]) -> list[str]:
    if selected is None:
        return [*found]
    names = [
        n
        for s in selected
        for n in (found if s == "evaluate" else [s])
        if s != "evaluate" or n.startswith("evaluate/")
    ]
    for name in names:
        if name not in found:
            known = [n for n in found if "/" not in n] + ["evaluate"]
            raise UserError(
                f"--stages names '{name}', which is no stage of this run; the stages are "
                f"{', '.join(known)}"
            )
    if not names:
        raise UserError(
            f"--stages names none; the stages are {', '.join(found)}, or leave it out to run them "
            f"all"
        )
    return names


def _closure(found: Mapping[str, Stage], names: Sequence[str]) -> set[str]:
    wanted: set[str] = set()
    queue = [*names]
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            queue += found[name].needs
    return wanted


def _refuse_foreign(workdir: Path, state: StageRecords, identity: Mapping[str, str]) -> None:
    """Refuse a workdir that is neither empty nor of a run with the same model and tokenizer."""
    if marks := set(str(workdir.absolute())) & set("[]*?\\"):
        # Orbax looks for its files by patterns, and would find none of them.
        raise UserError(
            f"--workdir '{workdir}' has {' '.join(sorted(marks))} in its path, where checkpoints "
            f"could not be read again: name a folder "
            "whose path has none of [ ] * ? \\"
        )
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir '{workdir}' is a file; name a folder")
    if not state.exists:
        ours = {
            ".lock",
            partial_of(workdir / STATE_FILE).name,
            digests.CACHE,
            partial_of(workdir / digests.CACHE).name,
        }
        if workdir.exists() and any(path.name not in ours for path in workdir.iterdir()):
            raise UserError(
                f"--workdir '{workdir}' is not empty and holds no run of tokalign_jax (no "
                f"{STATE_FILE}); nothing there is touched: "
                "choose an empty or a new folder"
            )
        return
    if state.identity and state.identity != identity:
        differences = ", ".join(
            f"{k} {state.identity.get(k)!r} there, {v!r} now"
            for k, v in identity.items()
            if state.identity.get(k) != v
        )
        raise UserError(
            f"--workdir '{workdir}' belongs to another run ({differences}); choose another "
            f"--workdir for this one"
        )
