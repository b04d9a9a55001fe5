"""TAEHV: equal to the recorded one, for the latents of the family only, with memory that does not grow."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blissful_tuner.taehv import (
    CPU,
    TaehvConfig,
    TinyDecoder,
    TinyVae,
    check_taehv,
    decoding_bytes,
    load_taehv,
)
from modules.contract.family import LatentSpec
from modules.errors import CheckpointError
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from tests.tiny.taehv import CONFIG_5B, write_taehv
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


def test_frames_are_numbers_of_8_bits_from_black_to_white(tmp_path: Path) -> None:
    vae = load_taehv(write_taehv(tmp_path / "t.pth"), LATENT, CPU)
    latents = torch.randn(16, 3, 4, 6)

    frames = torch.cat(list(vae.frames(latents, CPU)))

    assert frames.shape == (9, 32, 48, 3)
    expected = (decode(vae, latents.transpose(0, 1)).clamp(0, 1) * 255).round().to(torch.uint8)
    assert torch.equal(frames, expected.permute(0, 2, 3, 1))


def test_frames_of_5b_have_the_size_of_its_latents(tmp_path: Path) -> None:
    vae = load_taehv(write_taehv(tmp_path / "t.pth", CONFIG_5B), LATENT_5B, CPU)
    frames = torch.cat(list(vae.frames(torch.randn(48, 3, 4, 6), CPU)))
    assert LATENT_5B.shape(len(frames), *frames.shape[1:3]) == (1, 48, 3, 4, 6)


def test_a_patch_of_pixels_is_laid_out_in_rows_and_columns() -> None:
    decoder = TinyDecoder(CONFIG_5B)
    with torch.no_grad():
        decoder.decoder["22"].weight.zero_()
        decoder.decoder["22"].bias.copy_(torch.arange(12.0))
        (frame,) = decoder.decode(torch.zeros(48, 1, 2, 3))
    assert frame.shape == (1, 3, 32, 48)
    assert frame[0, 1, :2, :2].tolist() == [[4.0, 5.0], [6.0, 7.0]]


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


def test_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    write_hollow(path, {"decoder.upsamples.0.residual.2.weight": ("F32", (4, 4))})
    with pytest.raises(CheckpointError, match=r"not a TAEHV; it looks like a Wan2.1 VAE(.|\n)*--preview_vae"):
        check_taehv(path, LATENT)


def test_a_file_without_one_of_its_layers_is_refused(tmp_path: Path) -> None:
    tensors = tensor_list("taehv")
    del tensors["decoder.15.conv.2.weight"]
    path = write_hollow(tmp_path / "t.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"decoder.15.conv.2.weight"):
        check_taehv(path, LATENT)


@pytest.mark.parametrize("name", ["decoder.1.weight", "decoder.8.weight", "decoder.14.weight"])
def test_a_layer_without_numbers_is_refused(name: str, tmp_path: Path) -> None:
    tensors = tensor_list("taehv")
    dtype, shape = tensors[name]
    path = write_hollow(tmp_path / "t.safetensors", {**tensors, name: (dtype, [0, *shape[1:]])})
    with pytest.raises(CheckpointError, match="not a TAEHV"):
        check_taehv(path, LATENT)


def test_the_memory_of_decoding_is_that_of_one_latent_frame() -> None:
    config = TaehvConfig(16, (256, 128, 64, 64), (1, 2, 2))
    small, large = (decoding_bytes(config, torch.float16, 60, width) for width in (52, 104))
    assert 100 << 20 < small < large < 2.1 * small
    # four frames of 64 channels in float16 are the largest features; a few of them are held at once
    largest = 4 * 64 * 480 * 832 * 2
    assert 2 * largest < large < 4 * largest
