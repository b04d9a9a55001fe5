"""What Z-Image settles for a request: noise levels, guidance that counts from 0, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zimage_generate_image
from blissful_tuner.guidance import guidance_scales, plan_steps
from blissful_tuner.guidance_formulas import NEGATIVE
from blissful_tuner.options import PLAIN_GUIDANCE
from modules.errors import CacheError, CheckpointError, OptionError
from modules.flow.solvers import solver_for
from modules.speed_options import AttentionChoice
from protocols.data import Batch
from protocols.loading import Placement
from protocols.requests import Prepared, Request
from tests.tiny.z_image import write_tiny_z_image
from z_image.family import ZImage, ZImageFiles


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ZImage:
    files = write_tiny_z_image(tmp_path_factory.mktemp("models"))
    return ZImage(ZImageFiles(files.dit, vae=files.vae, text_encoder=files.text_encoder))


def prepare(family: ZImage, **asked: Any) -> Prepared:
    return family.prepare(Request("a cat", 1, **asked))


def sigmas_of(prepared: Prepared) -> Tensor:
    return solver_for(prepared.solver, prepared.steps, prepared.flow_shift).schedule.sigmas


def test_what_is_not_said_is_as_in_the_known_tuner(family: ZImage) -> None:
    prepared = prepare(family)

    assert (prepared.width, prepared.height, prepared.steps) == (1024, 1024, 25)
    assert (prepared.guidance_scale, prepared.negative_prompt, prepared.flow_shift) == ((0.0,), "", 3.0)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("models/z_image_bf16.safetensors", (28, 4.0)),
        ("Z-Image/transformer", (28, 4.0)),
        ("models--Tongyi-MAI--Z-Image-Turbo/snapshots/1a/transformer", (8, 0.0)),
        ("z_image_de_turbo_v1_bf16.safetensors", (25, 0.0)),  # as a training is not warned of it
        ("zit_bf16.safetensors", (8, 0.0)),
        ("zimage_TURBO_fp8_e4m3fn.safetensors", (8, 0.0)),
        ("z_image/my_z_image.safetensors", (25, 0.0)),
        ("z_image_style.safetensors", (25, 0.0)),
    ],
)
def test_a_name_says_the_release(family: ZImage, path: str, expected: tuple[int, float]) -> None:
    default = replace(family, files=replace(family.files, dit=Path(path))).defaults

    assert (default.steps, default.guidance_scale) == expected


def test_what_is_typed_counts_also_if_it_is_what_stands_in_the_help() -> None:
    files = ["--dit", "z_image_bf16.safetensors", "--save_path", "out", "--prompt", "a cat"]
    typed = ["--guidance_scale", "0.0", "--infer_steps", "25"]
    found = []

    for more in (typed, []):
        zimage_generate_image.main([*files, *more], lambda family, options: found.append(options.request))

    assert [(one.guidance_scale, one.infer_steps) for one in found] == [(0.0, 25), (None, None)]


@pytest.mark.parametrize("steps", [1, 8, 28])
def test_noise_levels_end_at_a_thousandth_or_evenly(family: ZImage, steps: int) -> None:
    tuner = torch.linspace(1, 0.001, steps + 1)[:-1]
    even = torch.linspace(1, 0, steps + 1)[:-1]  # the released code's last step goes from 0 to 0

    for one, levels in ((family, tuner), (replace(family, even_steps=True), even)):
        expected = torch.cat([3 * levels / (1 + 2 * levels), torch.zeros(1)])
        torch.testing.assert_close(sigmas_of(prepare(one, steps=steps)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("scale", "weight"), [(4.0, 5.0), (0.5, 1.5), (1.0, 2.0), (0.0, None), (-1.0, None)])
def test_guidance_counts_from_0(family: ZImage, scale: float, weight: float | None) -> None:
    """Pictures with a weight equal diffusers' in tests/parity."""
    prepared = prepare(family, guidance_scale=scale, steps=2)

    assert guidance_scales(prepared, PLAIN_GUIDANCE) == [(weight, weight)]
    assert prepared.guidance_scale == (max(scale, 0.0),)  # as it was asked, for metadata
    assert (NEGATIVE in plan_steps(prepared, PLAIN_GUIDANCE)[0][0].passes) is (weight is not None)


def test_a_schedule_counts_from_0_too(family: ZImage) -> None:
    prepared = prepare(family, guidance_scale=3.0, steps=4, cfg_schedule="1, 2:0.5")

    assert guidance_scales(prepared, PLAIN_GUIDANCE) == [(4.0, 1.5, None, None)]


def test_truncation_and_normalisation_are_those_of_the_official_pipeline(family: ZImage) -> None:
    prepared = prepare(family, extra={"cfg_trunc_ratio": "0.5", "renorm_cfg": "1.5"})

    assert (prepared.rules.max_signal, prepared.rules.norm_limit) == (0.5, 1.5)
    assert (prepare(family).rules.max_signal, prepare(family).rules.norm_limit) == (None, None)
    with pytest.raises(OptionError, match="--cfg_trunc_ratio .* 2: pass a share"):
        prepare(family, extra={"cfg_trunc_ratio": "2"})


def test_a_file_that_is_no_autoencoder_is_named_with_the_option_of_this_model(family: ZImage) -> None:
    files = replace(family.files, vae=family.files.dit)
    with pytest.raises(
        CheckpointError, match=r"it looks like a Z-Image transformer[^-]*--dit(.|\n)* to --vae"
    ):
        replace(family, files=files).prepare(Request("a cat", 1))


def test_attention_in_float32_is_refused_of_packages_that_lack_it(family: ZImage) -> None:
    wide, cpu = replace(family, attends_in_float32=True), torch.device("cpu")

    assert wide.load_dit(Placement(cpu)).attention == AttentionChoice("sdpa", in_float32=True)
    with pytest.raises(OptionError, match="--use_32bit_attention: FlashAttention 2 computes in 16 bits"):
        wide.load_dit(Placement(cpu, attention=AttentionChoice("flash")))


def test_the_help_says_where_guidance_counts_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        zimage_generate_image.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "weight of the prompt, counted from 0, which turns guidance off" in said


def test_a_text_cache_of_another_encoder_is_refused_with_what_to_do(family: ZImage) -> None:
    latents = torch.zeros(1, 16, 1, 4, 4)
    given: dict[str, Any] = {"latents": latents, "llm_embed": [torch.zeros(3, 8)]}
    batch = Batch(given, ("a cat",), ("a.png",))

    with pytest.raises(CacheError, match="has width 8.*zimage_cache_text_encoder_outputs.py"):
        family.batch_conditions(latents, batch)
    with pytest.raises(CacheError, match="has no llm_embed"):
        family.batch_conditions(latents, replace(batch, tensors={"latents": latents}))
