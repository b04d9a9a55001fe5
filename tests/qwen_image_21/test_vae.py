"""The VAE of Qwen-Image-2.1 against diffusers', in tiles, from every file layout, and what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage21
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from qwen_image_21.vae import QwenImage21VaeConfig, load_vae, read_vae, read_vae_config
from tests.manifests import tensor_list, write_hollow
from tests.parity.running import assert_equal
from tests.tiny.qwen_image_21_vae import vae_config, vae_settings, vae_state, write_vae, write_vae_folder
from tests.tiny.wan_encoders import vae22_tensors
from wan.vae_checkpoints import read_vae as read_wan_vae

CPU = torch.device("cpu")
NEAR = 3e-5  # of the largest value, float32: against float64, both are off by 4e-6 and less


def their_vae(config: QwenImage21VaeConfig) -> AutoencoderKLQwenImage21:
    """Diffusers' autoencoder with the weights of the tiny one."""
    settings = vae_settings(config)
    del settings["_class_name"]
    network = AutoencoderKLQwenImage21(**settings)
    network.load_state_dict(vae_state(config))
    return network.eval()


def tiny_pixels(height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, 4, 1, height, width, generator=generator) * 2 - 1


def statistics(config: QwenImage21VaeConfig) -> tuple[Tensor, Tensor]:
    mean, deviation = torch.tensor(config.mean), torch.tensor(config.deviation)
    return mean.view(1, -1, 1, 1, 1), deviation.view(1, -1, 1, 1, 1)


@pytest.mark.parametrize("channels", [64, 8])
@torch.no_grad()
def test_latents_and_pictures_equal_those_of_diffusers(tmp_path: Path, channels: int) -> None:
    config = vae_config(latent_channels=channels)
    ours = load_vae(write_vae_folder(tmp_path / "vae", config).parent, CPU, torch.float32)
    theirs = their_vae(config)
    pixels = tiny_pixels(48, 80, batch=2)

    latents = ours.encode(pixels)

    means = theirs.encode(pixels).latent_dist.mode()
    mean, deviation = statistics(config)
    assert latents.shape == (2, channels, 1, 3, 5)
    assert_equal(latents, (means - mean) / deviation, "latents", NEAR)
    assert_equal(ours.decode(latents), theirs.decode(means).sample, "pixels", NEAR)


@torch.no_grad()
def test_tiles_equal_those_of_diffusers_and_are_equal_to_a_whole_picture_inside(tmp_path: Path) -> None:
    config = vae_config()
    folder = write_vae_folder(tmp_path, config)
    tiled = load_vae(folder, CPU, torch.float32, tile=64)
    full = load_vae(folder, CPU, torch.float32)
    theirs = their_vae(config)
    theirs.enable_tiling(64, 64, 48, 48)
    pixels = tiny_pixels(96, 144)

    latents = tiled.encode(pixels)
    image = tiled.decode(latents)

    means = theirs.encode(pixels).latent_dist.mode()
    mean, deviation = statistics(config)
    assert_equal(latents, (means - mean) / deviation, "latents in tiles", NEAR)
    assert_equal(image, theirs.decode(means).sample, "pixels in tiles", NEAR)
    # neighbors are blended in the last quarter of a tile
    first = full.encode(pixels[..., :64, :64])
    assert_equal(latents[..., :3, :3], first[..., :3, :3], "inside the first tile", NEAR)
    assert (latents - full.encode(pixels)).abs().max() > 100 * NEAR, "the whole picture is computed"


def test_a_tile_bounds_what_is_computed_at_once(tmp_path: Path) -> None:
    vae = load_vae(write_vae(tmp_path / "vae.safetensors"), CPU, torch.float32, tile=64)
    sides: list[int] = []
    for network in (vae.encoder.conv_in, vae.decoder.conv_out):
        network.register_forward_hook(lambda _module, _inputs, output: sides.append(max(output.shape[-2:])))

    vae.decode(vae.encode(tiny_pixels(160, 160)))

    assert len(sides) > 2
    assert max(sides) == 64


def test_a_picture_of_a_batch_does_not_depend_on_the_others(tmp_path: Path) -> None:
    vae = load_vae(write_vae(tmp_path / "vae.safetensors"), CPU, torch.float32)
    pixels = tiny_pixels(32, 48, batch=3)

    assert torch.equal(vae.encode(pixels)[1:2], vae.encode(pixels[1:2]))


