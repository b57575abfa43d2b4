"""`stages.json` in a workdir: the record of each stage, what was set aside, and the lock."""

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
        except ValueError as error:
            raise UserError(
                f"'{self._path}' is damaged ({error}), and without it nobody knows which stages "
                f"of the run are done: bring back a copy, or "
                "choose another --workdir (checkpoints and export in this one are not touched)"
            ) from error
        self.identity: dict[str, str] = content.get("run", {})
        self.current: dict[str, dict] = content.get("stages", {})
        self._outdated: dict[str, dict] = content.get(OUTDATED, {})

    def remember(self, identity: Mapping[str, str]) -> None:
        """Record what makes this run another than one of other inputs."""
        self.identity = dict(identity)
        self._write()

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Replace a stage's record."""
        self.current[name] = dict(record)
        self._write()

    def finish(self, name: str, seconds: float, summary: Mapping[str, Any]) -> None:
        """Record that a stage is finished."""
        self.count(name, seconds, finished=True, summary=summary)

    def count(self, name: str, seconds: float, **more: Any) -> None:
        """Adds to the time that a stage took, which may be over several runs of the command, and
        writes `more` beside it.
        """
        record = self.current[name]
        self.put(name, {**record, "seconds": round(record.get("seconds", 0) + seconds, 2), **more})

    def set_aside(self, name: str, folder: Path) -> None:
        """Move an artifact that no longer fits to `outdated/NAME-FINGERPRINT`."""
        record = self.current[name]
        if folder.exists():
            key = f"{name.replace('/', '-')}-{record['fingerprint'][:12]}"
            place = self._workdir / OUTDATED / key
            place.parent.resolve().mkdir(exist_ok=True)
            if place.exists():  # the same stage with the same settings, aside since before
                os.replace(place, unused(place.with_name(f"{key}.before")))
            self._outdated[key] = record
            self._write()
            shutil.move(folder, place)  # perhaps to another disk
        del self.current[name]
        self._write()

    def restore(self, name: str, fingerprint: str, folder: Path) -> bool:
        """Bring back an artifact made with these settings; return whether it was finished."""
        key = f"{name.replace('/', '-')}-{fingerprint[:12]}"
        place = self._workdir / OUTDATED / key
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
        """Remove artifacts that are aside, but for those with these fingerprints."""
        for key in [
            key for key, record in self._outdated.items() if record["fingerprint"] not in keep
        ]:
            del self._outdated[key]
            shutil.rmtree(self._workdir / OUTDATED / key, ignore_errors=True)
        self._write()

    def _write(self) -> None:
        content = {"run": self.identity, "stages": self.current, OUTDATED: self._outdated}
        write_whole(self._path, json.dumps(content, indent=1, default=str) + "\n")


def read_records(workdir: Path) -> Mapping[str, Mapping[str, Any]]:
    """What is known of each stage: fingerprint, settings, whether it is finished, its time and
    summary.
    """
    return StageRecords(workdir).current


def drop_outdated(workdir: Path, keep: Set[str]) -> None:
    """Remove what is in `outdated/`, but for the stages with these fingerprints."""
    StageRecords(workdir).drop(keep)


@contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keep a second process out of a workdir; the lock goes with the process, however it ends.

    Raises:
      UserError: another process has it, or it cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        opened = (workdir / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"--workdir '{workdir}' cannot be written to ({error.strerror}); name a folder that "
            f"you may write to"
        ) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process runs in --workdir '{workdir}'; wait for it, or choose another "
                f"--workdir"
            ) from error
        except OSError as error:
            raise UserError(
                f"--workdir '{workdir}' is on a file system that cannot lock files "
                f"({error.strerror}), so that a second run could write "
                "over this one: mount it with locks (Lustre: -o flock), or choose another "
                "--workdir"
            ) from error
        yield
