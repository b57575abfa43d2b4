"""The run: stages in order, each a folder under the workdir, skipped when finished and redone when what it depends on changed.

`stages.json` in the workdir holds, for each stage, a fingerprint of its settings and of the stages it needs. A stage whose
fingerprint no longer fits is done again; what it had left is moved to `outdated/`, never deleted, and moved back when the old
settings return. Training stages resume from their newest checkpoint; the others start over when they were interrupted.

Of several processes the first decides, keeps the books and does what needs no model; the others join it in stages that do. They share
the workdir.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokalign_jax import digests, stages, stopping
from tokalign_jax.config import TRAINING, Config, config_to_dict, training_stages
from tokalign_jax.distributed import is_first, on_first
from tokalign_jax.errors import UserError
from tokalign_jax.files import partial_of, unused, write_whole
from tokalign_jax.progress import Log, duration
from tokalign_jax.training.checkpoints import naming_a_full_disk

STATE_FILE = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One step of the run.

    Attributes:
      name: also its folder under the workdir.
      says: what it does, for the log.
      needs: names of the stages whose artefacts it reads.
      settings: the part of the config (and the identity of outside files) that its result depends on.
      run: writes the artefact into `context.folder(name)` and returns a summary for the record.
      resumes: whether an interrupted run continues from what is in its folder.
      together: whether all processes run it, each on its own devices; else the first alone does.
      is_whole: whether all that it left when it finished is still there; if not it goes on with what is.
    """

    name: str
    says: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]
    run: Callable[[stages.Context], Mapping[str, Any] | None]
    resumes: bool = False
    together: bool = False
    is_whole: Callable[[stages.Context], bool] = lambda context: True


def graph(context: stages.Context, exported: str) -> list[Stage]:
    """All stages of a run in order.

    Args:
      exported: the model state (`init` or a training stage) that is exported and reported as the last one.
    """
    config, outside = context.config, context.identities
    models = model_states(config)
    seed = {"seed": config.seed}
    # The rest of `compute`, and the mesh, change nothing but speed and rounding.
    compute = {"compute": {"dtype": config.compute.dtype}}
    vocabularies = {name: outside[name] for name in ("source_tokenizer", "target_tokenizer")}
    vocabularies |= {"end_of_text": config.end_of_text} if config.end_of_text else {}
    extension = [_extension(context)] if context.extends else []
    target = tuple(stage.name for stage in extension)  # what the target tokenizer comes from

    def training(name: str) -> Stage:
        before = tuple(models[: models.index(name)])
        stage = {
            k: v
            for k, v in config_to_dict(getattr(config, name)).items()
            if k not in _WITHOUT_EFFECT
        }
        stage |= {k: getattr(type(getattr(config, name)), k) for k in _AS_BY_DEFAULT}
        stage |= {"teacher": outside["teacher"]} if "teacher" in stage else {}
        return Stage(
            name,
            f"train ({getattr(config, name).method})",
            ("tokens", *before),
            {name: stage, "data": config_to_dict(config.data), **compute, **seed},
            lambda c: stages.train(c, name, before),
            resumes=True,
            together=True,
            is_whole=lambda c: stages.is_trained(c, name),
        )

    def evaluation(state: str) -> Stage:
        states = tuple(models[: models.index(state) + 1]) if state in models else ()
        return Stage(
            f"evaluate/{state}",
            f"measure {state}",
            ("corpus", *(() if state == "source" else (*target, "evaluate/source")), *states),
            {
                "evaluation": config_to_dict(config.evaluation)
                | {"abilities": outside["questions"], "other_text": outside["other_text"]},
                "source_model": outside["source_model"],
                **vocabularies,
                **compute,
                **seed,
            },
            lambda c: stages.evaluate(c, state, states),
            together=True,
        )

    reached = models[: models.index(exported) + 1]
    baselines = ["source", *(["random"] if config.evaluation.random_baseline else [])]
    reported = [*baselines, *reached]
    return [
        Stage(
            "corpus",
            "read, de-duplicate and split the documents",
            (),
            {"corpus": outside["corpus"], "text": config_to_dict(config.text)},
            stages.corpus,
        ),
        *extension,
        Stage(
            "tokens",
            "cut the documents with both tokenizers",
            ("corpus", *target),
            vocabularies,
            stages.tokens,
            is_whole=stages.has_tokens,
        ),
        Stage(
            "align",
            "align target tokens to source tokens",
            ("corpus", *target, "tokens"),
            {
                "alignment": {
                    **config_to_dict(config.alignment),
                    "file": outside["alignment"],
                    **outside["vectors"],
                    "donor": outside["donor"],
                },
                **seed,
            },
            stages.align,
        ),
        Stage(
            "init",
            "re-arrange the vocabulary's rows",
            ("tokens", "align"),
            {
                "source_model": outside["source_model"],
                "initialization": config_to_dict(config.initialization),
                **compute,
                **seed,
            },
            stages.init,
            together=True,
            is_whole=lambda c: stages.has_model(c, "init"),
        ),
        *(training(name) for name in models[1:]),
        *(evaluation(state) for state in [*baselines, *models]),
        Stage(
            "export",
            f"write the Hugging Face folder of {exported}",
            tuple(reached),
            {"export": config_to_dict(config.export)},
            lambda c: stages.export(c, reached),
            together=True,
            is_whole=lambda c: stages.has_model(c, "export"),
        ),
        Stage(
            "report",
            "a page, tables, JSON and a picture",
            ("corpus", "tokens", "align", *reached, *(f"evaluate/{state}" for state in reported)),
            {},
            lambda c: stages.report(c, reported),
        ),
    ]


