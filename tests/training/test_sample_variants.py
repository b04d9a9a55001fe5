"""Samples at other strengths of the LoRA and of the bare trigger word: by option and by line."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modules.errors import OptionError
from modules.media.reading import read_image
from tests.training.toy import ToyFamily, record_encoders, same, train_toy, write_caches, write_prompts
from training.reports.history import history_path, read_history, read_session
from training.reports.sample_files import make_grid
from training.scoring.run import open_run

CAT = "a cat --f 1 --s 2 --d 1"
EVERY_FOUR = ("--sample_every_n_steps", 4)
STRENGTHS = ("--sample_strengths", 0, 0.5, 1)


def pictures(folder: Path, step: int) -> dict[int, Path]:
    """The newest samples of a step by the number of their prompt; names end with the time."""
    found = (folder / "output" / "sample").glob(f"x_{step:06d}_*_000.png")
    return {int(path.name.split("_")[2]): path for path in sorted(found)}


def differ(one: Path, other: Path) -> bool:
    return not np.array_equal(read_image(one), read_image(other))


def test_each_prompt_is_sampled_at_each_strength_and_the_training_stays_the_same(tmp_path: Path) -> None:
    """Strength 0 is the base, which does not change; 1 is what a run without the option samples."""
    write_caches(tmp_path)
    prompts = ("--sample_prompts", write_prompts(tmp_path, f"{CAT}\n"), *EVERY_FOUR)
    plain = train_toy(tmp_path, *prompts, "--output_dir", tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / "output")
    wanted = {step: read_image(pictures(tmp_path, step)[0]) for step in (4, 8)}
    (tmp_path / "output").rename(tmp_path / "plain")

    trained = train_toy(tmp_path, *prompts, *STRENGTHS, has_page=True)

    assert same(plain, trained)
    at_4, at_8 = pictures(tmp_path, 4), pictures(tmp_path, 8)
    assert sorted(at_4) == sorted(at_8) == [0, 1, 2]
    assert not differ(at_4[0], at_8[0])
    assert differ(at_8[0], at_8[1])
    assert differ(at_8[1], at_8[2])
    assert all(np.array_equal(read_image(made[2]), wanted[step]) for step, made in ((4, at_4), (8, at_8)))


def test_history_page_and_scores_know_the_strengths(tmp_path: Path) -> None:
    write_caches(tmp_path)

    train_toy(
        tmp_path,
        *("--sample_prompts", write_prompts(tmp_path, f"{CAT}\n"), *EVERY_FOUR, *STRENGTHS),
        has_page=True,
    )

    path = history_path(tmp_path / "output", "x")
    session = read_session(path)
    assert session is not None
    history = read_history(path, session)
    row = history.samples[8, "000008"]
    assert row.prompts == {0: "a cat", 1: "a cat", 2: "a cat"}
    assert row.strengths == {0: 0.0, 1: 0.5}
    assert list(row.files_as_trained) == [2]
    assert [[*files] for _, files in open_run(path).list_samples()] == [[2], [2]]
    grid = make_grid(history, lambda name, prompt, step: name, 5, 10)
    assert [row["prompt"] for row in grid["rows"]] == ["a cat (LoRA at 0)", "a cat (LoRA at 0.5)", "a cat"]
    with Image.open(pictures(tmp_path, 8)[1]) as image:
        assert image.info["bt_sampled_from"] == "x_000008 at strength 0.5"


def test_a_line_has_a_strength_of_its_own(tmp_path: Path) -> None:
    write_caches(tmp_path)
    prompts = write_prompts(tmp_path, f"{CAT}\n{CAT} --lm 0\n{CAT} --lora_multiplier 0.5\n")

    train_toy(tmp_path, "--sample_prompts", prompts, *EVERY_FOUR)
    by_line = {index: read_image(path) for index, path in pictures(tmp_path, 8).items()}
    train_toy(tmp_path, "--sample_prompts", prompts, *EVERY_FOUR, *STRENGTHS, "--overwrite")

    made = pictures(tmp_path, 8)
    # the first prompt at three strengths; the others have their own
    pairs = {0: by_line[1], 1: by_line[2], 2: by_line[0], 3: by_line[1], 4: by_line[2]}
    assert sorted(made) == sorted(pairs)
    assert all(np.array_equal(read_image(made[index]), picture) for index, picture in pairs.items())


def test_the_bare_trigger_word_is_sampled_with_the_settings_of_the_first_prompt(tmp_path: Path) -> None:
    write_caches(tmp_path, more='trigger_word = "mrsfluff"')
    record_encoders(tmp_path, {f"clip{index}": "a" for index in range(5)}, trigger_word="mrsfluff")
    prompts = write_prompts(tmp_path, f"{CAT} --w 48\na dog --s 3\n")
    family = ToyFamily()

    train_toy(
        tmp_path,
        *("--sample_prompts", prompts, "--sample_every_n_steps", 8, "--sample_trigger_word"),
        *("--sample_strengths", 1),
        family=family,
    )

    made = {(one.prompt, one.width, one.seed, one.steps) for one in family.requests}
    assert made == {("a cat", 48, 1, 2), ("a dog", 32, 0, 3), ("mrsfluff", 48, 1, 2)}
    assert len(list((tmp_path / "output" / "sample").glob("x_*_02_*"))) == 1


def test_without_a_trigger_word_it_is_refused(tmp_path: Path) -> None:
    write_caches(tmp_path)
    with pytest.raises(OptionError, match="no table of the dataset has a trigger_word"):
        train_toy(tmp_path, "--sample_prompts", write_prompts(tmp_path), "--sample_trigger_word")


def test_a_whole_model_has_no_strength(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_caches(tmp_path)
    prompts = ("--sample_prompts", write_prompts(tmp_path, f"{CAT} --lm 0.5\n"), "--sample_every_n_steps", 8)
    with pytest.raises(OptionError, match="trains the whole model"):
        train_toy(tmp_path, *prompts, *STRENGTHS, full_dit=True)
    caplog.set_level(logging.WARNING)

    train_toy(tmp_path, *prompts, full_dit=True)

    assert "(--lm) is ignored because this run trains no LoRA" in caplog.text
