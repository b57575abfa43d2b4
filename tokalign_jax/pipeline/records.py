"""Records of stages (`stages.json` in a workdir), outdated artifacts, and the workdir's lock."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokalign_jax.errors import UserError
from tokalign_jax.utils.files import unused, write_whole

STATE_FILE = "stages.json"
OUTDATED = "outdated"


class StageRecords:
    """The content of `stages.json`.

    Crash-safe: before an artifact moves, the file records both paths; afterwards only the new one.
    """

    def __init__(self, workdir: Path):
        self._workdir, self._path = workdir, workdir / STATE_FILE
        self.exists = self._path.exists()
        try:
            content = json.loads(self._path.read_text(encoding="utf-8")) if self.exists else {}
            run, stages, outdated = (content.get(key, {}) for key in ("run", "stages", OUTDATED))
            if not all(isinstance(x, dict) for x in (run, *stages.values(), *outdated.values())):
                raise ValueError("it holds other values than records of stages")
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"'{self._path}' is damaged ({error}), so that the finished stages of the run are "
                "not known: restore a copy, or choose another --workdir (checkpoints and export in "
                "this one are not touched)"
            ) from error
        self.identity: dict[str, str] = run
        self.current: dict[str, dict] = stages
        self._outdated: dict[str, dict] = outdated

    def set_identity(self, identity: Mapping[str, str]) -> None:
        """Record the inputs that all runs of the workdir must share."""
        self.identity = dict(identity)
        self._write()

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace a stage's record."""
        self.current[name] = dict(record)
        self._write()

    def finish(self, name: str, seconds: float, summary: Mapping[str, Any]) -> None:
        """Record that a stage is finished."""
        self.add_time(name, seconds, finished=True, summary=summary)

    def add_time(self, name: str, seconds: float, **fields: Any) -> None:
        """Add to the time of a stage, which several commands may share, and set other fields."""
        record = self.current[name]
        total = round(record.get("seconds", 0) + seconds, 2)
        self.put(name, {**record, "seconds": total, **fields})

    def set_aside(self, name: str, folder: Path) -> None:
        """Move an artifact of other settings to `outdated/NAME-FINGERPRINT`."""
        record = self.current[name]
        if folder.exists():
            key = _key(name, record["fingerprint"])
            target = self._workdir / OUTDATED / key
            target.parent.resolve().mkdir(exist_ok=True)
            if target.exists():  # an older artifact of the same stage and settings
                os.replace(target, unused(target.with_name(f"{key}.before")))
            self._outdated[key] = record
            self._write()
            shutil.move(folder, target)  # may cross disks
        del self.current[name]
        self._write()

    def restore(self, name: str, fingerprint: str, folder: Path) -> bool:
        """Restore an artifact of these settings; return whether there is one and it is finished."""
        key = _key(name, fingerprint)
        outdated = self._workdir / OUTDATED / key
        if key not in self._outdated or not outdated.exists() or folder.exists():
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        record = self._outdated[key]
        self.put(name, record)
        shutil.move(outdated, folder)
        del self._outdated[key]
        self._write()
        return record["finished"]

    def drop(self, keep: Set[str]) -> None:
        """Delete outdated artifacts, except those with these fingerprints."""
        for key, record in [*self._outdated.items()]:
            if record["fingerprint"] not in keep:
                del self._outdated[key]
                shutil.rmtree(self._workdir / OUTDATED / key, ignore_errors=True)
        self._write()

    def _write(self) -> None:
        content = {"run": self.identity, "stages": self.current, OUTDATED: self._outdated}
        write_whole(self._path, json.dumps(content, indent=1, default=str) + "\n")


def _key(name: str, fingerprint: str) -> str:
    """Return the name of a stage's folder in `outdated/`."""
    return f"{name.replace('/', '-')}-{fingerprint[:12]}"


def read_records(workdir: Path) -> Mapping[str, Mapping[str, Any]]:
    """Read the records of stages: fingerprint, settings, finished or not, time and summary."""
    return StageRecords(workdir).current


def drop_outdated(workdir: Path, keep: Set[str]) -> None:
    """Delete the content of `outdated/`, except stages with these fingerprints."""
    StageRecords(workdir).drop(keep)


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Lock a workdir against a second process; the lock is released however this process ends.

    Raises:
      UserError: another process has the lock, or the workdir is not writable.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        opened = (workdir / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--workdir '{workdir}' cannot be written to ({error.strerror}); name a writable folder"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process uses --workdir '{workdir}'; wait for it, or choose another "
                "--workdir"
            ) from error
        except OSError as error:
            raise UserError(
                f"--workdir '{workdir}' is on a file system that cannot lock files "
                f"({error.strerror}), so that a second run could overwrite this one: mount it "
                "with locks (Lustre: -o flock), or choose another --workdir"
            ) from error
        yield
