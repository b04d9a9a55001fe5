"""A run of a described folder writes below it, and sends nothing, unless its command line says otherwise."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modules import atomic_write
from modules.errors import OptionError, OutputError
from modules.pages.page import embed_clip
from modules.run_limits import FOLDERS_VARIABLE, is_limited, limit_run, reject_outside, reject_sending


def test_folders_below_those_of_the_run_are_allowed(tmp_path: Path) -> None:
    folder, logs = tmp_path / "clips", tmp_path / "logs"
    with limit_run([folder, logs], []):
        assert is_limited()
        reject_outside("output_dir", folder / "output")
        reject_outside("logging_dir", logs)
        for place in (tmp_path, tmp_path / "clips2", folder / ".." / "x", Path("/")):
            with pytest.raises(OptionError, match="is outside of"):
                reject_outside("output_dir", place)
    assert FOLDERS_VARIABLE not in os.environ
    reject_outside("output_dir", tmp_path)  # other commands have no limits


@pytest.mark.parametrize(
    ("option", "typed"),
    [("output_dir", "--output_dir"), ("to", "--models"), ("html", "--may_write"), ("", "--may_write")],
)
def test_a_refusal_says_what_to_type(option: str, typed: str, tmp_path: Path) -> None:
    with limit_run([tmp_path], command="run 'my clips'"), pytest.raises(OptionError) as error:
        reject_outside(option, tmp_path.parent / "x")
    assert str(error.value).endswith(f"type it: run 'my clips' {typed} {tmp_path.parent / 'x'}")


WRITERS: list[Callable[[Path], object]] = [
    lambda path: atomic_write.write_text(path, "x"),
    lambda path: atomic_write.append_text(path, "x"),
    lambda path: atomic_write.make_folder(path, "--output_dir"),
    lambda path: atomic_write.atomic_folder(path).__enter__(),
    lambda path: atomic_write.atomic_files(path).__enter__(),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "name", ["reelsmith-queue/queue.txt", "reelsmith-queue", "output/../Reelsmith-Queue/logs/1.log"]
)
def test_nothing_is_written_among_the_files_of_a_queue(
    write: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    own = tmp_path / "reelsmith-queue" / "making"  # of the page, for its own process
    own.mkdir(parents=True)
    with limit_run([tmp_path]), pytest.raises(OutputError, match="whose files say what is started"):
        write(tmp_path / name)
    with limit_run([tmp_path, own]):
        atomic_write.write_text(own / "1.json", "x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.json", "making", "reelsmith-queue"]


def test_an_option_names_no_folder_of_a_queue(tmp_path: Path) -> None:
    for name in ("reelsmith-queue", "REELSMITH-QUEUE/logs", "reelsmith-queue./x"):
        with limit_run([tmp_path]), pytest.raises(OptionError, match="whose files say what is started"):
            reject_outside("output_dir", tmp_path / name)


@pytest.mark.parametrize("write", WRITERS)
def test_nothing_is_written_through_a_link_that_leads_elsewhere(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "clips", tmp_path / "home"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "sample").symlink_to(elsewhere, target_is_directory=True)
    with limit_run([folder], []), pytest.raises(OutputError, match="is outside of"):
        write(folder / "sample" / "a")
    assert not [*elsewhere.iterdir()]


def test_nothing_is_appended_to_a_file_that_a_link_names(tmp_path: Path) -> None:
    folder, mine = tmp_path / "clips", tmp_path / "mine"
    folder.mkdir()
    mine.write_text("mine", encoding="utf-8")
    (folder / "history.jsonl").symlink_to(mine)
    with limit_run([folder], []):
        with pytest.raises(OutputError, match="is outside of"):
            atomic_write.append_text(folder / "history.jsonl", "x")
        atomic_write.write_text(folder / "history.jsonl", "new")  # takes the place of the link
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_page_embeds_clips_though_they_are_written_to_a_temporary_folder(tmp_path: Path) -> None:
    frames = [np.zeros((32, 32, 3), np.uint8)] * 3
    with limit_run([tmp_path], []):
        tag = embed_clip(frames, 8.0, "black")
        with pytest.raises(OutputError, match="is outside of"):
            atomic_write.write_text(tmp_path.parent / "other.txt", "x")
    assert "data:video/mp4;base64," in tag


def test_what_is_sent_is_typed(tmp_path: Path) -> None:
    reject_sending("log_with", "wandb")
    with limit_run([tmp_path], ["log_with"]):
        reject_sending("log_with", "wandb")
        with pytest.raises(
            OptionError, match="--huggingface_repo_id: .*type it: .* --huggingface_repo_id a/b"
        ):
            reject_sending("huggingface_repo_id", "a/b", run_has_option=True)
        with pytest.raises(
            OptionError, match="start the training itself, with the last command of .*--dry_run"
        ):
            reject_sending("resume_from_huggingface", True)
