"""tools/score.py: similarity to prompts and training pictures, copies, the best file, and wrong commands."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modules.media.writing import write_png
from tests.data_tools.tags.making import first_pixel_weights, write_tagger
from tests.faults.messages import assert_one_message, run_here
from tests.pictures import picture
from tests.training.scoring.making import (
    CIRCLE,
    NAME,
    SQUARE,
    draw,
    write_clip,
    write_dataset,
    write_dino,
    write_run,
    write_siglip,
)
from training.reports.history import History, Start, history_path
from training.reports.page import Standing, page_values
from training.reports.present_files import current_commands
from training.reports.scores import (
    FoundFile,
    RunScores,
    SampleScore,
    StepScores,
    find_best,
    find_best_file,
    list_score_charts,
    list_unsampled,
    make_section,
    read_scores,
    write_scores,
)
from training.reports.sections import scores_path
from training.scoring.model import load_image_model, load_image_text_model
from training.scoring.run import open_run
from training.summary import describe_best


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_clip(folder, knows=True)
    return folder


def score(folder: Path, *words: object) -> str:
    """Run tools/score.py on the run; return what it printed."""
    printed = io.StringIO()
    code, said = run_here("tools/score.py", "output", *words, folder=folder, printed=printed)
    assert code == 0, said
    return printed.getvalue()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "output" / f"{NAME}-scores.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize(("write", "exact"), [(write_clip, True), (write_siglip, False)])
def test_vectors_are_those_of_transformers(tmp_path: Path, write: Any, exact: bool) -> None:
    original = write(tmp_path)
    model = load_image_text_model(tmp_path, "cpu")
    frames = [draw(CIRCLE), draw(SQUARE, size=50)]

    images = model.embed_images(frames)
    texts = model.embed_texts([CIRCLE, "an old film"])

    pixels = model.processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    padding = {} if exact else {"padding": "max_length", "max_length": 32}
    tokens = model.tokenizer([CIRCLE, "an old film"], return_tensors="pt", **({"padding": True} | padding))
    if not exact:
        tokens = {"input_ids": tokens["input_ids"]}
    with torch.no_grad():
        expected = original(**tokens, pixel_values=pixels["pixel_values"])
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 0.0, "atol": 1e-6}
    torch.testing.assert_close(images, expected.image_embeds, **tolerance)
    torch.testing.assert_close(texts, expected.text_embeds, **tolerance)


def test_samples_that_show_their_prompt_score_higher(tmp_path: Path, knowing: Path) -> None:
    right, wrong = [draw(CIRCLE), draw(SQUARE)], [draw(SQUARE), draw(CIRCLE)]
    write_dataset(tmp_path, {f"{seed}.png": picture(seed) for seed in range(2)})
    write_run(tmp_path, {10: wrong, 20: right})

    said = score(tmp_path, "--model", knowing)

    first, second = read_rows(tmp_path)
    assert second["clip"] > first["clip"] + 0.5
    assert second["clip_score"] == pytest.approx(100 * second["clip"])
    assert first["clip_score"] == max(0.0, 100 * first["clip"])
    assert f"Best file: {NAME}-step00000020.safetensors" in said
    assert "Scores do not measure taste" in said


def test_a_copied_training_picture_is_found_and_named(tmp_path: Path, knowing: Path) -> None:
    photos = {f"{seed}.png": picture(seed) for seed in range(4)}
    write_dataset(tmp_path, photos)
    copy = picture(2, size=(200, 150))  # another size of 2.png
    write_run(tmp_path, {10: [picture(8), picture(9)], 20: [picture(7), copy]}, losses={10: 0.2, 20: 0.1})

    said = score(tmp_path, "--model", knowing)

    first, second = read_rows(tmp_path)
    assert [sample["is_copied"] for sample in first["samples"]] == [False, False]
    assert [sample["is_copied"] for sample in second["samples"]] == [False, True]
    assert second["samples"][1]["nearest"] == "2.png"
    # its loss is the lowest, but it would give the user's own picture back
    assert f"Best file: {NAME}-step00000010.safetensors" in said
    assert "1 file is left out because its samples copy a training image" in said


def test_likeness_is_the_mean_cosine_to_the_three_nearest(tmp_path: Path, knowing: Path) -> None:
    photos = {f"{seed}.png": picture(seed) for seed in range(5)}
    write_dataset(tmp_path, photos)
    write_run(tmp_path, {10: [draw(CIRCLE)]}, prompts=[CIRCLE])

    score(tmp_path, "--model", knowing, "--batch_size", 2)

    model = load_image_text_model(knowing, "cpu")
    vectors = model.embed_images([draw(CIRCLE), *photos.values()])
    cosines = sorted((vectors[1:] @ vectors[0]).tolist(), reverse=True)
    (row,) = read_rows(tmp_path)
    assert row["likeness"] == pytest.approx(sum(cosines[:3]) / 3, abs=1e-5)
    assert row["samples"][0]["nearest_cosine"] == pytest.approx(cosines[0], abs=1e-5)


def test_likeness_may_be_that_of_a_dino_model(tmp_path: Path, knowing: Path) -> None:
    photos = {f"{seed}.png": picture(seed) for seed in range(5)}
    write_dataset(tmp_path, photos)
    write_run(tmp_path, {10: [draw(CIRCLE)]}, prompts=[CIRCLE])
    dino = write_dino(tmp_path / "dino")
    score(tmp_path, "--model", knowing)
    (by_clip,) = read_rows(tmp_path)

    score(tmp_path, "--model", knowing, "--likeness_model", tmp_path / "dino")

    processor = load_image_model(tmp_path / "dino", "cpu").processor
    images = [Image.fromarray(frame) for frame in (draw(CIRCLE), *photos.values())]
    with torch.no_grad():
        states = dino(**processor(images=images, return_tensors="pt")).last_hidden_state[:, 0]
    vectors = torch.nn.functional.normalize(states, dim=-1)
    cosines = sorted((vectors[1:] @ vectors[0]).tolist(), reverse=True)
    (row,) = read_rows(tmp_path)
    assert row["likeness"] == pytest.approx(sum(cosines[:3]) / 3, abs=1e-5)
    assert row["likeness"] != pytest.approx(by_clip["likeness"], abs=1e-3)
    assert row["clip"] == by_clip["clip"]  # which texts the model of both compares


def test_a_model_of_the_other_kind_is_refused(tmp_path: Path, knowing: Path) -> None:
    write_run(tmp_path, {10: [draw(CIRCLE)]}, prompts=[CIRCLE])
    words = ["output", "--model", knowing, "--likeness_model", knowing]
    code, said = run_here("tools/score.py", *words, folder=tmp_path)
    assert_one_message(code, said, "--likeness_model", "says model_type 'clip'", "dinov2")


def test_vectors_are_kept_by_content(tmp_path: Path, knowing: Path) -> None:
    write_dataset(tmp_path, {"a.png": picture(1), "b.png": picture(2)})
    write_run(tmp_path, {10: [picture(3)]}, prompts=[CIRCLE])
    score(tmp_path, "--model", knowing)
    (kept,) = (tmp_path / "output").glob(".scores-*.safetensors")
    before, rows = kept.stat(), read_rows(tmp_path)
    (tmp_path / "pictures" / "a.png").rename(tmp_path / "pictures" / "renamed.png")

    score(tmp_path, "--model", knowing)

    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # nothing new
    assert read_rows(tmp_path)[0]["likeness"] == pytest.approx(rows[0]["likeness"])

    Image.fromarray(picture(4)).save(tmp_path / "pictures" / "b.png")
    score(tmp_path, "--model", knowing)
    assert kept.stat().st_mtime_ns > before.st_mtime_ns


def make_row(step: int, loss: float | None = None, likeness: float = 0.5, clip: float = 0.3) -> StepScores:
    sample = SampleScore(0, "x.png", clip=clip, likeness=likeness)
    return StepScores(step, f"{step:06d}", (sample,), saved=f"x-{step}", loss=loss, loss_step=step)


@pytest.mark.parametrize(
    ("rows", "step", "reason"),
    [
        (
            [make_row(400, 0.3, 0.5), make_row(800, 0.1, 0.6), make_row(1200, 0.2, 0.7)],
            800,
            "validation loss lowest at step 800; likeness still rises after it",
        ),
        (
            [make_row(400, 0.1, 0.6, clip=0.3), make_row(800, 0.2, 0.5, clip=0.2)],
            400,
            "likeness falls after it; later samples match their prompts less",
        ),
        # a file that fits its prompts 0.02 less is not a candidate, however like the training pictures it is
        (
            [
                make_row(1, likeness=0.6),
                make_row(2, likeness=0.7, clip=0.299),
                make_row(3, likeness=0.9, clip=0.28),
            ],
            2,
            "no validation loss was measured",
        ),
    ],
)
def test_the_best_file_has_a_reason(rows: list[StepScores], step: int, reason: str) -> None:
    best = find_best(rows)

    assert best is not None
    assert best.row.step == step
    assert reason in best.text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_dataset(tmp_path, {"a.png": picture(1)})
    write_run(tmp_path, {10: [picture(3)]}, prompts=[CIRCLE])
    return tmp_path


def test_what_cannot_be_scored_is_said(run: Path, knowing: Path) -> None:
    history = run / "output" / f"{NAME}-history.jsonl"
    (run / "empty").mkdir()
    (run / "two").mkdir()
    for name in ("a", "b"):
        (run / "two" / f"{name}-history.jsonl").write_bytes(history.read_bytes())
    (run / "llama").mkdir()
    (run / "llama" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    wrong = {
        ("nothing",): "nothing",
        ("empty",): "there is no run in this folder",
        (".",): "There is one in output, two: pass that folder.",
        ("two",): "there are 2 runs in this folder",
        ("dataset.toml",): "pass the folder of a run",
        ("output", "--model", "empty"): "there is no config.json",
        ("output", "--model", "llama"): "model_type 'llama'",
        ("output", "--dataset_config", "none.toml"): "none.toml",
        ("output", "--batch_size", "0"): "--batch_size",
        ("two/a-history.jsonl",): "no samples",
    }
    for words, reason in wrong.items():
        model = () if "--model" in words else ("--model", knowing)
        code, said = run_here("tools/score.py", *words, *model, folder=run)
        assert code, words
        assert reason in said, (words, said)
        assert "Traceback" not in said


def test_the_page_of_the_run_shows_the_scores_until_other_samples_replace_them(
    tmp_path: Path, knowing: Path
) -> None:
    write_dataset(tmp_path, {"a.png": picture(1)})
    history = write_run(tmp_path, {10: [picture(3)], 20: [picture(4)]}, prompts=[CIRCLE], losses={10: 0.1})
    page = tmp_path / "output" / f"{NAME}.html"
    page.write_text("the page of the run as it ended", encoding="utf-8")

    score(tmp_path, "--model", knowing)

    text = page.read_text(encoding="utf-8")
    assert "Best file: my_lora-step00000010.safetensors: validation loss lowest at step 10; " in text
    assert "Scores do not measure taste" in text
    assert text.count('src="data:image/svg') >= 3  # the curves of the loss, the prompts and the likeness
    run_history = open_run(history).run_history
    assert make_section(history.parent, NAME, run_history) is not None
    run_history.samples.clear()
    assert make_section(history.parent, NAME, run_history) is None
    (history.parent / f"{NAME}-scores.json").write_text('{"version": 1, "rows": 5}', encoding="utf-8")
    assert read_scores(history.parent / f"{NAME}-scores.json") is None


def test_prompts_beyond_the_tokens_and_the_number_of_steps_are_said(tmp_path: Path, knowing: Path) -> None:
    write_dataset(tmp_path, {"a.png": picture(1)})
    history = write_run(tmp_path, {10: [picture(3)]}, prompts=["a red circle " * 20])
    sample = next((history.parent / "sample").iterdir())
    write_png(sample, picture(3), {"bt_infer_steps": "4"})

    said = score(tmp_path, "--model", knowing)

    assert "Prompts longer than the 32 tokens that the model reads: 1 of 1" in said
    assert "samples made with 4 steps" in said
    assert said.count("Likeness of faces is left out") == 1


def test_without_the_dataset_prompts_alone_are_compared(tmp_path: Path, knowing: Path) -> None:
    write_run(tmp_path, {10: [draw(CIRCLE)]}, prompts=[CIRCLE])

    said = score(tmp_path, "--model", knowing)

    (row,) = read_rows(tmp_path)
    assert row["likeness"] is None
    assert row["clip"] is not None
    assert "The dataset dataset.toml is not here" in said


def test_page_score_and_commands_choose_one_file(tmp_path: Path) -> None:
    """Files of 50, 100 and 150 have one loss, that of step 100: where it was measured is the best one."""
    history = History(history_path(tmp_path, "x"), 1)
    history.add(100, validation={"validation/loss": 0.5})
    history.add(200, validation={"validation/loss": 0.7})
    for step in (50, 100, 150):
        history.add(step, saved=f"x-{step}.safetensors")
        (tmp_path / f"x-{step}.safetensors").touch()
    run_history = history.run_history
    rows = [
        replace(make_row(step, 0.5), saved=f"x-{step}.safetensors", loss_step=100) for step in (50, 100, 150)
    ]
    best = find_best(rows)
    assert best is not None
    assert (
        best.name
        == run_history.best_file(tmp_path)
        == run_history.usable_file(tmp_path)
        == "x-100.safetensors"
    )
    assert "validation loss lowest at step 100;" in best.text

    (tmp_path / "x-100.safetensors").unlink()  # 50 and 150 are as near: the later one
    rows = [row for row in rows if row.step != 100]
    best = find_best(rows)
    assert best is not None
    assert best.name == run_history.best_file(tmp_path) == "x-150.safetensors"
    assert "validation loss lowest at step 100, the nearest validation" in best.text

    best = find_best(rows[:1], list_unsampled(rows[:1], run_history, tmp_path))  # there are no samples of 150
    assert best is not None
    assert best.name == "x-150.safetensors"
    assert "there are no samples of its step" in best.text


def test_a_tagger_says_how_many_tags_of_the_prompt_a_sample_shows(tmp_path: Path, knowing: Path) -> None:
    """Tags are the parts between commas that it knows; a prompt without any has no number."""
    red, magenta = (np.full((32, 32, 3), color, np.uint8) for color in ((255, 0, 0), (255, 0, 255)))
    write_dataset(tmp_path, {"0.png": picture(0)})
    write_run(tmp_path, {10: [red, red], 20: [magenta, red]}, prompts=["Red, blue eyes, a cat", "a dog"])
    weights = first_pixel_weights(red=(0, 0, 1 / 255), blue_eyes=(1 / 255, 0, 0))
    tagger = write_tagger(tmp_path / "tagger", weights)

    said = score(tmp_path, "--model", knowing, "--tagger", tagger)

    rows = read_rows(tmp_path)
    assert [[sample["tag_recall"] for sample in row["samples"]] for row in rows] == [[0.5, None], [1.0, None]]
    assert [row["tag_recall"] for row in rows] == [0.5, 1.0]
    assert "tags seen" in said
    output = tmp_path / "output"
    run_history = open_run(output).run_history
    titles = [chart.title for chart in list_score_charts(output, NAME, run_history)]
    assert "Tags of the prompts that a tagger sees" in titles
    (curve,) = list_score_charts(output, NAME, run_history, low=15)[-1].curves
    assert (curve.x, curve.y) == ([20], [1.0])
    values = page_values(output, run_history, Standing(Start("toy", 20), 20), name=NAME)
    assert "Tags of the prompts" in str(values["charts"])


def test_prompts_without_known_tags_and_folders_without_a_tagger_are_told(
    tmp_path: Path, knowing: Path
) -> None:
    write_dataset(tmp_path, {"0.png": picture(0)})
    write_run(tmp_path, {10: [draw(CIRCLE)]}, prompts=[CIRCLE])
    (tmp_path / "empty").mkdir()
    tagger = write_tagger(tmp_path / "tagger", first_pixel_weights())
    assert "No prompt has tags" in score(tmp_path, "--model", knowing, "--tagger", tagger)
    command = ["tools/score.py", "output", "--model", knowing, "--tagger", "empty"]
    code, said = run_here(*command, folder=tmp_path)
    assert_one_message(code, said, "--tagger empty: there is no model.onnx")


def test_a_run_that_was_scored_has_one_best_file_everywhere(tmp_path: Path) -> None:
    """A file whose samples copy a training picture is not the best, whatever its loss."""
    history = History(history_path(tmp_path, "x"), 1)
    rows = []
    for step, loss in ((50, 0.3), (100, 0.5)):
        name = f"x-{step}.safetensors"
        history.add(step, validation={"validation/loss": loss})
        history.add(step, saved=name)
        history.add(step, samples=f"{step:06d}", files={"0": f"s{step}.png"}, prompts={"0": "a"})
        (tmp_path / name).touch()
        sample = SampleScore(0, f"s{step}.png", clip=0.3, likeness=0.5, is_copied=step == 50)
        rows.append(StepScores(step, f"{step:06d}", (sample,), saved=name, loss=loss, loss_step=step))
    typed = f"python wan_generate_video.py --lora_weight {tmp_path / 'x-50.safetensors'}"
    history.add(100, commands=[["Generate with it", typed, typed]])
    run_history = history.run_history
    assert find_best_file(tmp_path, "x", run_history) == FoundFile("x-50.safetensors")
    write_scores(scores_path(tmp_path, "x"), RunScores("clip", tuple(rows)))

    best = "x-100.safetensors"
    found = find_best_file(tmp_path, "x", run_history)
    assert found is not None
    assert found.name == best
    assert bool(found.reasons)
    values = page_values(tmp_path, run_history, Standing(Start("toy", 100), 100), name="x")
    assert [file["name"] for file in values["files"] if file["is_best"]] == [best]
    assert f"Best file: {best}" in str(values["advice"])
    assert best in str(values["sections"][0].notes[0])
    assert best in describe_best(run_history, tmp_path, "x")
    assert "not saved" not in describe_best(run_history, tmp_path, "x")  # x-50 has the lowest loss
    (command,) = current_commands(run_history, tmp_path, "x")
    assert str(tmp_path / best) in command.bash
    assert "x-50.safetensors is not the best file" in command.note
