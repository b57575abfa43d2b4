"""Exit codes, signals and flags of the run command. Whole runs are in tests/pipeline."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import tokalign_jax
from tests.processes import free_port
from tokalign_jax import config_files, main
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import distributed
from tokalign_jax.utils import stopping
from tokalign_jax.utils.progress import Progress


def run(monkeypatch, work, *flags: str) -> int:
    """Run the command with `work(log)` in place of the pipeline."""
    pipeline = SimpleNamespace(run=lambda config, workdir, selected, log: work(log))
    monkeypatch.setitem(sys.modules, "tokalign_jax.pipeline", pipeline)
    monkeypatch.setattr(tokalign_jax, "pipeline", pipeline, raising=False)
    return main.main(["main", "--workdir", "nowhere", *flags])


def test_default_config_can_be_overridden(monkeypatch):
    seen = []
    pipeline = SimpleNamespace(run=lambda config, *_: seen.append(config.stage1.steps))
    monkeypatch.setitem(sys.modules, "tokalign_jax.pipeline", pipeline)
    monkeypatch.setattr(tokalign_jax, "pipeline", pipeline, raising=False)
    assert main.main(["main", "--config.stage1.steps=7", "--workdir", "nowhere"]) == 0
    assert seen == [7]


def test_workdir_may_begin_with_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    pipeline = SimpleNamespace(run=lambda config, workdir, *_: seen.append(workdir))
    monkeypatch.setitem(sys.modules, "tokalign_jax.pipeline", pipeline)
    monkeypatch.setattr(tokalign_jax, "pipeline", pipeline, raising=False)
    assert main.main(["main", "--workdir=~/run"]) == 0
    assert (
        seen == [tmp_path / "run"] and f"everything is in {tmp_path}/run" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("def get_config(:", "line 1"),
        ("seed = 1", "get_config"),
        ("def get_config():\n    pass", "returns NoneType"),
        ("def get_config():\n    import nothing_like_it", "line 2: ModuleNotFoundError"),
    ],
)
def test_error_names_a_file_that_is_no_config(content, says, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(content)
    with pytest.raises(UserError, match=f"'{file}'.*{says}"):
        config_files.get_config(str(file))


def test_config_file_that_raises_is_a_user_error(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import nothing_like_it")
    assert main.main(["main", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run"]) == 2
    assert "mine.py' cannot be used (line 1: ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--plan_devices=-2", "plan_devices"),
        ("--plan_mfu=0", "plan_mfu"),
        ("--plan_tokens_per_second=-3", "plan_tokens_per_second"),
        ("--config.stage1.batch.sequence_length=4096", "stage1.batch.sequence_length is 4096"),
    ],
)
def test_impossible_plan_is_refused(flag, says, capsys):
    assert main.main(["main", "--plan", flag]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.stage1=3"], "'stage1' is a group of fields"),
        (["--config.stage1", "3"], "such as --config.stage1.embedding_learning_rate="),
        (["--config.stage2.optimizer=adam"], "'stage2.optimizer' is a group of fields"),
        (["--config.stage1.steps=7", "--config.stage1={'steps': 5}"], "a group of fields"),
        (["--config.seed=1", "--noconfig.evaluation"], "'evaluation' is a group of fields"),
        (["--config.end_of_text=None"], "--config.end_of_text= is empty"),
        (["--config.source_model="], "source_model is empty"),
        (["--config.target_tokenizer="], "target_tokenizer is empty"),
        (["--workdir="], "--workdir: it is empty"),
    ],
)
def test_empty_and_contradicting_flags_are_refused(flags, says, tmp_path, monkeypatch, capsys):
    """Each was a traceback, another field's value, or the current folder."""
    monkeypatch.chdir(tmp_path)
    try:
        code = main.main(["main", f"--workdir={tmp_path}/run", *flags])
    except SystemExit as exit:  # argparse's
        code = exit.code
    assert code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "run" / "stages.json").exists()


def fail(error: Exception):
    raise error


