"""Features of training, kinds of networks, ways to run, forms of data: each can be deleted with its lines."""

from pathlib import Path

import pytest

from dataset.forms.row_formats import ROWS
from modules.errors import CheckpointError
from tests import deleting
from tests.training import toy
from training.features.skip import SkipProgress
from training.resuming import initial_progress
from training.saving.states import SavedState, read_state
from training.steps import Progress

NAMES = list(deleting.FOLDERS)  # of features, kinds of networks, ways to run and forms of data


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_lies_in_one_file_can_be_deleted(tmp_path: Path, name: str) -> None:
    assert deleting.check_deletion(name, tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_deletion_takes_away_files_and_lines(tmp_path: Path, name: str) -> None:
    """Without this the test above could compare two trees that are the same."""
    folder = deleting.FOLDERS[name]
    lists = deleting.LISTS.get(folder, ())
    deleting.copy_tree(tmp_path, folder, *lists, *deleting.WRITERS.get(name, ()))
    is_row_format = deleting.FORM_FILES.get(name) in ROWS
    listing = tmp_path / folder / ("row_formats.py" if is_row_format else "__init__.py")
    before = listing.read_text(encoding="utf-8")

    deleted = deleting.delete_from(tmp_path, name)

    assert f"{name}.py" in deleted
    after = listing.read_text(encoding="utf-8")
    # the import and the line of the list
    assert len(before.splitlines()) - len(after.splitlines()) == 2
    assert name.upper() not in after


def make_progress() -> Progress:
    return Progress(seed=1, session_id=2, started_at=3.0)


def test_what_a_feature_remembers_is_next_to_the_progress_of_the_run_in_a_state() -> None:
    progress = make_progress()
    progress.feature_state(SkipProgress).norms["low"] = [1.0, 2.0]

    saved = progress.as_state()

    assert saved["norms"] == {"low": [1.0, 2.0]}
    assert saved["bad_in_a_row"] == 0
    assert Progress.from_state(saved).feature_state(SkipProgress) == progress.feature_state(SkipProgress)


def test_a_state_of_before_a_feature_begins_with_its_usual_values() -> None:
    progress = Progress.from_state({"seed": 1, "session_id": 2, "started_at": 3.0, "step": 7})

    assert progress.step == 7
    assert progress.feature_state(SkipProgress) == SkipProgress()


def test_what_a_feature_that_is_off_remembered_stays_in_states(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--max_train_steps", 2, "--save_state", "--skip_bad_steps", 3)
    state = tmp_path / "output" / "x-state"
    toy.train_toy(tmp_path, "--max_train_steps", 4, "--save_state", "--resume", state)

    resumed = read_state(state)
    assert isinstance(resumed, SavedState)
    assert resumed.progress.step == 4
    assert resumed.progress.unclaimed.keys() == {"bad_in_a_row", "spikes_in_a_row", "norms"}


@pytest.mark.parametrize("values", [{"norms": 5}, {"bad_in_a_row": "1"}])
def test_values_of_another_type_are_an_error_of_the_state(tmp_path: Path, values: dict[str, object]) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--max_train_steps", 2, "--save_state")
    state = read_state(tmp_path / "output" / "x-state")
    assert isinstance(state, SavedState)
    state.progress.unclaimed.update(values)

    with pytest.raises(CheckpointError, match=next(iter(values))):
        initial_progress(toy.toy_options(tmp_path, "--skip_bad_steps", 3), state)
