"""HunyuanImage's VAE against recorded vectors and diffusers; tiles, rows of convolutions, and files."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from encoders.tiles import posterior_generator
from hunyuan_image.configs import LATENT
from hunyuan_image.vae import HunyuanImageVae, load_vae
from hunyuan_image.vae_blocks import HunyuanImageVaeConfig, compute_in_rows
from hunyuan_image.vae_checkpoints import read_vae
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from tests.tiny.hunyuan_encoders import save
from tests.tiny.hunyuan_image import CHANNELS, VAE, diffusers_vae, vae_state, write_vae

CPU = torch.device("cpu")
NEAR = 1e-5


def as_matrices(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The 1x1 convolutions of a file as the linear layers that they are here."""
    return {
        name: value.flatten(1) if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else value
        for name, value in state.items()
    }


def golden_vae(tile: int | None = None) -> HunyuanImageVae:
    case, _ = read_case("hunyuan_image_vae")
    sizes = case["config"]
    config = HunyuanImageVaeConfig(sizes["latent_channels"], tuple(sizes["block_out_channels"]), 2, 3)
    vae = HunyuanImageVae(config, tile)
    weights = make_weights(case["weights_model_key"], case["weights"], case["salt"])
    vae.load_state_dict(as_matrices(weights))
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("rows", [None, 5])
def test_encoding_and_decoding_equal_the_recorded_values(rows: int | None) -> None:
    case, tensors = read_case("hunyuan_image_vae")
    vae = golden_vae()
    if rows is not None:
        compute_in_rows(vae, rows)

    mean, logvar = vae.moments(tensors["image"].unsqueeze(2)).squeeze(2).chunk(2, dim=1)
    pixels = vae.decode(tensors["z"].unsqueeze(2))

    tolerance = case["tolerance"]
    torch.testing.assert_close(mean, tensors["mean"], rtol=0, **tolerance["mean"])
    torch.testing.assert_close(logvar, tensors["logvar"], rtol=0, **tolerance["logvar"])
    expected = tensors["decoded"].clamp(-1, 1).unsqueeze(2)
    torch.testing.assert_close(pixels, expected, rtol=0, **tolerance["decoded"])


def test_tiles_equal_the_recorded_ones() -> None:
    _, tensors = read_case("hunyuan_image_vae")
    vae = golden_vae(128)

    pixels = vae.decode(tensors["z_tiled"].unsqueeze(2))
    moments = vae.moments(tensors["image_tiled"].float().unsqueeze(2)).squeeze(2)

    torch.testing.assert_close(pixels.squeeze(2), tensors["decode_tiled"].clamp(-1, 1), rtol=0, atol=1e-3)
    # the recorded picture was rounded to float16 after it was encoded, by up to 1e-3: a tile by itself, which
    # nothing was blended into, differs by as much
    alone = vae.encoder(tensors["image_tiled"][..., :128, :128].float())[..., :3, :3]
    allowed = 1.5 * (alone - tensors["encode_tiled"][..., :3, :3]).abs().max()
    assert (moments - tensors["encode_tiled"]).abs().max() <= allowed
    torch.testing.assert_close(moments[..., :3, :3], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["published", "diffusers"])
def test_a_file_gives_what_diffusers_class_gives(layout: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLHunyuanImage

    theirs = AutoencoderKLHunyuanImage(
        3, 3, CHANNELS, VAE.widths, 2, spatial_compression_ratio=32, sample_size=384
    )
    state = vae_state()
    theirs.load_state_dict(diffusers_vae(state))
    path = save(tmp_path / "vae.safetensors", state if layout == "published" else diffusers_vae(state))
    ours = load_vae(path, CPU, torch.float32, chunk_size=7)
    torch.manual_seed(0)
    pixels, latents = torch.rand(1, 3, 64, 32) * 2 - 1, torch.randn(1, CHANNELS, 2, 1)

    with torch.no_grad():
        moments, decoded = theirs._encode(pixels), theirs.decode(latents).sample
    ours_moments = ours.moments(pixels.unsqueeze(2)).squeeze(2)
    ours_decoded = ours.decode(latents.unsqueeze(2))

    assert (ours_moments - moments).abs().max() <= NEAR * moments.abs().max()
    assert (ours_decoded.squeeze(2) - decoded.clamp(-1, 1)).abs().max() <= 1e-4


def test_latents_are_samples_of_the_posterior_seeded_by_a_name(tmp_path: Path) -> None:
    vae = load_vae(write_vae(tmp_path / "vae.safetensors"), CPU, torch.float32)
    picture = torch.randint(0, 256, (1, 3, 1, 32, 64), dtype=torch.uint8)

    first, again, other = (vae.encode(picture, [posterior_generator(name)]) for name in ("a", "a", "b"))

    assert first.shape == (1, CHANNELS, 1, 1, 2) == LATENT.shape(1, 32, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    mean, logvar = vae.moments(picture).chunk(2, dim=1)
    noise = torch.randn(mean.shape[1:], generator=posterior_generator("a"))
    expected = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
    torch.testing.assert_close(first, expected)
    assert torch.equal(vae.encode(picture), mean)


def test_the_published_vae_loads_at_full_size(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "vae.safetensors", tensor_list("hunyuanimage2.1-vae"))

    vae = load_vae(path, torch.device("meta"), torch.float16)

    assert sum(each.numel() for each in vae.parameters()) == 405575491


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decoder.conv_in.weight": torch.zeros(128, 16, 3, 3)}, "16 latent channels"),
        ({"encoder.down.6.block.0.conv1.weight": torch.zeros(4)}, "7"),
        ({"encoder.down.4.block.0.conv1.weight": torch.zeros(48, 48, 3, 3)}, "do not fit"),
    ],
)
def test_another_vae_is_refused_by_name(change: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    path = save(tmp_path / "vae.safetensors", {**vae_state(), **change})

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=says):
        read_vae(checkpoint)


def test_a_file_without_a_vae_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "vae.safetensors", {"encoder.conv_in.conv.weight": torch.zeros(2)})

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="HunyuanVideo VAE"):
        read_vae(checkpoint)
