"""Faults planted into described folders of five families: `diagnose` names each alone, and its remedy helps.

The folders are described by `new` and read with the tokenizers of tiny models, which have learned a
vocabulary.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.report.diagnosis.finding import Finding
from diagnosis.run import list_diagnoses
from tests.commands import run_script
from tests.data_tools.report.making import save_image
from tests.diagnosis.vocabularies import read_corpus, widen_vocabularies
from tests.pictures import picture
from tests.tiny.new_models import write_new_model

WORD = "widape"  # three pieces at most in all of these tokenizers
FAMILIES = ("wan t2v-1.3B", "flux dev", "hunyuan_video t2v", "qwen_image original", "stable_diffusion xl")
SUBJECTS = ("a dog in a park", "a red car", "two boats", "an old tower", "a bowl of soup", "the night sky")
SUBJECTS += ("a green door", "a snowy hill", "some books", "a wet street", "three apples", "a tall tree")
SIZE = (96, 72)


@dataclass(frozen=True)
class Fault:
    """A fault to plant into a sound folder, the finding that names it, and what the finding asks for."""

    id: str
    plant: Callable[[Path], None]
    repair: Callable[[Path, Finding], None]


def write_sound(folder: Path) -> None:
    for number, subject in enumerate(SUBJECTS):
        save_image(folder / f"{number}.png", number, SIZE, f"{WORD}, {subject}")


def change_captions(folder: Path, change: Callable[[int, str], str]) -> None:
    for number in range(len(SUBJECTS)):
        path = folder / f"{number}.txt"
        path.write_text(change(number, path.read_text("utf-8")), encoding="utf-8")


def take_proposed_word(folder: Path, finding: Finding) -> None:
    proposal = re.search(r"such as (\w+)", finding.remedy)
    assert proposal is not None
    for name in finding.files or [str(path) for path in folder.glob("*.txt")]:
        path = Path(name)
        path.write_text(path.read_text("utf-8").replace(finding.subject, proposal[1]), encoding="utf-8")


def remove_files(folder: Path, finding: Finding) -> None:
    for name in finding.files:
        Path(name).unlink()


def plant_persons(folder: Path) -> None:
    change_captions(folder, lambda n, text: text.replace(",", (" man,", " woman,")[n % 3 == 0]))


def plant_background(folder: Path) -> None:
    for number in range(len(SUBJECTS)):
        image = Image.new("RGB", SIZE, (40, 90 + number % 3, 160))
        image.paste(Image.fromarray(picture(number, (40, 36))), (30, 20))
        image.save(folder / f"{number}.png")


def plant_copies(folder: Path) -> None:
    """Write one image thirty times, as a camera that is held down does."""
    first = np.asarray(Image.open(folder / "0.png")).astype(int)
    for number in range(29):
        Image.fromarray(np.clip(first + number % 5, 0, 255).astype(np.uint8)).save(folder / f"c{number}.png")
        (folder / f"c{number}.txt").write_text(f"{WORD}, {SUBJECTS[0]}", encoding="utf-8")


def plant_softness(folder: Path) -> None:
    for number in range(1, len(SUBJECTS)):
        small = Image.fromarray(picture(number, SIZE)).resize((6, 5))
        small.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.png")


def sharpen(folder: Path, finding: Finding) -> None:
    for name in finding.files:
        Image.fromarray(picture(int(Path(name).stem), SIZE)).save(name)


def plant_long_captions(folder: Path) -> None:
    """Write captions longer than what any of these text encoders reads."""
    words = " ".join(read_corpus()).split()
    change_captions(folder, lambda n, text: f"{text}, {' '.join(random.Random(n).choices(words, k=1500))}")


def shorten_captions(folder: Path, finding: Finding) -> None:
    change_captions(folder, lambda n, text: f"{WORD}, {SUBJECTS[n]}")


FAULTS = (
    Fault(
        "trigger-pieces",
        lambda folder: change_captions(folder, lambda n, text: text.replace(WORD, "mmx26")),
        take_proposed_word,
    ),
    Fault(
        "trigger-known",
        lambda folder: change_captions(folder, lambda n, text: text.replace(WORD, "cat")),
        take_proposed_word,
    ),
    Fault(
        "trigger-missing",
        lambda folder: change_captions(folder, lambda n, text: SUBJECTS[n] if n > 7 else text),
        shorten_captions,  # which writes the word into all
    ),
    Fault("trigger-subjects", plant_persons, take_proposed_word),
    Fault(
        "caption-phrase",
        lambda folder: change_captions(folder, lambda n, text: f"{text}, with round glasses"),
        shorten_captions,
    ),
    Fault("captions-cut", plant_long_captions, shorten_captions),
    Fault("images-copies", plant_copies, remove_files),
    Fault(
        "images-background",
        plant_background,
        lambda folder, finding: change_captions(folder, lambda n, text: f"{text} on a blue background"),
    ),
    Fault("images-soft", plant_softness, sharpen),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def describe(name: str, models: Path, folder: Path) -> None:
    """Describe a folder for a tiny model whose tokenizers have a vocabulary."""
    is_new = not (models / name).exists()
    words = write_new_model(name, models / name)
    if is_new:
        widen_vocabularies(models / name)
    run_script("new_project.py", folder, *words)


def find(folder: Path) -> list[Finding]:
    return [finding for diagnosis in list_diagnoses(folder) for finding in diagnosis.findings]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_planted_fault_is_named_alone_and_its_remedy_helps(
    name: str, fault: Fault, models: Path, tmp_path: Path
) -> None:
    write_sound(tmp_path)
    fault.plant(tmp_path)
    describe(name, models, tmp_path)

    findings = find(tmp_path)

    assert {finding.id for finding in findings} == {fault.id}
    for finding in findings:  # of several text encoders, each may cut the captions
        assert finding.meaning
        fault.repair(tmp_path, finding)
    assert find(tmp_path) == []
