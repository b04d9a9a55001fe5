"""Twenty sound folders and runs of all kinds: at most one finding is a false alarm."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diagnosis.run import list_diagnoses
from tests.data_tools.report.making import GENERAL, save_clip, save_copy, save_image, write_config
from tests.diagnosis.test_diagnose import write_run
from tests.diagnosis.test_planted_faults import (
    FAMILIES,
    SUBJECTS,
    WORD,
    change_captions,
    describe,
    plant_background,
    write_sound,
)
from tests.pictures import picture

IMAGES = "image_directory = '{folder}'"
PLACES = ("at noon", "in the evening", "from above", "close by", "far away", "behind glass")


def write_images(folder: Path, captions: list[str], first: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    for number, caption in enumerate(captions):
        save_image(folder / f"{number}.png", first + number, caption=caption)


def write_without_word(folder: Path) -> Path:
    write_images(folder, [f"This image shows {subject}" for subject in SUBJECTS])
    return write_config(folder, IMAGES)


def write_tags(folder: Path) -> Path:
    draw = random.Random(0)
    tags = ("smile", "long hair", "hat", "red dress", "sitting", "outdoors", "book", "night", "cat ears")
    write_images(folder, [f"1girl, solo, {', '.join(draw.sample(tags, 4))}" for _ in range(16)])
    return write_config(folder, f"{IMAGES}\ntrigger_word = '{WORD}'")


def write_clips(folder: Path) -> Path:
    for number in range(8):
        verb = ("runs past", "stands before", "looks at", "turns to")[number % 4]
        save_clip(folder / f"{number}.mp4", number, 9, caption=f"{WORD} {verb} {SUBJECTS[number]}")
    return write_config(folder, "video_directory = '{folder}'\ntarget_frames = [5, 9]")


def write_concepts(folder: Path) -> Path:
    """Write two people of equal shares, each with a word."""
    for first, word in ((0, WORD), (20, "vrolf")):
        write_images(folder / word, [f"{word}, {subject}" for subject in SUBJECTS[:8]], first)
    return write_config(
        folder,
        *(f"image_directory = '{{folder}}/{word}'\ntrigger_word = '{word}'" for word in (WORD, "vrolf")),
    )


def write_few(folder: Path) -> Path:
    write_images(folder, [f"{WORD}, {subject}" for subject in SUBJECTS[:3]])
    return write_config(folder, IMAGES)


def write_many(folder: Path) -> Path:
    captions = [f"{WORD}, {subject} {place}" for subject in SUBJECTS for place in PLACES]
    write_images(folder, captions)
    return write_config(folder, IMAGES)


def write_shapes(folder: Path) -> Path:
    for number in range(18):
        size = ((96, 72), (72, 96))[number % 2]
        save_image(folder / f"{number}.png", number, size, f"{WORD}, {SUBJECTS[number % 12]}")
    return write_config(folder, IMAGES)


def write_style(folder: Path) -> Path:
    """Write a style, which men and women have alike."""
    write_images(folder, [f"{WORD}, a {('man', 'woman')[n % 2]} with {SUBJECTS[n]}" for n in range(12)])
    return write_config(folder, IMAGES)


def write_prior(folder: Path) -> Path:
    """Write a man, and other men beside him, so that the word man keeps its meaning."""
    write_images(folder / "own", [f"{WORD} man with {subject}" for subject in SUBJECTS])
    write_images(folder / "others", ["a man"] * 12, first=40)
    tables = [f"image_directory = '{{folder}}/own'\ntrigger_word = '{WORD}'"]
    return write_config(folder, *tables, "image_directory = '{folder}/others'\nprior_loss_weight = 0.5")


def write_products(folder: Path) -> Path:
    write_sound(folder)
    plant_background(folder)
    change_captions(folder, lambda n, text: f"{text} before a blue wall")
    return write_config(folder, IMAGES)


def write_json_captions(folder: Path) -> Path:
    objects = [{"subject": f"{WORD} with {subject}", "style": "a photograph"} for subject in SUBJECTS]
    write_images(folder, [json.dumps(one) for one in objects])
    return write_config(folder, IMAGES)


def write_burst(folder: Path) -> Path:
    """Write two pairs of near copies and a blurred image among sixteen."""
    captions = [f"{WORD}, {subject}" for subject in SUBJECTS]
    write_images(folder, captions)
    for number in range(2):
        save_copy(
            folder / f"{number}.png", folder / f"again {number}.png", (90, 68), f"{WORD}, {SUBJECTS[number]}"
        )
    small = Image.fromarray(picture(60)).resize((6, 5))
    small.resize((96, 72), Image.Resampling.BICUBIC).save(folder / "soft.png")
    (folder / "soft.txt").write_text(f"{WORD}, {SUBJECTS[3]}", encoding="utf-8")
    return write_config(folder, IMAGES)


def write_night(folder: Path) -> Path:
    """Write dark photographs of one place after another."""
    write_images(folder, [f"{WORD} at night, {subject}" for subject in SUBJECTS])
    for number in range(12):
        dark = np.asarray(Image.open(folder / f"{number}.png")) * 0.4
        Image.fromarray(dark.astype(np.uint8)).save(folder / f"{number}.png")
    return write_config(folder, IMAGES)


def write_mixed(folder: Path) -> Path:
    """Write images and clips of one concept, and images that are held out."""
    write_images(folder / "images", [f"{WORD}, {subject}" for subject in SUBJECTS])
    write_images(folder / "held out", [f"{WORD}, {subject}" for subject in SUBJECTS[:4]], first=70)
    (folder / "clips").mkdir()
    for number in range(6):
        save_clip(
            folder / "clips" / f"{number}.mp4", 50 + number, 9, caption=f"{SUBJECTS[number]} and {WORD}"
        )
    return write_config(
        folder,
        f"image_directory = '{{folder}}/images'\ntrigger_word = '{WORD}'",
        "video_directory = '{folder}/clips'\ntarget_frames = [9]",
        "image_directory = '{folder}/held out'\nvalidation = true",
        general=GENERAL,
    )


def write_noisy_run(folder: Path) -> Path:
    """Write a run of batches of one, whose losses vary fourfold and hardly fall."""
    draw = random.Random(0)
    losses = [0.1 * draw.lognormvariate(0, 0.8) * (1 - 0.1 * step / 400) for step in range(400)]
    validations = {step: 0.2 - 0.0001 * step for step in range(0, 401, 50)}
    return write_run(folder, losses, validations)


def write_late_run(folder: Path) -> Path:
    """Write a run whose validation loss falls, and in the end stays near its lowest value."""
    losses = [1 / (1 + step / 60) for step in range(300)]
    return write_run(
        folder, losses, {0: 0.5, 50: 0.4, 100: 0.33, 150: 0.3, 200: 0.305, 250: 0.301, 300: 0.31}
    )


FOLDERS: tuple[Callable[[Path], Path], ...] = (
    *(write_without_word, write_tags, write_clips, write_concepts, write_few, write_many, write_shapes),
    *(write_style, write_prior, write_products, write_json_captions, write_burst, write_night),
    *(write_mixed, write_noisy_run, write_late_run),
)
NUM_DESCRIBED = 4


@pytest.mark.slow
def test_of_twenty_sound_folders_and_runs_one_may_be_a_false_alarm(tmp_path: Path) -> None:
    paths = []
    for write in FOLDERS:
        folder = tmp_path / write.__name__
        folder.mkdir()
        paths.append(write(folder))
    for name in FAMILIES[:NUM_DESCRIBED]:
        folder = tmp_path / name
        folder.mkdir()
        write_sound(folder)
        describe(name, tmp_path / "models", folder)
        paths.append(folder)

    alarms = {
        str(path): [finding.text for diagnosis in list_diagnoses(path) for finding in diagnosis.findings]
        for path in paths
    }

    assert len(alarms) == 20
    found = {path: texts for path, texts in alarms.items() if texts}
    assert sum(map(len, found.values())) <= 1, found