def test_exit_codes(monkeypatch, capsys):
    assert run(monkeypatch, lambda log: log("a line")) == 0
    assert "a line" in capsys.readouterr().out
    assert run(monkeypatch, lambda log: fail(UserError("no corpus: name one"))) == 2
    assert "error: no corpus: name one" in capsys.readouterr().err
    with pytest.raises(KeyError):  # its traceback, and 1 from the interpreter
        run(monkeypatch, lambda log: fail(KeyError("bug")))
    assert main.main(["main", "--workdir", "x", "--config.stage1.step=3"]) == 2
    assert "stage1.steps" in capsys.readouterr().err
    assert main.main(["main"]) == 2
    assert main.main(["main", "--help"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_at_the_next_progress_line_and_restores_handlers(monkeypatch, capsys, number):
    before = signal.getsignal(number)

    def work(log):
        progress = Progress(log, "tokens", 100)
        progress.update()
        os.kill(os.getpid(), number)
        assert stopping.asked() and stopping.requested()
        progress.update()
        raise AssertionError("went on")

    assert run(monkeypatch, work) == 75
    assert "the same command resumes" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert run(monkeypatch, lambda log: Progress(log, "tokens", 1).update()) == 0, (
        "asked once, for one run"
    )


STUBBORN = """
import sys, time
from pathlib import Path
from tokalign_jax.utils import stopping
stopping.SAME_REQUEST = 0.05
with stopping.listening():
    Path(sys.argv[1]).touch()
    time.sleep(60)
"""


def test_second_signal_kills_at_once(tmp_path):
    ready = tmp_path / "ready"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, ready], env=environment, stderr=subprocess.PIPE
    )
    while not ready.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert (
        process.stderr
        and b"stop requested" in process.stderr.readline() + process.stderr.readline()
    )
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM


def test_lost_process_is_no_bug(monkeypatch, capsys):
    def work(log):
        raise distributed.ProcessLost("process 1 of 2 was lost")

    assert run(monkeypatch, work) == 134
    output = capsys.readouterr().err
    assert "process 1 of 2 was lost" in output and "Traceback" not in output


def test_two_signals_at_once_are_one_request(monkeypatch):
    def work(log):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        stopping.check()

    assert run(monkeypatch, work) == 75


def test_incomplete_flags_of_several_processes_are_refused(monkeypatch, capsys):
    assert run(monkeypatch, lambda log: None, "--coordinator=host:1", "--processes=2") == 2
    assert "--process" in capsys.readouterr().err


TWO = """
import sys
from types import SimpleNamespace
from tokalign_jax import config_files, main
from tokalign_jax.parallel import distributed
from tokalign_jax.errors import UserError

def work(config, workdir, selected, log):
    log(f"line of {distributed.index()}")
    distributed.on_first(lambda: None)
    if distributed.index() == 1 and sys.argv[1] == "fails":
        raise KeyError("lost")
    distributed.barrier("done")

sys.modules["tokalign_jax.pipeline"] = SimpleNamespace(run=work)
sys.exit(main.main(["main", "--workdir", "nowhere", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(("scene", "code"), [("works", 0), ("fails", 1)])
def test_first_of_two_processes_logs_and_a_failure_ends_both(scene, code):
    coordinator = f"--coordinator=localhost:{free_port()}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, scene, coordinator, "--processes=2", f"--process={i}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ended = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [code, code], ended
    assert "line of 0" in ended[0][0] and "line of" not in ended[1][0]
    if code:
        assert "KeyError" in ended[1][1] and "process 1: " in ended[1][1]
        assert "process 1 failed: KeyError: 'lost'" in ended[0][1]


@pytest.mark.parametrize(
    "field",
    [
        "workdir",
        "config.corpus",
        "config.source_model",
        "config.target_tokenizer",
        "config.alignment.file",
    ],
)
def test_too_long_a_file_name_is_reported(field, tmp_path, capsys):
    long = f"{tmp_path}/{'x' * 300}"
    given = {"workdir": f"{tmp_path}/run", field: long}
    assert main.main(["main", *(f"--{name}={value}" for name, value in given.items())]) == 2
    output = capsys.readouterr().err
    assert (
        "xxxxx" in output
        and ("is too long" in output or "does not exist" in output)
        and "Traceback" not in output
    )
    assert not (tmp_path / "run" / "stages.json").exists()
