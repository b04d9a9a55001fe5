"""TAEHV: equal to the recorded one, for the latents of the family only, with memory that does not grow."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blissful_tuner.taehv import (
    CPU,
    TinyDecoder,
    TinyVae,
    check_taehv,
    load_taehv,
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
