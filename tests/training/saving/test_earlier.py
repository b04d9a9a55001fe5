"""A new training of a name keeps what an earlier one left, and two cannot save under one name at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modules.errors import OptionError, OutputError, UserError
from tests.commands import ROOT
from tests.training.toy import ToyFamily, same, toy_options, train_toy, write_caches
from training.run import prepare_run, train_network
from training.saving.files import hold_name
from training.saving.states import read_state

STATES = ("--save_every_n_steps", 4, "--save_state")
HOLDER = """
import sys, time
from pathlib import Path
from modules.file_locks import only_one
Path(sys.argv[1]).mkdir()
with only_one(Path(sys.argv[1]) / ".x.training.lock", waits=False):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_caches(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat --w 32 --h 32 --f 1 --s 1 --d 1\n", encoding="utf-8")
    return tmp_path


def results(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if ".before-" not in path.as_posix()}


def asides(folder: Path) -> list[Path]:
    return sorted((folder / "output").glob("x.before-*"))


def test_a_new_training_sets_all_results_of_an_earlier_one_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = folder / "output"
    samples = ["--sample_prompts", folder / "prompts.txt", "--sample_every_n_steps", 4]
    first = train_toy(folder, *STATES, *samples, has_page=True)
    (output / "xy.safetensors").touch()  # of others
    (output / "x_comfy.safetensors").touch()
    before = results(output)
    caplog.clear()
    caplog.set_level("INFO")

    second = train_toy(folder, "--seed", 4)

    (aside,) = asides(folder)
    assert results(aside) == before - {"xy.safetensors", "x_comfy.safetensors"}
    assert results(output) == {"x.safetensors", "xy.safetensors", "x_comfy.safetensors"}
    assert same(load_file(aside / "x.safetensors"), first)
    assert not same(first, second)
    told = [record.getMessage() for record in caplog.records if str(aside) in record.getMessage()]
    assert len(told) == 1
    assert "3 states" in told[0]


def test_what_an_earlier_run_left_is_replaced_on_request(folder: Path) -> None:
    train_toy(folder)
    second = train_toy(folder, "--seed", 4, "--overwrite")

    assert not asides(folder)
    assert same(load_file(folder / "output" / "x.safetensors"), second)


def test_what_goes_on_or_fails_or_only_shows_moves_nothing(folder: Path) -> None:
    train_toy(folder, *STATES, "--max_train_steps", 4, has_page=True)
    before = results(folder / "output")

    assert train_network(ToyFamily(), toy_options(folder, "--check")) == 0
    with pytest.raises(UserError):
        train_toy(folder, "--network_args", "no_such=1")
    assert results(folder / "output") == before
    train_toy(folder, *STATES, "--resume", "latest", has_page=True)

    assert not asides(folder)
    assert before <= results(folder / "output")


def test_a_file_to_start_from_stays_where_the_command_names_it(folder: Path) -> None:
    first = train_toy(folder)
    file = folder / "output" / "x.safetensors"
    with prepare_run(ToyFamily(), toy_options(folder, "--network_weights", file)):
        (aside,) = asides(folder)
        assert file.is_file()
        assert (aside / "x.safetensors").is_file()

    second = train_toy(folder, "--network_weights", file)

    assert len(asides(folder)) == 2
    assert all(same(load_file(aside / "x.safetensors"), first) for aside in asides(folder))
    assert not same(first, second)


def test_a_state_that_was_set_aside_goes_on_and_its_successor_is_set_aside_then(folder: Path) -> None:
    train_toy(folder, *STATES, has_page=True)
    alone = train_toy(folder, *STATES, "--max_train_steps", 12, "--overwrite")
    train_toy(folder, *STATES, has_page=True)  # sets the run of twelve steps aside
    (aside,) = asides(folder)
    third = read_state(folder / "output" / "x-state").progress.session_id

    longer = train_toy(
        folder, "--max_train_steps", 12, "--resume", aside / "x-step00000008-state", has_page=True
    )

    assert same(longer, alone)
    assert (aside / "x-state").is_dir()
    (other,) = set(asides(folder)) - {aside}
    assert read_state(other / "x-state").progress.session_id == third


def test_without_a_state_a_new_run_names_those_set_aside_and_latest_or_fail_ends(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OptionError, match="there is no state of x in"):
        train_toy(folder, "--resume", "latest-or-fail")
    train_toy(folder, "--save_state")
    train_toy(folder)
    (aside,) = asides(folder)

    with pytest.raises(OptionError, match="x-state: --resume takes it"):
        train_toy(folder, "--resume", "latest-or-fail")
    train_toy(folder, "--resume", "latest")

    assert f"That of an earlier run is {aside / 'x-state'}" in caplog.text


def test_what_a_run_left_that_had_saved_nothing_is_not_kept_when_it_is_started_again(folder: Path) -> None:
    class Killed(Exception): ...

    def die(_: int) -> None:
        raise Killed

    for arguments, count in (["--resume", "latest"], 0), ([], 1):
        with pytest.raises(Killed):
            train_toy(folder, *arguments, family=ToyFamily(watch=die), has_page=True)
        assert (folder / "output" / "x.html").is_file()
        assert len(asides(folder)) == count


def test_the_second_of_two_runs_of_a_name_is_refused_while_the_first_one_lives(folder: Path) -> None:
    output = folder / "output"
    command = [sys.executable, "-c", HOLDER, str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="--output_name x: another training is saving under this name"):
            train_toy(folder)
        assert not (output / "x.safetensors").exists()
        with hold_name(output, "y"):
            pass
        other.kill()
    train_toy(folder)


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        train_toy(tmp_path)

    assert not (tmp_path / "output").exists()
