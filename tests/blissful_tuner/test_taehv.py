"""Latents as colours. TAEHV: equal to the recorded one, for the latents of the family only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from blissful_tuner.taehv import (
    CPU,
    TinyDecoder,
    TinyVae,
    check_taehv,
    enlarge,
    load_taehv,
    project,
)
from modules.contract.data import LatentSpec
from modules.errors import CheckpointError
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from wan.spec import LATENT, LATENT_5B

PICTURES = LatentSpec(channels=16, stride=(1, 8, 8), pixel_step=16, frame_step=1)


def decode(vae: TinyVae, latents: Tensor) -> Tensor:
    """latents: F C h w. Returns F 3 H W."""
    decoder = TinyDecoder(vae.config)
    decoder.load_state_dict(vae.weights)
    with torch.no_grad():
        return torch.cat(list(decoder.decode(latents.transpose(0, 1))))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_decoding_equals_the_recorded_one(tmp_path: Path, suffix: str) -> None:
    case, tensors = read_case("taehv")
    weights = make_weights(case["weights_model_key"], case["weights"])
    path = tmp_path / f"taehv.{suffix}"
    if suffix == "pth":
        torch.save(weights, path)
    else:
        from safetensors.torch import save_file

        save_file(weights, path)

    vae, still = load_taehv(path, LATENT, CPU), load_taehv(path, PICTURES, CPU)

    latents = tensors["latent"][0]
    tolerance = {"rtol": 0, "atol": 1e-4}  # float32; differences are below 1e-6
    torch.testing.assert_close(decode(vae, latents), tensors["decoded"][0], **tolerance)
    torch.testing.assert_close(decode(vae, latents[:1]), tensors["decoded_one"][0], **tolerance)
    torch.testing.assert_close(decode(still, latents), tensors["decoded_no_time_growth"][0], **tolerance)


@pytest.mark.parametrize(
    ("manifest", "spec"),
    [
        ("taehv", LATENT),
        ("taehv1.5", LatentSpec(channels=32, stride=(4, 16, 16), pixel_step=16, frame_step=4)),
        ("taew2.2", LATENT_5B),
    ],
)
def test_published_files_fit_the_latents_that_they_are_for(
    tmp_path: Path, manifest: str, spec: LatentSpec
) -> None:
    path = write_hollow(tmp_path / "t.safetensors", tensor_list(manifest))

    assert check_taehv(path, spec).widths == (256, 128, 64, 64)

    other = replace(spec, channels=spec.channels + 1)
    with pytest.raises(CheckpointError, match=rf"is for other latents: it decodes {spec.channels} channels"):
        check_taehv(path, other)


TWO = LatentSpec(
    channels=2,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    preview_factors=((1.0, 0.0, -1.0), (0.5, 2.0, 0.0)),
    preview_bias=(0.25, 0.0, 1.0),
)


def test_each_place_is_mapped_to_a_colour_of_its_own() -> None:
    latents = torch.tensor([[[[3.0, -1.0]]], [[[2.0, 4.0]]]])  # 2 1 1 2

    colours = project(latents, TWO)

    expected = torch.tensor([[[[4.25, 1.25]]], [[[4.0, 8.0]]], [[[-2.0, 2.0]]]])
    torch.testing.assert_close(colours, expected, rtol=0, atol=1e-6)


def test_the_whole_range_is_used_once_over_the_clip_not_in_each_frame() -> None:
    colours = torch.zeros(3, 2, 4, 4)
    colours[:, 0, :2] = -3.0
    colours[:, 1, 2:] = 5.0

    dark, light = enlarge(colours, 8, 8)

    assert dark.shape == light.shape == (32, 32, 3)
    assert dark.dtype == np.uint8
    assert (dark.min(), light.max()) == (0, 255)
    assert 90 <= dark.max() <= 110  # zero is 3/8 of the range; bicubic goes a little beyond
    assert 70 <= light.min() <= 96
