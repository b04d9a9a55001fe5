"""--on_end: when the command of a run is started, with what, and what refuses it."""

import json
import logging
import os
import shlex
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from modules.errors import OptionError, UserError
from modules.installation import FROM_QUEUE, RUN_GOES_ON
from modules.run_limits import limit_run
from modules.typed_command import read_command
from tests.commands import assert_user_error, run_in_processes, run_script
from tests.tiny.families import FAMILIES
from tests.tiny.runs import RUN, TinyProject, make_project
from tests.training import toy
from training.features.composing import act_at_end, call_end_hooks
from training.features.on_end import EndOptions
from training.options import read_arguments
from training.run import train_network
from training.run_end import EndedRun, start_command

# appends what it was started with to a file
SCRIPT = """
import json, os, sys
facts = {name: value for name, value in os.environ.items() if name.startswith(("REELSMITH_", "RANK"))}
facts["words"] = sys.argv[2:]
folder = os.environ["REELSMITH_OUTPUT_DIR"]
facts["files"] = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(facts) + "\\n")
"""


def command(folder: Path, *words: str) -> str:
    """A command that writes what it is started with, as it is typed behind --on_end."""
    script = folder / "notify me.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return shlex.join([sys.executable, str(script), str(folder / "said.jsonl"), *words])


def said(folder: Path) -> list[dict[str, str]]:
    path = folder / "said.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(folder: Path, *words: object, family: toy.ToyFamily | None = None, has_page: bool = False) -> None:
    typed = "--on_end", command(folder, "to", "me; $HOME")
    toy.train_toy(folder, *typed, *words, family=family, has_page=has_page)


def test_it_starts_once_at_the_end_after_all_files(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)

    train(tmp_path, has_page=True)

    (info,) = said(tmp_path)
    assert info.pop("words") == ["to", "me; $HOME"]  # no shell has read them
    assert {"x.html", "x-history.jsonl", "x.safetensors"} <= {*info.pop("files")}
    assert info == {
        "REELSMITH_STATE": "finished",
        "REELSMITH_EXIT_CODE": "0",
        "REELSMITH_OUTPUT_DIR": str(tmp_path / "output"),
        "REELSMITH_OUTPUT_NAME": "x",
        "REELSMITH_STEP": "8",
        "REELSMITH_STEPS": "8",
        "REELSMITH_PAGE": str(tmp_path / "output" / "x.html"),
        "REELSMITH_ERROR": "",
    }
    for name in ("x.html", "x-history.jsonl"):  # a command may hold a key
        assert "notify me" not in (tmp_path / "output" / name).read_text(encoding="utf-8")


def test_a_stop_and_an_error_are_reported_with_the_step(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, bad=2)

    def interrupt(passes: int) -> None:
        if passes == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    train(tmp_path, family=toy.ToyFamily(watch=interrupt))
    with pytest.raises(UserError, match="the loss is nan"):
        train(tmp_path, "--resume", "latest")

    stopped, failed = said(tmp_path)
    assert (stopped["REELSMITH_STATE"], stopped["REELSMITH_EXIT_CODE"]) == ("stopped", "0")
    assert (stopped["REELSMITH_STEP"], stopped["REELSMITH_STEPS"]) == ("1", "8")
    assert stopped["REELSMITH_PAGE"] == stopped["REELSMITH_ERROR"] == ""
    assert (failed["REELSMITH_STATE"], failed["REELSMITH_EXIT_CODE"]) == ("failed", "1")
    assert "the loss is nan" in failed["REELSMITH_ERROR"]
    assert "\n" not in failed["REELSMITH_ERROR"]


def test_a_run_that_ends_early_has_finished(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)

    still = ("--learning_rate", 0, "--validation_split", 0.4, "--validate_every_n_steps", 2)
    train(tmp_path, *still, "--early_stopping_patience", 1)

    (info,) = said(tmp_path)
    assert (info["REELSMITH_STATE"], info["REELSMITH_EXIT_CODE"]) == ("finished", "0")
    assert (info["REELSMITH_STEP"], info["REELSMITH_STEPS"]) == ("4", "8")


@pytest.mark.parametrize("words", [("--check",), ("--plan",), ("--show_timesteps", "console")])
def test_what_trains_nothing_starts_nothing(tmp_path: Path, words: tuple[str, ...]) -> None:
    toy.write_caches(tmp_path)
    typed = "--on_end", command(tmp_path)

    train_network(toy.ToyFamily(), toy.toy_options(tmp_path, *typed, *words))

    assert said(tmp_path) == []