def _extension(context: stages.Context) -> Stage:
    """The stage that makes the target tokenizer of the source's."""
    return Stage(
        "extend",
        "add tokens of the text to the source tokenizer",
        ("corpus",),
        {
            "extend": config_to_dict(context.config.extend),
            "source_tokenizer": context.identities["source_tokenizer"],
            "seed": context.config.seed,
        },
        stages.extend,
    )


def model_states(config: Config) -> list[str]:
    """The states that the model goes through."""
    return ["init", *training_stages(config)]


_WITHOUT_EFFECT = ("log_every", "keep_checkpoints", "checkpoint_every", "per_device_batch")
"""Fields of a training stage that change nothing in its result but rounding."""
_AS_BY_DEFAULT = ("max_skipped_in_a_row",)
"""Such fields that a fingerprint has as if they were not set: it was made with them once, and finished runs are to stay so."""


def run(config: Config, workdir: Path, selected: Sequence[str] | None, log: Log) -> Path:
    """Runs the selected stages, and unfinished ones that they need.

    Args:
      workdir: holds everything the run leaves; made if absent.
      selected: names of stages, or None for all of them. `evaluate` stands for all evaluations.

    Returns:
      The workdir.

    Raises:
      UserError: bad input, before any long work.
    """
    context = stages.Context(config, workdir, log)

    def check() -> None:
        _refuse_foreign(workdir, _State(workdir), context)
        context.check()

    on_first(check)
    found = {
        stage.name: stage for stage in graph(context, _exported(model_states(config), selected))
    }
    wanted = _closure(found, _expand(selected, found))
    on_first(lambda: stages.check_disk(context, wanted))
    on_first(lambda: stages.warn_of_memory(context, wanted))

    prints = fingerprints(list(found.values()))
    with lock(workdir) if is_first() else nullcontext():
        state = _State(workdir)
        on_first(lambda: _begin(context, state))
        for stage in found.values():
            if stage.name in wanted:
                _bring_up(stage, prints[stage.name], context, state)
                if stage.name == "tokens" and wanted & {*TRAINING}:
                    on_first(lambda: stages.check_stream(context))
    return workdir


def prints_of(context: stages.Context, exported: str = "") -> dict[str, str]:
    """The fingerprints of all stages of a run that exports this state of the model, or its last one, by name."""
    return fingerprints(graph(context, exported or model_states(context.config)[-1]))


