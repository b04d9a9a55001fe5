"""Captions from a model that runs here: tiny ones with random weights."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.captions.asking import Frames
from data_tools.captions.local_model import LocalModel, load_model
from data_tools.captions.options import AskOptions, CaptionModelOptions
from data_tools.captions.places import CaptionPlace, find_places
from data_tools.captions.run import run_captioning
from dataset.config import load_dataset_config
from modules.errors import CheckpointError, MemoryPlanError
from tests.data_tools.captions.making import make_folder, options_of, read_captions
from tests.dataset.making import make_clip
from tests.tiny.vision_model import TEMPLATE, WORDS, write_llava, write_qwen

ASK = AskOptions.usual(prompt="a cat", max_pixels=4096, max_new_tokens=8)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llavá 1"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("qwen"))


def load(folder: Path, batch_size: int = 1, **ask: Any) -> LocalModel:
    options = CaptionModelOptions.usual(model=str(folder), batch_size=batch_size, device="cpu")
    return load_model(options, dataclasses.replace(ASK, **ask))


def make_jobs(folder: Path) -> list[tuple[CaptionPlace, Frames]]:
    """Three sources with one, two and three frames of noise."""
    places = find_places(load_dataset_config(make_folder(folder)), False)
    rng = np.random.default_rng(0)
    return [
        (place, tuple(rng.integers(0, 256, (24 + 8 * count, 32, 3), np.uint8) for _ in range(count)))
        for count, place in enumerate(places, 1)
    ]


@pytest.mark.parametrize(("name", "temperature"), [("llava", 0.0), ("llava", 1.0), ("qwen", 1.0)])
def test_a_batch_gives_what_each_gives_alone(
    name: str, temperature: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(name), temperature=temperature)
    jobs = make_jobs(tmp_path)

    together = model.describe(jobs)
    assert together == [model.describe([job])[0] for job in jobs]
    assert all(was_cut and set(text.split()) <= set(WORDS) for text, was_cut in together)
    if temperature:
        assert len(set(together)) == 3
        assert together != dataclasses.replace(model, ask=dataclasses.replace(model.ask, seed=1)).describe(
            jobs
        )


def test_captions_of_clips_are_written_through_the_loop(llava: Path, tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(2):
        make_clip(clips / f"{number}.mp4", 9)
    with config.open("a", encoding="utf-8") as file:
        file.write(f"[[datasets]]\nvideo_directory = {str(clips)!r}\ncaption_extension = '.cap'\n")
    words = ("--model", llava, "--max_new_tokens", "5", "--batch_size", "2", "--trigger_word", "zxc")
    run_captioning(load_dataset_config(config), options_of(config, *words, "--num_frames", "3"))

    texts = [*read_captions(tmp_path).values(), *(path.read_text() for path in clips.glob("*.cap"))]
    assert len(texts) == 5
    assert all(text.startswith("zxc, ") and len(text.split()) == 6 for text in texts)


def test_messages_are_made_by_the_template_that_is_there(llava: Path, tmp_path: Path) -> None:
    model = load(llava, system_prompt="be short")
    assert model.message("what", 2) == "<system> be short <user>  <image>  <image> what <model> "

    folder = shutil.copytree(llava, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    plain = load(folder, system_prompt="be short")
    assert plain.message("what", 2) == "be short\n<image><image>\nwhat"
    assert load(folder).describe(make_jobs(tmp_path))[0][0]

    plain.processor.tokenizer.chat_template = "{% for turn in messages %}[{{ turn.content }}]{% endfor %}"
    assert plain.message("what", 1) == "[be short][<image>\nwhat]"


def test_one_that_fails_in_a_batch_costs_only_itself(llava: Path, tmp_path: Path) -> None:
    model = load(llava, batch_size=3)
    jobs = make_jobs(tmp_path)
    frames = dict(jobs)
    frames[jobs[1][0]] = (np.zeros((0, 4, 3), np.uint8),)

    answers = list(model.answer([job for job, _ in jobs], frames.__getitem__))
    assert [isinstance(text, str) for _, text in answers] == [True, False, True]


def test_a_full_memory_ends_the_run_with_advice(llava: Path, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    model = load(llava)
    model.model.generate = fail
    jobs = make_jobs(tmp_path)

    with pytest.raises(MemoryPlanError, match="--batch_size, --num_frames or --max_pixels"):
        list(model.answer([jobs[0][0]], lambda job: jobs[0][1]))


def test_a_thought_that_the_template_begins_is_no_caption(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "thinking")
    (folder / "chat_template.jinja").write_text(f"{TEMPLATE}<think>\n", encoding="utf-8")
    model = load(folder)
    job, frames = make_jobs(tmp_path)[0]

    ((_, answer),) = model.answer([job], lambda _: frames)
    assert "--max_new_tokens ended it" in str(answer)


def _change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_code_in_a_model_is_never_run(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    classes = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoModelForImageTextToText"), "evil.X")
    for name in ("config.json", "processor_config.json"):
        _change(folder, name, model_type="evil", processor_class=None, auto_map=classes)

    with pytest.raises(CheckpointError):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_not_read(llava: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    weights = load(llava).model.state_dict()
    torch.save(weights, folder / "pytorch_model.bin")  # a harmless one

    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder)