def test_wrong_options_start_nothing_and_missing_caches_do(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, count=0)
    with pytest.raises(OptionError):
        train(tmp_path, "--optimizer_type", "adanw")
    assert said(tmp_path) == []

    with pytest.raises(UserError):
        train(tmp_path)

    (info,) = said(tmp_path)
    assert (info["REELSMITH_STATE"], info["REELSMITH_STEP"]) == ("failed", "0")


def test_a_command_that_fails_or_does_not_end_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = EndedRun(tmp_path, "x", step=1, steps=1, is_finished=True, page=None)
    for code in ("raise SystemExit(3)", "import time; time.sleep(20)"):
        words = [sys.executable, "-c", code]
        max_seconds = 0.5 if "time" in code else 60
        start_command("--on_end", words, info, None, has_begun=True, max_seconds=max_seconds)
    start_command("--on_end", [str(tmp_path / "gone")], info, None, has_begun=True)

    failed, alone, gone = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert "failed with exit code 3" in failed
    assert "It is left alone" in alone
    assert "cannot be started" in gone


def test_it_starts_once_whoever_asks(tmp_path: Path) -> None:
    options = toy.toy_options(tmp_path, "--on_end", command(tmp_path), "--max_train_epochs", 2)

    with call_end_hooks(options.features) as end:
        act_at_end(end, UserError("the processes have not joined yet"))
        end.is_due = True
        act_at_end(end, UserError("process 1 was lost"))

    (told,) = said(tmp_path)
    assert told["REELSMITH_ERROR"] == "process 1 was lost"
    assert told["REELSMITH_STEPS"] == ""


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("no-such-program --to me", "no-such-program is not a program"),
        ("'open", "no closing quotation. Close the quotes"),
        ("notify.py", 'Start it with Python: --on_end "python notify.py"'),
        ("./folder", "is a folder"),
        ("./plain", "may not be executed"),
        ("python3 gone.py", "there is no script gone.py"),
        ("echo done > file", "> is for a shell"),
        ("echo done; echo more", "done; is for a shell"),
        ("echo $REELSMITH_STATE", "is replaced by a shell"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="commands of a Unix shell")
def test_what_cannot_be_started_is_refused_when_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").touch(mode=0o644)

    with pytest.raises(OptionError) as rejection:
        _ = EndOptions(on_end=typed).make_command

    assert message in str(rejection.value)
    assert rejection.value.exit_code == 2


@pytest.mark.skipif(os.name == "nt", reason="commands of a Unix shell")
def test_a_shell_can_be_given_its_own_line() -> None:
    assert read_command("--on_end", "sh -c 'echo $REELSMITH_STATE > file; true'")[2].startswith("echo")


def test_no_file_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[training]\non_end = "echo"\n')
    with pytest.raises(OptionError, match="on_end starts a program, and no file may do that"):
        read_arguments(toy.toy_parser(False), ["--config_file", str(config)], {})

    for variable in (RUN_GOES_ON, FROM_QUEUE):
        with monkeypatch.context() as patched:
            patched.setenv(variable, "1")
            with pytest.raises(OptionError, match="--on_end starts a program"):
                EndOptions(on_end="echo")
    with limit_run([tmp_path], {"on_end"}):
        EndOptions(on_end=f"{shlex.quote(sys.executable)} -c 1")  # which `run` alone starts


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    return make_project(FAMILIES[0], tmp_path_factory.mktemp("wan"))


def test_the_script_keeps_its_exit_code_and_refuses_at_the_start(project: TinyProject) -> None:
    folder = project.folder
    script, *words = project.family.train
    words += [*RUN, "--output_dir", "output"]
    (folder / "fail.py").write_text(textwrap.dedent(SCRIPT) + "\nraise SystemExit(7)\n")
    typed = shlex.join([sys.executable, "fail.py", "said.jsonl"])

    done = run_script(script, *words, "--on_end", typed, folder=folder)
    refused = run_script(script, *words, "--on_end", "no-such-program", folder=folder, check=False)

    (info,) = said(folder)
    assert info["REELSMITH_STATE"] == "finished"
    assert info["REELSMITH_OUTPUT_DIR"] == "output"
    assert "has failed with exit code 7" in done.stderr
    assert refused.returncode == 2
    assert_user_error(refused, "--on_end: no-such-program is not a program", "Fix the name")


def test_of_several_processes_the_first_starts_it_once(project: TinyProject, tmp_path: Path) -> None:
    script, *words = project.family.train
    words += [*RUN, "--output_dir", str(tmp_path / "two"), "--on_end", command(tmp_path)]

    run_in_processes(2, script, *words, folder=project.folder)

    (info,) = said(tmp_path)
    assert info["REELSMITH_STEP"] == "3"
    assert "RANK" not in info