def books(workdir: Path) -> Mapping[str, Mapping[str, Any]]:
    """What is known of each stage: fingerprint, settings, whether it is finished, its time and summary."""
    return _State(workdir).current


def drop(workdir: Path, keep: Set[str]) -> None:
    """Removes what stands in `outdated/` but for the stages with these fingerprints."""
    _State(workdir).drop(keep)


def _begin(context: stages.Context, state: "_State") -> None:
    state.remember(context.run_identity())
    context.digests.save()
    content = json.dumps(config_to_dict(context.config), indent=1)
    (context.workdir / "config.json").write_text(content + "\n", encoding="utf-8")


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keeps a second process out of a workdir; the lock goes with the process, however it ends.

    Raises:
      UserError: another process has it, or it cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        opened = (workdir / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--workdir '{workdir}' cannot be written to ({error.strerror}); name a folder that you may write to"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process runs in --workdir '{workdir}'; wait for it, or choose another --workdir"
            ) from error
        except OSError as error:
            raise UserError(
                f"--workdir '{workdir}' is on a file system that cannot lock files ({error.strerror}), so that a second run could write "
                "over this one: mount it with locks (Lustre: -o flock), or choose another --workdir"
            ) from error
        yield


def fingerprints(found: Sequence[Stage]) -> dict[str, str]:
    """SHA-256 of each stage's settings and of the fingerprints of what it needs, in order of the stages."""
    prints: dict[str, str] = {}
    for stage in found:
        content = {
            "settings": stage.settings,
            "needs": {n: prints[n] for n in stage.needs},
            "format": stages.FORMAT,
        }
        prints[stage.name] = hashlib.sha256(
            json.dumps(content, sort_keys=True, default=str).encode()
        ).hexdigest()
    return prints


def _bring_up(stage: Stage, fingerprint: str, context: stages.Context, state: "_State") -> None:
    """Skips, restores, resumes or runs one stage."""
    stopping.check()
    if not on_first(lambda: _is_due(stage, fingerprint, context, state)):
        return
    start = time.time()
    try:
        with stages.naming_full_memory(context, stage.name), naming_a_full_disk(context.workdir):
            summary = stage.run(context) if stage.together else on_first(lambda: stage.run(context))
    except BaseException:
        if stage.resumes and is_first():
            with suppress(OSError):  # a full disk is told by what found it first
                state.count(stage.name, time.time() - start)
        raise
    seconds = round(time.time() - start, 2)
    on_first(lambda: state.finish(stage.name, seconds, summary or {}))
    context.log(f"{stage.name}: done in {duration(seconds)}")


