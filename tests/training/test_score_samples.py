"""--score_samples: a process scores the samples of a run, one at a time, and no failure ends the training."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from modules.errors import OptionError
from tests.data_tools.tags.making import first_pixel_weights, write_tagger
from tests.training import toy
from tests.training.scoring.making import CIRCLE, draw, write_clip, write_dino
from tests.waiting import wait_for
from training.features.score_samples_starting import SampleScorer
from training.reports.history import read_history, read_session
from training.reports.scores import read_present_scores

# writes its words to a file, then waits for another file
SCRIPT = """
import pathlib, sys, time
place = pathlib.Path(sys.argv[1])
with (place / "calls").open("a") as file:
    file.write(" ".join(sys.argv[2:]) + "\\n")
while not (place / "go").exists():
    time.sleep(0.01)
sys.exit(sys.argv[-1] if "no such" in sys.argv[-1] else 0)
"""


def make_scorer(folder: Path, device: str = "cpu") -> SampleScorer:
    script = folder / "score.py"
    script.write_text(SCRIPT, encoding="utf-8")
    program = [sys.executable, str(script), str(folder)]
    models = {"--model": Path("clip"), "--likeness_model": None}
    return SampleScorer(folder / "output", "x", models=models, device=device, program=program)


def calls(folder: Path, count: int) -> Sequence[str]:
    """What the processes were started with, once there are so many."""

    def lines() -> list[str]:
        return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []

    wait_for(lambda: len(lines()) >= count, told=lambda: "no process was started")
    return lines()


def test_samples_that_come_meanwhile_are_scored_by_the_next_process(tmp_path: Path) -> None:
    scorer = make_scorer(tmp_path)
    scorer.log_values({}, 1)
    for step in (2, 3, 4):
        scorer.log_samples(step, {}, {}, {})
        scorer.log_values({}, step)
    words = f"{tmp_path / 'output' / 'x-history.jsonl'} --model clip --device cpu"
    assert calls(tmp_path, 1) == [words]

    (tmp_path / "go").touch()
    scorer.__exit__(None)

    assert calls(tmp_path, 2) == [words, words]  # one for the samples of steps 3 and 4


def test_a_failure_is_said_once_and_nothing_is_started_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "go").touch()
    scorer = make_scorer(tmp_path, device="no such device")
    for _ in range(2):
        scorer.log_samples(1, {}, {}, {})
        scorer.__exit__(None)
    assert len(calls(tmp_path, 1)) == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == "--score_samples: samples are no longer scored: no such device"


def test_a_run_that_was_ended_at_once_waits_for_nothing(tmp_path: Path) -> None:
    scorer = make_scorer(tmp_path)
    scorer.log_samples(1, {}, {}, {})
    scorer.__exit__(KeyboardInterrupt)
    assert not (tmp_path / "calls").exists()


def test_it_needs_samples_and_the_page(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    (tmp_path / "clip").mkdir()
    scored = ["--score_samples", tmp_path / "clip"]
    with pytest.raises(OptionError, match="--score_samples needs samples"):
        toy.train_toy(tmp_path, *scored, has_page=True)
    prompts = ["--sample_prompts", toy.write_prompts(tmp_path)]
    with pytest.raises(OptionError, match="--no_page"):
        toy.train_toy(tmp_path, *scored, *prompts)
    with pytest.raises(OptionError, match=r"no config\.json in this folder.*--task score_clip, or omit it"):
        toy.train_toy(tmp_path, *scored, *prompts, has_page=True)
    (tmp_path / "clip" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OptionError, match=r"--score_tagger.*no model\.onnx in this folder"):
        toy.train_toy(tmp_path, *scored, *prompts, "--score_tagger", tmp_path / "clip", has_page=True)


@pytest.mark.slow
def test_a_training_ends_with_scores_of_all_its_samples_on_the_page(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    write_clip(tmp_path / "clip")
    write_dino(tmp_path / "dino")
    (tmp_path / "images").mkdir()
    Image.fromarray(draw(CIRCLE)).save(tmp_path / "images" / "a.png")
    words = ["--sample_prompts", toy.write_prompts(tmp_path), "--sample_every_n_steps", 4]
    words += ["--save_every_n_steps", 4, "--score_samples", tmp_path / "clip"]
    words += ["--score_likeness_model", tmp_path / "dino"]
    words += ["--score_tagger", write_tagger(tmp_path / "tagger", first_pixel_weights())]

    toy.train_toy(tmp_path, *words, has_page=True)

    output = tmp_path / "output"
    scores = json.loads((output / "x-scores.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in scores["rows"]] == [4, 8]
    assert scores["model"] == "clip, dino, tagger"
    assert all(-1 <= row["clip"] <= 1 for row in scores["rows"])
    session = read_session(output / "x-history.jsonl")
    assert session is not None
    present = read_present_scores(output, "x", read_history(output / "x-history.jsonl", session))
    assert present is not None
    assert [row.saved for row in present.rows] == ["x-step00000004.safetensors", "x.safetensors"]
    assert "Prompt similarity" in (output / "x.html").read_text(encoding="utf-8")
