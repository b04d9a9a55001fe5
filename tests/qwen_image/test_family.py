"""What Qwen-Image settles for a request: noise levels, guidance, and the options that it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import qwen_image_generate_image
import qwen_image_train_network
from blissful_tuner.guidance_formulas import POSITIVE, keep_token_norms
from modules.errors import CacheError, OptionError
from modules.flow.solvers import solver_for
from protocols.data import Batch
from protocols.requests import Prepared, Request
from qwen_image.family import QwenImage
from qwen_image.files import QwenImageFiles
from tests.tiny.qwen_image import write_tiny_qwen_image

# of the release's scheduler_config.json
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> QwenImage:
    files = write_tiny_qwen_image(tmp_path_factory.mktemp("models"))
    return QwenImage(QwenImageFiles(files.dit, vae=files.vae, text_encoder=files.text_encoder))


def prepare(family: QwenImage, **asked: Any) -> Prepared:
    return family.prepare(Request("a cat", 1, **asked))


def test_what_is_not_said_is_as_released(family: QwenImage) -> None:
    prepared = prepare(family)

    assert (prepared.width, prepared.height, prepared.steps) == (1328, 1328, 25)
    assert (prepared.guidance_scale, prepared.negative_prompt) == ((4.0,), " ")
    assert prepared.rules.norm_patch_size == 2


@pytest.mark.parametrize(("steps", "width", "height"), [(25, 1328, 1328), (4, 512, 768), (1, 256, 256)])
def test_noise_levels_are_those_of_the_released_scheduler(
    family: QwenImage, steps: int, width: int, height: int
) -> None:
    prepared = prepare(family, steps=steps, width=width, height=height)
    tokens = (width // 16) * (height // 16)
    mu = 0.5 + (tokens - 256) * (0.9 - 0.5) / (8192 - 256)
    theirs = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    if steps > 1:  # a single level divides by 0 there
        theirs.set_timesteps(sigmas=numpy.linspace(1, 1 / steps, steps), mu=mu)

    schedule = solver_for(prepared.solver, steps, prepared.flow_shift).schedule

    expected = theirs.sigmas if steps > 1 else torch.tensor([1.0, 0.0])
    assert torch.allclose(schedule.sigmas, expected, atol=1e-6)
    assert torch.allclose(schedule.timesteps, expected[:-1] * 1000, atol=1e-3)


def test_a_flow_shift_that_is_given_is_plain(family: QwenImage) -> None:
    """As the distilled LoRAs for four and eight steps want it: --flow_shift 3."""
    prepared = prepare(family, flow_shift=3.0, steps=4)

    sigmas = solver_for(prepared.solver, 4, prepared.flow_shift).schedule.sigmas

    assert torch.allclose(sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    assert prepare(family, solver="unipc").flow_shift == prepare(family).flow_shift


def test_guidance_keeps_the_norm_of_each_token_and_leaves_zeros() -> None:
    """Norms of guided pictures equal diffusers' in tests/parity."""
    positive, guided = torch.ones(1, 16, 1, 4, 6), torch.full((1, 16, 1, 4, 6), 3.0)
    guided[..., :2, :2] = 0  # nothing to scale

    made = keep_token_norms(2).change(guided, {POSITIVE: positive})

    torch.testing.assert_close(made, positive * (guided != 0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cfg_norm"], "--cfg_norm needs --model_version layered"),
        (
            ["--remove_first_image_from_target"],
            "--remove_first_image_from_target needs --model",
        ),
        (["--model_version", "layered", "--rcm_threshold", "1"], "--rcm_threshold is for releases that edit"),
        (["--automatic_prompt_lang_for_layered", "en"], "captions are not written while generating"),
        (["--edit", "--edit_plus"], "--edit_plus and --edit exclude each other"),
        (["--mask_path", "a.png", "--rcm_threshold", "0.1"], "--mask_path and --rcm_threshold exclude"),
        (["--rcm_kernel_size", "4", "--rcm_threshold", "1"], "--rcm_kernel_size 4: pass an odd number"),
        (["--rcm_threshold", "2", "--rcm_relative_threshold"], "pass a share from 0 to 1, such as 0.2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((OptionError, SystemExit)) as refused:
        qwen_image_generate_image.main([*words, "--prompt", "a", "--save_path", str(tmp_path)])
    assert message in str(refused.value) + capsys.readouterr().err


def test_a_text_cache_of_another_encoder_is_refused_with_what_to_do(family: QwenImage) -> None:
    latents = torch.zeros(1, 16, 1, 4, 4)
    given: dict[str, Any] = {"latents": latents, "vl_embed": [torch.zeros(3, 8)]}
    batch = Batch(given, ("a cat",), ("a.png",))

    with pytest.raises(CacheError, match="has width 8.*qwen_image_cache_text_encoder_outputs.py"):
        family.batch_conditions(latents, batch)
    with pytest.raises(CacheError, match="has no vl_embed"):
        family.batch_conditions(latents, replace(batch, tensors={"latents": latents}))


def test_the_script_trains_with_the_samplers_of_the_known_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        qwen_image_train_network.main(["--help"])
    assert "qwen_shift" in capsys.readouterr().out