def test_pixels_without_alpha_are_opaque_and_bytes_are_numbers(tmp_path: Path) -> None:
    vae = load_vae(write_vae(tmp_path / "vae.safetensors"), CPU, torch.float32)
    generator = torch.Generator().manual_seed(3)
    colors = torch.randint(0, 256, (1, 3, 1, 32, 32), generator=generator, dtype=torch.uint8)
    alpha = torch.full_like(colors[:, :1], 255)
    opaque = vae.encode(torch.cat([colors, alpha], dim=1))

    assert torch.equal(vae.encode(colors), opaque)
    assert torch.equal(vae.encode(colors / 127.5 - 1), opaque)
    assert not torch.allclose(vae.encode(torch.cat([colors, alpha // 2], dim=1)), opaque)
    with pytest.raises(ValueError, match="nothing is drawn"):
        vae.encode(colors, [generator])


def test_statistics_stay_in_float32_and_come_from_the_config_of_the_folder(tmp_path: Path) -> None:
    config = replace(vae_config(), mean=(0.5,) * 64, deviation=(2.0,) * 64)
    declared = load_vae(write_vae_folder(tmp_path / "folder", config), CPU, torch.bfloat16)
    released = load_vae(write_vae(tmp_path / "vae.safetensors"), CPU, torch.bfloat16)
    pixels = tiny_pixels(32, 32)

    mean, deviation = statistics(vae_config())
    means = released.encode(pixels) * deviation + mean

    assert (declared.dtype, declared.encode(pixels).dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(declared.encode(pixels), (means - 0.5) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_a_single_file_may_have_a_prefix(tmp_path: Path, prefix: str) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in vae_state().items()}
    save_file(state, tmp_path / "vae.safetensors")

    vae = load_vae(tmp_path / "vae.safetensors", CPU, torch.float32)

    assert torch.equal(vae.quant_conv.weight, state[f"{prefix}quant_conv.weight"])


def test_the_released_file_has_the_known_sizes(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "vae.safetensors", tensor_list("qwen-image-2.1-vae-diffusers"))

    config = read_vae_config(path)

    assert config.latent_channels == 64
    assert [level.width_out for level in config.encoder] == [96, 192, 384, 768, 768]
    assert [level.width_out for level in config.decoder] == [1152, 1152, 576, 288, 144]
    assert {level.blocks for level in config.encoder} == {2}
    assert {level.blocks for level in config.decoder} == {3}
    vae = load_vae(path, torch.device("meta"), torch.bfloat16)
    # all of the file except the layers over time
    listed = tensor_list("qwen-image-2.1-vae-diffusers").items()
    expected = sum(math.prod(shape) for name, (_, shape) in listed if "time_conv" not in name)
    assert sum(parameter.numel() for parameter in vae.parameters()) == expected


def test_other_vaes_are_refused_by_name(tmp_path: Path) -> None:
    save_file(vae22_tensors(), tmp_path / "wan.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)looks like the VAE of Wan2.2 .*Pass qwen_image_2.1_vae_bf16"
    ):
        load_vae(tmp_path / "wan.safetensors", CPU, torch.float32)
    with (
        open_checkpoint(write_vae(tmp_path / "vae.safetensors")) as checkpoint,
        pytest.raises(CheckpointError, match="the VAE of Qwen-Image-2.1"),
    ):
        read_wan_vae(checkpoint)


def widen(name: str, axis: int) -> Callable[[dict[str, Tensor]], None]:
    """Return a change of a state: one tensor has a row or column more."""

    def change(state: dict[str, Tensor]) -> None:
        state[name] = torch.cat([state[name], state[name].narrow(axis, 0, 1)], axis)

    return change


def remove(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return change


FIRST = "encoder.down_blocks.1.resnets.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (widen("encoder.conv_in.weight", 1), "takes 5 channels of pixels and returns 4"),
        (widen(FIRST, 1), "a level of its encoder has 4 channels, the next 5"),
        (widen(FIRST, 0), "a level of its encoder"),
        (widen("quant_conv.weight", 0), "quant_conv.weight"),
        (remove("decoder.up_blocks.1.upsampler"), "its decoder scales height and width by 8, not by 16"),
        (remove("encoder.mid_block"), "encoder.mid_block"),
        (remove("post_quant_conv"), "post_quant_conv.weight is missing"),
        (remove("decoder.up_blocks"), "its decoder scales height and width by 1, not by 16"),
    ],
)
def test_a_damaged_file_is_an_error(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = vae_state()
    change(state)
    save_file(state, tmp_path / "vae.safetensors")

    with pytest.raises(CheckpointError, match=message):
        load_vae(tmp_path / "vae.safetensors", CPU, torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"latents_std": [1.0] * 63},
        {"latents_std": [0.0] * 64},
        {"latents_mean": [math.nan] * 64},
        {"latents_mean": "many"},
        {"latents_mean": [True] * 64},
        {"latents_mean": [10**300] * 64},
        {"latents_std": [1e-300] * 64},
    ],
)
def test_a_hostile_config_is_an_error(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = write_vae_folder(tmp_path / "vae")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | settings), encoding="utf-8")

    with pytest.raises(CheckpointError, match="one for each latent channel"):
        load_vae(folder, CPU, torch.float32)


def test_a_number_that_no_float_holds_is_an_error(tmp_path: Path) -> None:
    folder = write_vae_folder(tmp_path / "vae")
    path = folder / "config.json"
    settings = json.loads(path.read_text("utf-8")) | {"latents_mean": [10**400] * 64}
    path.write_text(json.dumps(settings), encoding="utf-8")

    with pytest.raises(CheckpointError, match="config.json cannot be read .* whole number of 1,329 bits"):
        load_vae(folder, CPU, torch.float32)


def test_latents_of_another_number_of_channels_need_their_statistics(tmp_path: Path) -> None:
    path = write_vae(tmp_path / "vae.safetensors", vae_config(latent_channels=8))

    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match='8 latent channels, .* config.json with its "latents_mean"'),
    ):
        read_vae(checkpoint)


def test_weights_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    path = write_vae(tmp_path / "vae.safetensors")
    state = load_file(path)
    state["decoder.conv_in.bias"][0] = math.nan
    save_file(state, path)

    with pytest.raises(CheckpointError, match="decoder.conv_in.bias"):
        load_vae(path, CPU, torch.float32)
