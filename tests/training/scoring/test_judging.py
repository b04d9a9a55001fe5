"""tools/judge_loras.py: three figures for each LoRA file, its verdict, and the one to take."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.errors import DatasetError, OptionError
from modules.media.reading import read_image
from tests.tiny.loras import write_lora_of_blocks
from tests.tiny.wan import TinyWan, write_tiny_wan
from tests.training.scoring.making import CIRCLE, draw, write_clip, write_dataset, write_dino
from tools import judge_loras
from training.scoring.embeddings import open_path
from training.scoring.judging import (
    Judgement,
    Likeness,
    find_file_to_take,
    find_kept_strength,
    judge,
    write_prompt,
)
from training.scoring.model import load_image_model
from training.scoring.training_pictures import TrainingVectors

BASE = Likeness(0.4, 0.4, 0.45, copied=0, near=0, nearest="a.png")
SOUND = Likeness(0.7, 0.42, 0.5, copied=0, near=0, nearest="a.png")


@pytest.mark.parametrize(
    ("changes", "verdict", "figures"),
    [
        # the images have a likeness of 0.8 to each other, so the way is 0.4 long
        ({}, "right", (0.75, 0.05, 0.125)),
        ({"with_word": 0.5}, "too_weak", (0.25, 0.05, 0.125)),
        ({"without_word": 0.6}, "overcooked", (0.75, 0.5, 0.125)),
        ({"with_class": 0.65}, "leaks", (0.75, 0.05, 0.5)),
        ({"copied": 0.25}, "overcooked", (0.75, 0.05, 0.125)),
        ({"near": 0.75}, "overcooked", (0.75, 0.05, 0.125)),
        ({"with_class": None}, "right", (0.75, 0.05, None)),
    ],
)
def test_verdicts(changes: Mapping[str, Any], verdict: str, figures: Sequence[float | None]) -> None:
    judged = judge("a", "x 1", BASE, replace(SOUND, **changes), 0.8)
    assert judged.verdict == verdict
    found = (judged.learned, judged.without_word, judged.with_class)
    assert found == pytest.approx(figures) if None not in figures else found[2] is None


def test_nothing_is_judged_where_the_model_draws_the_images_already() -> None:
    with pytest.raises(DatasetError, match="nothing can be judged"):
        judge("a", "x 1", BASE, SOUND, 0.41)


def judged(name: str, strength: float, learned: float, without: float, verdict: str) -> Judgement:
    return Judgement(name, f"x {strength:g}", learned, without, None, likeness=SOUND, verdict=verdict)


def test_the_file_with_the_widest_margin_is_taken_if_it_is_right() -> None:
    series = [judged("early", 1, 0.3, 0, "too_weak"), judged("middle", 1, 0.7, 0.1, "right")]
    series += [judged("late", 1, 0.9, 0.2, "right"), judged("last", 1, 1.2, 0.1, "overcooked")]
    assert find_file_to_take(series).column == "late"
    assert find_file_to_take([series[0], series[3]]).column == "last"


def test_the_highest_strength_that_keeps_a_lora_is_found() -> None:
    alone = judged("mine", 1, 0.8, 0, "right")
    together = [
        judged("turbo", strength, gained, 0, "right")
        for strength, gained in ((0.25, 0.8), (0.5, 0.73), (0.75, 0.71), (1, 0.2))
    ]
    kept = find_kept_strength([alone, *together])
    assert kept is not None
    assert kept.strength == "x 0.5"
    assert find_kept_strength([alone, together[-1]]) is None


@pytest.mark.parametrize(
    ("prompt", "without", "with_class"),
    [
        ("a photo of zwolf in a park", "a photo of in a park", "a photo of dog in a park"),
        ("zwolf, a park", "a park", "dog, a park"),
        ("a park, zwolf, night", "a park, night", "a park, dog, night"),
        ("zwolf", "", "dog"),
    ],
)
def test_prompts_are_written_without_the_word_and_with_the_class(
    prompt: str, without: str, with_class: str
) -> None:
    assert write_prompt(prompt, "zwolf", "") == without
    assert write_prompt(prompt, "zwolf", "dog") == with_class
    with pytest.raises(OptionError, match="lacks the trigger word"):
        write_prompt("a photo of zwolfs", "zwolf", "")


def test_mutual_likeness_is_that_to_the_nearest_others() -> None:
    media = [open_path(Path(f"{number}.png")) for number in range(3)]
    vectors = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 1.0]])]
    training = TrainingVectors.of(media, vectors)
    assert training is not None
    # the mean cosine to both others: (0.6 + 0) / 2, (0.6 + 0.8) / 2 and (0 + 0.8) / 2
    assert training.measure_mutual_likeness() == pytest.approx((0.3 + 0.7 + 0.4) / 3)
    assert TrainingVectors.of(media[:1], vectors[:1]).measure_mutual_likeness() is None  # type: ignore[union-attr]


# --- by the command


SMALL = ("--video_size", "32", "32", "--video_length", "1", "--infer_steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    """A tiny Wan with two LoRAs, a dataset, and models that measure likeness."""
    files = write_tiny_wan(tmp_path_factory.mktemp("t2v"))
    folder = files.dit.parent
    for seed, name in enumerate(("style-000002", "style-000010")):
        write_lora_of_blocks(folder / f"{name}.safetensors", files.dit, r"blocks\.\d+\.ffn\.0", 2, seed)
    pictures = {f"{number}.png": draw(CIRCLE, 96, number) for number in range(6)}
    write_dataset(folder / "data", pictures)
    write_dino(folder / "dino")
    write_clip(folder / "clip")
    return files


def judge_files(folder: Path, files: TinyWan, *more: object) -> Mapping[str, Any]:
    models = files.dit.parent
    words = ["--family", "wan", "--task", "t2v-1.3B", *SMALL, *files.models, "--save_path", folder / "made"]
    words += ["--dataset_config", models / "data" / "dataset.toml", "--trigger_word", "zwolf"]
    words += ["--lora", models / "style-*.safetensors", "--json", folder / "judged.json", *more]
    judge_loras.main([str(word) for word in words])
    content: Mapping[str, Any] = json.loads((folder / "judged.json").read_text("utf-8"))
    return content


def test_figures_are_those_of_the_results(
    tmp_path: Path, files: TinyWan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = files.dit.parent
    words = (
        "--likeness_model",
        models / "dino",
        "--class_word",
        "dog",
        "--prompt",
        "a photo of zwolf, night",
    )
    monkeypatch.chdir(models / "data")
    content = judge_files(tmp_path, files, *words)
    printed = capsys.readouterr().out

    model = load_image_model(models / "dino", "cpu")
    training = TrainingVectors.of(
        (media := [open_path(path) for path in sorted((models / "data" / "pictures").glob("*.png"))]),
        [model.embed_images([read_image(models / "data" / "pictures" / medium.name)]) for medium in media],
    )
    assert training is not None
    assert content["training_likeness"] == pytest.approx(training.measure_mutual_likeness())

    def likeness(pattern: str) -> float:
        (path,) = (tmp_path / "made").glob(pattern)
        nearest = training.find_nearest(model.embed_images([read_image(path)]))  # type: ignore[union-attr]
        return sum(neighbor.cosine for neighbor in nearest) / len(nearest)

    names = {"with_word": "001", "without_word": "002", "with_class": "003"}
    for field, number in names.items():
        assert content["without_lora"][field] == pytest.approx(likeness(f"{number}_0_without*.png"))
    for judgement, column in zip(content["judgements"], ("style-000002", "style-000010"), strict=True):
        for field, number in names.items():
            assert judgement["likeness"][field] == pytest.approx(likeness(f"{number}_0_{column}*.png"))
        span = content["training_likeness"] - content["without_lora"]["with_word"]
        gained = judgement["likeness"]["with_word"] - content["without_lora"]["with_word"]
        assert judgement["learned"] == pytest.approx(gained / span)
        assert f"{judgement['column']} {judgement['strength']}" in printed
    assert content["take"] in printed
    assert list((tmp_path / "made").glob("compare_*.html"))


def test_a_lora_beside_others_has_a_column_alone_and_the_strength_that_keeps_it(
    tmp_path: Path, files: TinyWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = files.dit.parent
    monkeypatch.chdir(models / "data")
    words = ("--likeness_model", models / "dino", "--prompt", "a photo of zwolf")
    beside = ("--beside", models / "style-000010.safetensors", "--lora", models / "style-000002.safetensors")
    content = judge_files(tmp_path, files, *words, *beside, "--lora_multiplier", 0.25, 1)
    labels = [f"{row['column']} {row['strength']}".rstrip() for row in content["judgements"]]
    assert labels == ["style-000010 alone", "style-000002 x 0.25", "style-000002 x 1"]
    assert all(row["with_class"] is None for row in content["judgements"])
    assert content["keeps"] in (None, *labels[1:])


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (["--prompt", "a photo of a dog"], OptionError, "lacks the trigger word zwolf"),
        (["--prompt", "zwolf"], OptionError, "is empty without the trigger word"),
        (["--prompt", "a zwolf", "--trigger_word", " "], OptionError, "--trigger_word is empty"),
        (["--prompt", "a zwolf", "--sheet", "seed=1,2"], OptionError, "--sheet has no meaning"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    more: list[str],
    error: type[Exception],
    words: str,
    tmp_path: Path,
    files: TinyWan,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files.dit.parent / "data")
    with pytest.raises(error, match=words):
        judge_files(tmp_path, files, "--likeness_model", files.dit.parent / "dino", *more)


def test_a_single_training_image_is_refused(
    tmp_path: Path, files: TinyWan, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_dataset(tmp_path / "one", {"a.png": draw(CIRCLE)})
    monkeypatch.chdir(tmp_path / "one")
    with pytest.raises(DatasetError, match="at least two are needed"):
        judge_files(tmp_path, files, "--prompt", "a zwolf", "--dataset_config", config)