def _is_due(stage: Stage, fingerprint: str, context: stages.Context, state: "_State") -> bool:
    """Whether the stage is to be run; if so its folder is ready, and the books say that it has begun."""
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
            f"{stage.name}: warning: what it left is not whole any more; it was renamed to '{damaged}'"
        )
    if record and record["fingerprint"] != fingerprint:
        context.log(f"{stage.name}: to be done again, {_what_changed(record, stage)}")
        state.set_aside(stage.name, folder)
    if state.restore(stage.name, fingerprint, folder):
        context.log(f"{stage.name}: done before with these settings, restored from {_OUTDATED}")
        return False
    if folder.exists() and not (stage.resumes and stage.name in state.current):
        if stage.name not in state.current:
            raise UserError(
                f"'{folder}' exists and is not of this run ({STATE_FILE} does not know it); move it away or choose another "
                "--workdir"
            )
        shutil.rmtree(folder.resolve())  # our own, and unfinished
    context.log(f"{stage.name}: {stage.says}")
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
                f"--stages names '{name}', which is no stage of this run; the stages are {', '.join(known)}"
            )
    if not names:
        raise UserError(
            f"--stages names none; the stages are {', '.join(found)}, or leave it out to run them all"
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


def _refuse_foreign(workdir: Path, state: "_State", context: stages.Context) -> None:
    """A workdir is a run's own: empty, or begun with the same source model and target tokenizer."""
    if marks := set(str(workdir.absolute())) & set("[]*?\\"):
        # Orbax looks for its files by patterns, and would find none of them.
        raise UserError(
            f"--workdir '{workdir}' has {' '.join(sorted(marks))} in its path, where checkpoints could not be read again: name a folder "
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
                f"--workdir '{workdir}' is not empty and holds no run of tokalign_jax (no {STATE_FILE}); nothing there is touched: "
                "choose an empty or a new folder"
            )
        return
    identity = context.run_identity()
    if state.identity and state.identity != identity:
        differences = ", ".join(
            f"{k} {state.identity.get(k)!r} there, {v!r} now"
            for k, v in identity.items()
            if state.identity.get(k) != v
        )
        raise UserError(
            f"--workdir '{workdir}' belongs to another run ({differences}); choose another --workdir for this one"
        )


_OUTDATED = "outdated"


class _State:
    """`stages.json`: the books of a workdir.

    Whatever moment a run ends at, they know of all that is there: of what is to be moved they have both places beforehand, and one of
    them afterwards.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._path = workdir, workdir / STATE_FILE
        self.exists = self._path.exists()
        try:
            content = json.loads(self._path.read_text(encoding="utf-8")) if self.exists else {}
        except ValueError as error:
            raise UserError(
                f"'{self._path}' is damaged ({error}), and without it nobody knows which stages of the run are done: bring back a copy, or "
                "choose another --workdir (checkpoints and export in this one are not touched)"
            ) from error
        self.identity: dict[str, str] = content.get("run", {})
        self.current: dict[str, dict] = content.get("stages", {})
        self._outdated: dict[str, dict] = content.get(_OUTDATED, {})

    def remember(self, identity: Mapping[str, str]) -> None:
        self.identity = dict(identity)
        self._write()

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        self.current[name] = dict(record)
        self._write()

    def finish(self, name: str, seconds: float, summary: Mapping[str, Any]) -> None:
        self.count(name, seconds, finished=True, summary=summary)

    def count(self, name: str, seconds: float, **more: Any) -> None:
        """Adds to the time that a stage took, which may be over several runs of the command, and writes `more` beside it."""
        record = self.current[name]
        self.put(name, {**record, "seconds": round(record.get("seconds", 0) + seconds, 2), **more})

    def set_aside(self, name: str, folder: Path) -> None:
        """Moves an artefact that no longer fits to `outdated/NAME-FINGERPRINT`."""
        record = self.current[name]
        if folder.exists():
            key = f"{name.replace('/', '-')}-{record['fingerprint'][:12]}"
            place = self._workdir / _OUTDATED / key
            place.parent.resolve().mkdir(exist_ok=True)
            if place.exists():  # the same stage with the same settings, aside since before
                os.replace(place, unused(place.with_name(f"{key}.before")))
            self._outdated[key] = record
            self._write()
            shutil.move(folder, place)  # perhaps to another disk
        del self.current[name]
        self._write()

    def restore(self, name: str, fingerprint: str, folder: Path) -> bool:
        """Brings back an artefact made with these very settings; True if it was finished."""
        key = f"{name.replace('/', '-')}-{fingerprint[:12]}"
        place = self._workdir / _OUTDATED / key
        if key not in self._outdated or not place.exists() or folder.exists():
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        record = self._outdated[key]
        self.put(name, record)
        shutil.move(place, folder)
        del self._outdated[key]
        self._write()
        return record["finished"]

    def drop(self, keep: Set[str]) -> None:
        """Removes artefacts that are aside, but for those with these fingerprints."""
        for key in [
            key for key, record in self._outdated.items() if record["fingerprint"] not in keep
        ]:
            del self._outdated[key]
            shutil.rmtree(self._workdir / _OUTDATED / key, ignore_errors=True)
        self._write()

    def _write(self) -> None:
        content = {"run": self.identity, "stages": self.current, _OUTDATED: self._outdated}
        write_whole(self._path, json.dumps(content, indent=1, default=str) + "\n")
