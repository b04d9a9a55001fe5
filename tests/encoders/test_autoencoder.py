"""FLUX's autoencoder against recorded numbers and diffusers, whole and in tiles; its files."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from encoders.autoencoder import SCALE, SHIFT, load_autoencoder, read_autoencoder_header
from encoders.tiles import sample_posterior
from modules.errors import CheckpointError
from modules.media.pixels import byte_clips, to_pixels
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from tests.tiny.hunyuan_encoders import prefixed, save
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.picture_encoders import (
    all_in_one,
    autoencoder_config,
    autoencoder_diffusers,
    autoencoder_tensors,
    write_autoencoder,
    write_autoencoder_folder,
)

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # float32: the same operations, in another order


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("models") / "ae.safetensors")


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pictures(count: int = 1, height: int = 32, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(count, 3, 1, height, width, generator=generator).clamp_(-1, 1)


def diffusers_autoencoder(edge: int | None = None) -> AutoencoderKL:
    """diffusers' class with the same weights, in tiles from `edge` pixels on."""
    config = autoencoder_config()
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=config.widths,
        layers_per_block=config.encoder_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=edge or 1024,
    ).eval()
    theirs.load_state_dict(autoencoder_diffusers(autoencoder_tensors()))
    if edge is not None:
        theirs.enable_tiling()
    return theirs


def test_numbers_equal_those_recorded(tmp_path: Path) -> None:
    case, tensors = read_case("flux_ae")
    save_file(make_weights("flux-ae", case["weights"]), tmp_path / "ae.safetensors")
    network = load_autoencoder(tmp_path / "ae.safetensors", CPU, torch.float32)

    moments = network.moments(tensors["image"].unsqueeze(2)).squeeze(2)
    decoded = network.decode_unclamped(tensors["latent"].unsqueeze(2)).squeeze(2)
    of_given = network.decode_unclamped(tensors["z"].unsqueeze(2)).squeeze(2)

    mean, log_variance = moments.chunk(2, dim=1)
    torch.testing.assert_close(mean, tensors["mean"], atol=3e-4, rtol=0)
    torch.testing.assert_close(log_variance, tensors["logvar"], atol=3e-4, rtol=0)
    latent = (mean + (log_variance / 2).exp() * tensors["noise"] - SHIFT) * SCALE
    torch.testing.assert_close(latent, tensors["latent"], atol=3e-4, rtol=0)
    torch.testing.assert_close(of_given, tensors["decoded"], atol=1e-3, rtol=0)
    assert not torch.allclose(decoded, of_given, atol=0.1)


