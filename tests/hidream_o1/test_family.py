"""What HiDream-O1-Image settles for a request and a training, and what it refuses before a network loads."""

import itertools
import logging
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from hidream_o1 import options as own
from hidream_o1.configs import DEV, FULL, HiDreamO1Variant
from hidream_o1.family import HiDreamO1, family_for_generation, family_for_training
from hidream_o1.files import HiDreamO1Files
from hidream_o1.flash import TIMES, limit_noise, select_levels
from hidream_o1.texts import KEY, HiDreamO1Tokenizer
from modules.errors import CaptionError, CheckpointError, OptionError
from protocols.requests import Prepared, Prompt, Request
from tests.faults.messages import assert_one_message, run_here
from tests.tiny.families import family_called
from tests.tiny.hidream_o1 import TinyHiDreamO1, write_tiny_hidream_o1
from tests.tiny.language_models import write_qwen_tokenizer
from tests.tiny.runs import make_project
from training.loss import element_errors
from training.noise_options import L2

REQUEST = Request("a cat", seed=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyHiDreamO1:
    return write_tiny_hidream_o1(tmp_path_factory.mktemp("model"))


def prepare(files: TinyHiDreamO1, variant: HiDreamO1Variant = FULL, **changes: Any) -> Prepared:
    return HiDreamO1(HiDreamO1Files(files.dit), variant=variant).prepare(replace(REQUEST, **changes))


def test_what_is_not_said_is_as_released(files: TinyHiDreamO1) -> None:
    prepared = prepare(files)
    assert (prepared.width, prepared.height, prepared.steps) == (2048, 2048, 50)
    assert (prepared.guidance_scale, prepared.flow_shift, prepared.solver) == ((5.0,), 3.0, "unipc")
    dev = prepare(files, DEV, solver=own.RELEASED_SOLVER)
    assert (dev.steps, dev.guidance_scale, dev.solver) == (28, (1.0,), "lcm")
    assert dev.sigmas == (*(time / 1000 for time in TIMES), 0.0)


@pytest.mark.parametrize("steps", range(1, 29))
def test_fewer_steps_of_dev_have_some_of_its_levels(steps: int) -> None:
    levels = select_levels(steps)
    assert len(levels) == steps + 1
    assert all(one > other for one, other in itertools.pairwise(levels))
    assert {round(1000 * level) for level in levels[:-1]} <= {*TIMES}
    assert levels[0] == 0.999


def test_more_steps_than_dev_has_are_refused(files: TinyHiDreamO1, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(OptionError, match="--infer_steps 29: Dev has 28 fixed"):
        prepare(files, DEV, steps=29)
    assert prepare(files, DEV, steps=29, solver="euler").steps == 29
    prepare(files, DEV, flow_shift=2.0)
    assert "--flow_shift 2 is ignored because Dev's noise levels are fixed" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hidream_o1_image_bf16", "full"),
        ("hidream_o1_image_dev_bf16", "dev"),
        ("HiDream-O1-Image-Dev-2604", "dev"),
        ("HiDream-O1-Image", "full"),
        ("mine", "full"),
    ],
)
def test_a_name_says_the_variant(
    name: str, expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = write_tiny_hidream_o1(tmp_path, name=name)
    options = replace(own.HiDreamO1GenerationOptions.from_defaults(), dit=files.dit)
    assert family_for_generation(options).variant.name == expected
    assert f"--model_type {expected}, because" in caplog.text
    assert family_for_generation(replace(options, model_type="dev")).variant is DEV


def test_a_training_records_what_it_found(files: TinyHiDreamO1) -> None:
    """A printed command may name a network that has no tokenizer next to it."""
    options = replace(own.HiDreamO1TrainingOptions.from_defaults(), dit=files.dit)
    family = family_for_training(options)
    assert family.options.model_type == "full"
    assert family.options.tokenizer == files.tokenizer / "tokenizer.json"


def test_noise_of_dev_is_limited_in_each_sample() -> None:
    noise = torch.randn(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    noise[1] *= 3
    limited = limit_noise(noise)
    for sample, before in zip(limited, noise, strict=True):
        torch.testing.assert_close(sample.abs().max(), 2.5 * before.std())
        assert (sample == before).float().mean() > 0.98
    assert (FULL.noise.vary_noise, DEV.noise.vary_noise is not None) == (None, True)


@pytest.mark.parametrize("variant", [FULL, DEV])
def test_the_loss_is_that_of_clean_pixels(variant: HiDreamO1Variant) -> None:
    """The velocity's error in model space, times the noise level and the scale, is that of the image."""
    generator = torch.Generator().manual_seed(2)
    clean, found, noise = (torch.randn(2, 3, 1, 4, 4, generator=generator) for _ in range(3))
    sigmas = torch.tensor([0.9, 0.05])
    share = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - share) * clean / variant.noise_scale + share * noise
    velocity = (noisy - found / variant.noise_scale) / share
    differences = velocity - (noise - clean / variant.noise_scale)

    errors = element_errors(L2, variant.noise, differences, sigmas, 1000 * sigmas)

    torch.testing.assert_close(errors, (found - clean).square(), rtol=1e-3, atol=1e-4)


def encode(files: TinyHiDreamO1, prompt: Prompt) -> list[int]:
    encoder = HiDreamO1Tokenizer(files.dit)
    encoder.load(torch.device("cpu"))
    (conditions,) = encoder.encode([prompt])
    (ids,) = conditions[KEY]
    return ids.tolist()


def test_an_empty_prompt_is_a_space_and_a_long_one_keeps_its_end(files: TinyHiDreamO1) -> None:
    assert encode(files, Prompt("")) == encode(files, Prompt(" ")) != encode(files, Prompt("a"))
    long = encode(files, Prompt("cat " * 5000))
    assert len(long) == 2048
    assert long[-5:] == encode(files, Prompt("a"))[-5:]


def test_texts_that_the_network_cannot_read_are_refused(files: TinyHiDreamO1, tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match="ends a text"):
        encode(files, Prompt("a <|tms_token|> cat"))
    with pytest.raises(CaptionError, match="tokens have no weights"):
        encode(files, Prompt("a cat", weighted_spans=((2, 5, 1.2),)))
    other = HiDreamO1Tokenizer(files.dit, write_qwen_tokenizer(tmp_path / "qwen"))
    with pytest.raises(CheckpointError, match=r"has no <\|boi_token\|>, so it is not HiDream-O1-Image's"):
        other.load(torch.device("cpu"))


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("generate", "--prompt_weighting", "tokens have no weights in this model"),
        ("generate", "--image_path a.png", ""),
        ("train", "--train_embedding zorb --embedding_file", "has no text encoder to add words to"),
    ],
)
def test_what_has_no_meaning_here_is_refused(script: str, words: str, message: str, tmp_path: Path) -> None:
    family = family_called("hidream_o1")
    family.prepare(tmp_path)
    line = family.generate if script == "generate" else family.train
    more = ["--prompt", "a cat", "--save_path", "out"] if script == "generate" else ["--output_dir", "out"]
    more += ["--output_name", "x"] if script == "train" else []
    code, said = run_here(*line, *more, *words.split(), folder=tmp_path)
    assert message in assert_one_message(code, said)


def test_a_plan_varies_the_noise_as_the_training_does(tmp_path: Path) -> None:
    """Dev limits the noise by the latents."""
    family = family_called("hidream_o1")
    make_project(family, tmp_path)
    dev = (tmp_path / "model" / "dit.safetensors").rename(tmp_path / "model" / "dit_dev.safetensors")
    train = [str(dev) if word.endswith("dit.safetensors") else word for word in family.train]
    printed = StringIO()
    code, said = run_here(
        *train, "--plan", "--output_dir", "out", "--output_name", "x", folder=tmp_path, printed=printed
    )
    assert not code, said
    assert "Memory plan" in printed.getvalue()
