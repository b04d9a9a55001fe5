"""Prompts that are edited while a training runs: the next round of samples is that of a run that had them."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.errors import MediaError
from protocols.family import TextEncoder
from tests.tiny.families import FAMILIES, TinyFamily
from tests.tiny.runs import TinyProject, make_project
from tests.training import test_processes
from tests.training.toy import ToyFamily, same, train_toy, write_caches, write_prompts
from training import edited_prompts

Edits = dict[int, str | None]  # by the round, counted from 1; None: the file is removed
Edit = Callable[[Path, Edits], None]
EVERY_STEP = ("--sample_prompts", "prompts.txt", "--sample_every_n_steps", 1)
TRIED = ("wan t2v-1.3B", "flux")  # others are tried by the slow tests


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Edit:
    """Return what has a prompt file edited before rounds of samples."""

    def plan(path: Path, edits: Edits) -> None:
        rounds: list[int] = []
        take = edited_prompts.take_edited_prompts

        def take_after_edit(*given: object) -> object:
            rounds.append(1)
            if len(rounds) in edits:
                text = edits[len(rounds)]
                path.unlink(missing_ok=True)
                if text is not None:
                    path.write_text(text, encoding="utf-8")
            return take(*given)

        monkeypatch.setattr(edited_prompts, "take_edited_prompts", take_after_edit)

    return plan


def list_families() -> list[object]:
    return [
        pytest.param(family, id=family.name, marks=[] if family.name in TRIED else pytest.mark.slow)
        for family in FAMILIES
    ]


def samples_of(made: TinyProject, output: str, step: int) -> dict[str, bytes]:
    """Return the samples of a step by what their names say besides the time, without the sheet."""
    found = {}
    for path in (made.folder / output / "sample").glob(f"x_{step:06d}_*"):
        if "_sheet" not in path.name:
            parts = path.stem.split("_")
            found["_".join([parts[2], *parts[4:]]) + path.suffix] = path.read_bytes()
    return found


@pytest.mark.slow_cases("flux")
@pytest.mark.parametrize("family", list_families())
def test_the_next_round_has_the_samples_of_a_run_that_was_started_with_the_edited_prompts(
    tmp_path: Path, edit: Edit, family: TinyFamily, caplog: pytest.LogCaptureFixture
) -> None:
    """A new text, the earlier one with another seed, and the earlier one as it was; the LoRA is the same."""
    made = make_project(family, tmp_path)
    prompts = tmp_path / "prompts.txt"
    before = f"{family.sample_line}\n"
    new = family.sample_line.replace(family.sample_line.split(" --")[0], "a red barge in fog", 1)
    edited = f"{new}\n# a comment\n{family.sample_line} --d 77\n{before}"
    prompts.write_text(edited, encoding="utf-8")
    wanted = made.train("wanted", *EVERY_STEP)
    prompts.write_text(before, encoding="utf-8")
    edit(prompts, {2: edited})

    trained = made.train("output", *EVERY_STEP)

    assert same(wanted, trained)
    assert len(samples_of(made, "output", 1)) < len(samples_of(made, "output", 2))
    for step in (2, 3):
        assert samples_of(made, "output", step) == samples_of(made, "wanted", step) != {}


CAT = "a cat --f 1 --s 2 --d 1\n"
DOG = "a dog --f 1 --s 2 --d 1\n"


def train_edited(tmp_path: Path, edit: Edit, edits: Edits, rounds: int = 4) -> list[str]:
    """Train the toy family with a round of samples after each step; return what was made, in order."""
    write_caches(tmp_path)
    prompts = write_prompts(tmp_path, CAT)
    edit(prompts, edits)
    times = ["--sample_every_n_steps", 1, "--max_train_steps", rounds]
    train_toy(tmp_path, "--sample_prompts", prompts, *times)
    return list_made(tmp_path)


def list_made(tmp_path: Path) -> list[str]:
    """Return step, prompt's number and seed of all samples."""
    names = sorted(path.stem.split("_") for path in (tmp_path / "output" / "sample").glob("x_0*_0?_*"))
    return [f"{int(name[1])}.{int(name[2])} seed {name[4]}" for name in names]


