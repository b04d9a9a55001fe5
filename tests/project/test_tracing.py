"""What the browser shows of `run` before its training has a page."""

from pathlib import Path

import pytest

from browser.runs.runs import DIED, RUNNING, STOPPED, Runs
from modules.errors import OptionError
from project.tracing import RunTrace, describe_step, trace_run
from training.reports.history import History, history_path

CHECK = ["python", "wan_cache_latents.py", "--dataset_config", "dataset.toml", "--check"]
TRAIN = ["python", "wan_train_network.py", "--config_file", "run.toml"]


def begin(trace: RunTrace, folder: Path) -> None:
    trace.begin(["run", str(folder), "--download"], folder / "output", "clips", 10)


def end_with(error: BaseException, folder: Path) -> None:
    with trace_run() as trace:
        begin(trace, folder)
        trace.note(CHECK)
        raise error


@pytest.mark.parametrize(
    ("words", "doing"),
    [
        (["python", "tools/download.py", "--family", "wan"], "downloading the model"),
        (CHECK, "checking the files"),
        (CHECK[:-1], "caching latents"),
        (["python", "krea2_cache_text_encoder_outputs.py"], "caching captions"),
        (TRAIN, "training"),
        (["python", "wan_train.py"], "training"),
        (["python", "train_network.py"], "training"),
        (["python", "sdxl_train_control_net_lllite.py"], "training"),
        (["python", "train_textual_inversion.py"], "training"),
    ],
)
def test_each_step_of_a_run_is_named(words: list[str], doing: str) -> None:
    assert describe_step(words) == doing


def test_a_run_that_checks_and_caches_is_listed_with_what_it_does(tmp_path: Path) -> None:
    with trace_run() as trace:
        begin(trace, tmp_path)
        trace.note(CHECK)
        [run] = Runs([tmp_path]).list_all()
        assert (run.name, run.state, run.doing) == ("clips.run", RUNNING, "checking the files")
        trace.note(CHECK[:-1])
        [run] = Runs([tmp_path]).list_all()
        assert run.doing == "caching latents"
    assert Runs([tmp_path]).list_all() == []  # it went well: its training tells the rest


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (SystemExit(1), DIED, "ended while checking the files: exit code 1"),
        (OptionError("--vae x is missing"), DIED, "ended while checking the files: --vae x is missing"),
        (KeyboardInterrupt(), STOPPED, "ended while checking the files: it was stopped"),
    ],
)
def test_a_run_that_ended_at_a_check_leaves_a_trace(
    tmp_path: Path, error: BaseException, state: str, reason: str
) -> None:
    with pytest.raises(type(error)):
        end_with(error, tmp_path)
    runs = Runs([tmp_path])
    [run] = runs.list_all()
    assert (run.state, run.ending and run.ending[0]) == (state, reason)
    [command] = runs.open(run).run_history.commands
    assert command.bash.endswith(f"reelsmith.py run {tmp_path} --download")


def test_a_training_takes_the_place_of_the_trace_and_tells_its_own_end(tmp_path: Path) -> None:
    trace = RunTrace()
    begin(trace, tmp_path)
    trace.note(TRAIN)
    history = History(history_path(tmp_path / "output", "clips"), 2)
    history.add(1, loss=1.0)
    history.flush()
    assert [run.name for run in Runs([tmp_path]).list_all()] == ["clips"]
    trace.end("exit code 1", "bad")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["clips-history.jsonl"]