@pytest.mark.slow_cases("64")
@torch.no_grad()
@pytest.mark.parametrize("edge", [None, 64])
def test_moments_and_pixels_equal_those_of_diffusers(file: Path, edge: int | None) -> None:
    theirs, ours = diffusers_autoencoder(edge), load_autoencoder(file, CPU, torch.float32, edge)
    given = pictures(1, 104, 136) if edge else pictures(2)
    latents = torch.randn(len(given), 16, 1, *(side // 8 for side in given.shape[-2:]))

    expected = theirs.encode(given.squeeze(2)).latent_dist.parameters
    pixels = theirs.decode(latents.squeeze(2) / SCALE + SHIFT).sample

    torch.testing.assert_close(ours.moments(given).squeeze(2), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.decode_unclamped(latents).squeeze(2), pixels, atol=TOLERANCE, rtol=0)
    assert ours.decode(latents).abs().max() <= 1


def test_a_sample_is_that_of_its_own_generator_whatever_else_is_in_the_batch(file: Path) -> None:
    network = load_autoencoder(file, CPU, torch.float32)
    both = network.encode(pictures(2), seeded(1, 2))
    assert torch.equal(both[1:], network.encode(pictures(2)[1:], seeded(2)))
    assert not torch.equal(both[:1], network.encode(pictures(2)[:1], seeded(2)))

    mean, log_variance = network.moments(pictures(2)[:1]).chunk(2, dim=1)
    noise = torch.randn(mean.shape[1:], generator=seeded(1)[0])
    expected = (mean + (log_variance / 2).exp() * noise - SHIFT) * SCALE
    torch.testing.assert_close(both[:1], expected)
    torch.testing.assert_close(network.encode(pictures(2)[:1]), (mean - SHIFT) * SCALE)
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        network.encode(pictures(2), seeded(1))


def test_logarithms_of_variances_count_as_they_are() -> None:
    moments = torch.cat([torch.zeros(1, 1, 1, 2, 2), torch.full((1, 1, 1, 2, 2), 30.0)], dim=1)
    noise = torch.randn(1, 1, 1, 2, 2, generator=seeded(0)[0])
    plain = sample_posterior(moments.clone(), seeded(0)) / noise
    torch.testing.assert_close(plain, torch.full_like(noise, 15.0).exp())
    limited = sample_posterior(moments.clone(), seeded(0), (-30.0, 20.0)) / noise
    torch.testing.assert_close(limited, torch.full_like(noise, 10.0).exp())


def test_bytes_are_the_same_pictures(file: Path) -> None:
    network = load_autoencoder(file, CPU, torch.float32)
    frames = torch.randint(256, (1, 1, 16, 24, 3), dtype=torch.uint8)
    assert torch.equal(network.encode(byte_clips(frames)), network.encode(to_pixels(frames)))


def test_every_layout_gives_the_same_weights(file: Path, tmp_path: Path) -> None:
    expected = load_autoencoder(file, CPU, torch.float32).state_dict()
    tensors = autoencoder_tensors()
    write_autoencoder_folder(tmp_path / "release" / "vae")
    layouts = {
        "first_stage_model": prefixed(tensors, "first_stage_model."),
        "all in one": all_in_one(tensors),
        "diffusers in one": all_in_one(autoencoder_diffusers(tensors)),
        "bfloat16": {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()},
    }
    paths = [save(tmp_path / f"{name}.safetensors", stored) for name, stored in layouts.items()]
    for path in (*paths, tmp_path / "release" / "vae", tmp_path / "release"):
        found = load_autoencoder(path, CPU, torch.float32).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            rounded = expected[name].bfloat16().float() if "bfloat16" in path.name else expected[name]
            assert torch.equal(tensor, rounded), (path, name)
    assert load_autoencoder(file, CPU, torch.bfloat16).encode(pictures()).dtype == torch.float32


@pytest.mark.parametrize("in_diffusers_layout", [False, True])
def test_the_published_file_fits_at_full_size(tmp_path: Path, in_diffusers_layout: bool) -> None:
    tensors = tensor_list("flux1-ae")
    if in_diffusers_layout:
        hollow = {name: torch.empty(shape, device="meta") for name, (_, shape) in tensors.items()}
        tensors = {name: ("BF16", tuple(one.shape)) for name, one in autoencoder_diffusers(hollow).items()}
    path = write_hollow(tmp_path / "ae.safetensors", tensors)
    network = load_autoencoder(path, torch.device("meta"), torch.float32)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 83819683
    assert read_autoencoder_header(path).widths == (128, 256, 512, 512)


def test_a_config_beside_the_file_states_the_norm_groups(tmp_path: Path) -> None:
    folder = write_autoencoder_folder(tmp_path / "vae")
    assert read_autoencoder_header(folder).groups == 32

    def state(groups: str) -> None:
        config = f'{{"_class_name": "AutoencoderKL", "norm_num_groups": {groups}}}'
        (folder / "config.json").write_text(config, encoding="utf-8")

    state("8")
    assert load_autoencoder(folder, CPU, torch.float32).encoder.norm_out.num_groups == 8
    for groups, message in (("5", "32 channels cannot be divided into 5"), ("true", "must be at least 1")):
        state(groups)
        with pytest.raises(CheckpointError, match=message):
            load_autoencoder(folder, CPU, torch.float32)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    def some(without: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in autoencoder_tensors().items() if without not in name}

    quant_conv = {**autoencoder_tensors(), "quant_conv.weight": torch.ones(32, 32, 1, 1)}
    image_vae = tensor_list("hunyuanimage2.1-vae")
    cases = {
        "the HunyuanVideo VAE": write_vae(tmp_path / "hunyuan.safetensors"),
        "has 64 latent channels": write_hollow(tmp_path / "image.safetensors", image_vae),
        "a quant_conv": save(tmp_path / "sd.safetensors", quant_conv),
        "encoder.down has 3 levels": save(tmp_path / "less.safetensors", some("encoder.down.3")),
        "missing: decoder.conv_out.bias": save(tmp_path / "cut.safetensors", some("decoder.conv_out.bias")),
    }
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load_autoencoder(path, CPU, torch.float32)
        assert str(path) in str(caught.value)