def record_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of what text encoders are asked for from now on: loads, and texts."""
    asked: list[str] = []
    kind = type(ToyFamily().text_encoders()[0])
    load, encode = kind.load, kind.encode

    def watch_load(self: TextEncoder, device: torch.device) -> None:
        asked.append("load")
        load(self, device)

    def watch_encode(self: TextEncoder, prompts: list[Any]) -> Any:
        asked.extend(prompt.text for prompt in prompts)
        return encode(self, prompts)

    monkeypatch.setattr(kind, "load", watch_load)
    monkeypatch.setattr(kind, "encode", watch_encode)
    return asked


def test_encoders_are_loaded_for_new_texts_alone(
    tmp_path: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = record_texts(monkeypatch)

    made = train_edited(tmp_path, edit, {2: CAT.replace("--d 1", "--d 5"), 3: CAT + DOG, 4: DOG})

    assert made == ["1.0 seed 1", "2.0 seed 5", "3.0 seed 1", "3.1 seed 1", "4.0 seed 1"]
    assert asked.count("load") == 2
    assert asked.index("a dog") > asked.index("load", 1) > 0
    assert asked.count("a cat") == asked.count("a dog") == 1


FAULTS = {
    "a wrong number": ("a dog --s much\n", "line 1"),
    "no prompt": ("# nothing\n", "the file has no prompt"),
    "no number of steps": ("a dog --s 0\n", "a dog"),
    "removed": (None, "No such file"),
    "a web page": ("<!DOCTYPE html><html>", "web page"),
    "too large": ("a" * ((4 << 20) + 1), "too much for a list of prompts"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_used_leaves_the_earlier_prompts_with_one_warning(
    tmp_path: Path, edit: Edit, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """Also in the rounds after that; when it is mended it is taken."""
    text, reason = FAULTS[fault]

    made = train_edited(tmp_path, edit, {2: text, 4: DOG.replace("--d 1", "--d 9")})

    assert made == ["1.0 seed 1", "2.0 seed 1", "3.0 seed 1", "4.0 seed 9"]
    said = [record.message for record in caplog.records if "earlier ones are kept" in record.message]
    assert len(said) == 1
    assert reason in said[0]
    assert "\n" not in said[0]


def test_a_file_that_comes_back_as_it_was_is_no_edit(
    tmp_path: Path, edit: Edit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    made = train_edited(tmp_path, edit, {2: None, 3: CAT})

    assert made == [f"{step}.0 seed 1" for step in (1, 2, 3, 4)]
    assert "made of the edited" not in caplog.text


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (torch.OutOfMemoryError("2 GiB"), "there is no memory for the text encoders next to the training"),
        (MediaError("t5.safetensors is gone"), "t5.safetensors is gone"),
    ],
)
def test_encoders_that_cannot_be_loaded_again_end_no_training(
    tmp_path: Path,
    edit: Edit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    problem: Exception,
    reason: str,
) -> None:
    kind = type(ToyFamily().text_encoders()[0])
    load = kind.load
    loads: list[int] = []

    def fail_later(self: TextEncoder, device: torch.device) -> None:
        loads.append(1)
        if len(loads) > 1:
            raise problem
        load(self, device)

    monkeypatch.setattr(kind, "load", fail_later)

    made = train_edited(tmp_path, edit, {2: DOG, 4: CAT.replace("--d 1", "--d 5")})

    assert made == ["1.0 seed 1", "2.0 seed 1", "3.0 seed 1", "4.0 seed 5"]
    assert caplog.text.count(reason) == 1


def test_an_edit_changes_nothing_of_what_is_learned(
    tmp_path: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edited").mkdir()
    (tmp_path / "plain").mkdir()
    for folder in ("edited", "plain"):
        write_caches(tmp_path / folder)
    words = ["--sample_every_n_steps", 1, "--max_train_steps", 4]
    plain = train_toy(tmp_path / "plain", "--sample_prompts", write_prompts(tmp_path / "plain", CAT), *words)
    prompts = write_prompts(tmp_path / "edited", CAT)
    edit(prompts, {2: DOG + CAT})

    edited = train_toy(tmp_path / "edited", "--sample_prompts", prompts, *words)

    assert same(plain, edited)


IN_TWO = """
import os, sys
from pathlib import Path
from typing import Any
from modules.command import command_line
from modules.errors import MediaError
from tests.training.toy import ToyFamily, toy_options
from training import edited_prompts
from training.run import train_network

folder = Path(sys.argv[1])
rounds = []
take = edited_prompts.take_edited_prompts

def take_after_edit(*given):
    rounds.append(1)
    if os.environ["RANK"] == "0" and len(rounds) in (2, 3, 4):
        texts = {2: sys.argv[2], 3: "a dog --s much", 4: sys.argv[3]}
        (folder / "prompts.txt").write_text(texts[len(rounds)])
    return take(*given)

edited_prompts.take_edited_prompts = take_after_edit

kind = type(ToyFamily().text_encoders()[0])
encode = kind.encode

def fail_of_fish(self, prompts):
    if prompts[0].text == "a fish":
        raise MediaError("gone.png cannot be read")
    return encode(self, prompts)

kind.encode = fail_of_fish

def main():
    times = ["--sample_every_n_steps", 1, "--max_train_steps", 4]
    options = toy_options(folder, "--sample_prompts", folder / "prompts.txt", *times)
    train_network(ToyFamily(), options)

command_line(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="processes meet through gloo")
def test_processes_take_their_share_of_what_the_first_one_has_read(tmp_path: Path) -> None:
    """The last edit has a text that the second one cannot encode: no process takes it."""
    write_caches(tmp_path)
    write_prompts(tmp_path, CAT)
    last = "a cat --f 1 --s 2 --d 4\na fish --f 1 --s 2\n"

    done = test_processes.run_two(IN_TWO, tmp_path, CAT + DOG.replace("--d 1", "--d 2") + DOG, last)

    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    of_edited = ["0 seed 1", "1 seed 2", "2 seed 1"]
    later = [f"{step}.{sample}" for step in (2, 3, 4) for sample in of_edited]
    assert list_made(tmp_path) == ["1.0 seed 1", *later]
    said = done[0].stderr + done[1].stderr
    assert said.count("The edited sample prompts are not used") == 2
    assert "gone.png" in said
