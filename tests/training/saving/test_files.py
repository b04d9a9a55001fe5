"""Names, times and retention of saved files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.training.toy import toy_options
from training.saving.files import MinuteClock, Names, Saver


@dataclass
class Written:
    """A saver that writes a byte, and what it passed on."""

    folder: Path
    published: list[str] = field(default_factory=list)

    def saver(self, *arguments: object) -> Saver:
        options = toy_options(self.folder, *arguments).saving

        def write(_: str, path: Path) -> None:
            self.folder.mkdir(exist_ok=True)
            path.write_bytes(b"x")

        def publish(path: Path) -> None:
            self.published.append(path.name)

        return Saver(
            options,
            Names(self.folder, "x"),
            write,
            lambda folder: folder.mkdir(parents=True, exist_ok=True),
            publish,
            publish,
        )

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def test_every_5_and_last_5_steps_leave_two_files_at_step_25(tmp_path: Path) -> None:
    written = Written(tmp_path)
    saver = written.saver("--save_every_n_steps", 5, "--save_last_n_steps", 5)

    for step in range(5, 30, 5):
        saver.save_step(step)

    assert written.names() == ["x-step00000020.safetensors", "x-step00000025.safetensors"]


def test_states_have_a_retention_of_their_own(tmp_path: Path) -> None:
    written = Written(tmp_path)
    saver = written.saver(
        "--save_every_n_epochs", 1, "--save_last_n_epochs", 3, "--save_last_n_epochs_state", 1, "--save_state"
    )

    for epoch in range(1, 6):
        saver.save_epoch(epoch)

    files = [f"x-{epoch:06d}.safetensors" for epoch in (3, 4, 5)]
    assert written.names() == sorted([*files, "x-000005-state"])


def test_retention_touches_nothing_of_other_names(tmp_path: Path) -> None:
    written = Written(tmp_path)
    others = [
        "x-2-step00000002.safetensors",
        "y-step00000002.safetensors",
        "x-step2.safetensors",
        "x-step00000003.safetensors",
    ]
    for name in others:
        (tmp_path / name).touch()

    written.saver("--save_every_n_steps", 2, "--save_last_n_steps", 0).save_step(8)

    assert written.names() == sorted([*others, "x-step00000008.safetensors"])


def test_what_cannot_be_removed_now_goes_later_and_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = Written(tmp_path)
    saver = written.saver("--save_every_n_steps", 2, "--save_last_n_steps", 0, "--save_state")
    saver.save_step(2)
    (tmp_path / ".x-step00000002-state.removed.tmp" / "in the way").mkdir(parents=True)

    saver.save_step(4)

    assert "x-step00000002-state is kept for now" in caplog.text
    assert (tmp_path / "x-step00000002-state").exists()
    saver.remove_leftovers()
    saver.save_step(6)
    assert written.names() == ["x-step00000006-state", "x-step00000006.safetensors"]


def test_what_a_kill_left_behind_goes_with_the_next_save(tmp_path: Path) -> None:
    written = Written(tmp_path)
    saver = written.saver("--save_every_n_steps", 2, "--save_last_n_steps", 1)
    for step in (2, 4, 6):
        (tmp_path / f"x-step{step:08d}.safetensors").touch()
    for name in (".x.safetensors.12ab.tmp", ".x-000001-state.removed.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".x2.safetensors.12ab.tmp").touch()  # another run's

    saver.remove_leftovers()
    saver.save_step(8)

    assert written.names() == [".x2.safetensors.12ab.tmp", "x-step00000008.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["x.safetensors"]),
        (["--save_state"], ["x-state", "x.safetensors"]),
        (["--save_state_on_train_end"], ["x-state", "x.safetensors"]),
    ],
)
def test_a_state_is_saved_at_the_end_where_it_is_asked_for(
    tmp_path: Path, arguments: list[str], names: list[str]
) -> None:
    written = Written(tmp_path)

    written.saver(*arguments).save_final()

    assert written.names() == names
    assert sorted(written.published) == names


def test_saves_by_the_clock_come_after_so_many_minutes_and_are_counted_out_by_step(tmp_path: Path) -> None:
    now = 0.0
    clock = MinuteClock(2, lambda: now)
    now = 119.0
    assert not clock.is_due()
    now = 120.0
    assert clock.is_due()
    clock.restart()
    assert not clock.is_due()
    assert not MinuteClock(None, lambda: 1e9).is_due()

    written = Written(tmp_path)
    saver = written.saver("--save_every_n_minutes", 1, "--save_last_n_steps", 10)
    for step in (3, 11, 17, 25):
        saver.save_step(step)
    assert written.names() == ["x-step00000017.safetensors", "x-step00000025.safetensors"]


def test_files_are_named_by_epoch_and_step_and_say_where_the_run_stood(tmp_path: Path) -> None:
    from safetensors import safe_open

    from tests.training.toy import train_toy, write_caches

    write_caches(tmp_path, count=4)
    train_toy(tmp_path, "--save_every_n_epochs", 1, "--save_every_n_steps", 3, "--save_state")

    def read(name: str) -> dict[str, Any]:
        with safe_open(tmp_path / "output" / f"{name}.safetensors", "pt") as file:
            return file.metadata()

    stood = {
        name: (read(name)["ss_steps"], read(name)["ss_epoch"])
        for name in ("x-step00000003", "x-000001", "x-step00000006", "x")
    }
    assert stood == {
        "x-step00000003": ("3", "1"),
        "x-000001": ("4", "1"),
        "x-step00000006": ("6", "2"),
        "x": ("8", "2"),
    }
    # eight steps are two epochs; the last is no epoch file
    found = {path.name for path in (tmp_path / "output").iterdir()}
    assert found == {f"{name}.safetensors" for name in stood} | {f"{name}-state" for name in stood}
    assert read("x")["modelspec.architecture"] == "toy/lora"
    assert read("x")["ss_num_batches_per_epoch"] == "4"
