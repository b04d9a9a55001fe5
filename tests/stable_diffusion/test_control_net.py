"""ControlNets: files in all layouts, and what they add to the U-Net, compared with diffusers' own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError, OptionError
from stable_diffusion.contract import SD1, SD2, SDXL, Kind, Model, Picture, Settings, UnetCall
from stable_diffusion.control_net import ControlNets, check_control_nets, load_control_nets
from stable_diffusion.control_net_files import load_control_net, read_control_net
from stable_diffusion.control_options import ControlOptions
from tests.tiny.control_nets import (
    control_net,
    control_net_config,
    control_net_state,
    ldm_control_net,
    write_control_net,
    write_lllite,
)
from tests.tiny.stable_diffusion import KINDS, unet_state, write_sd1

CPU = torch.device("cpu")
OF_NAME = {kind.name: kind for kind in (SD1, SD2, SDXL)}
SETTINGS = Settings(width=64, height=48, steps=4, scale=7.5)


def unet_of(kind: str) -> UNet2DConditionModel:
    network = UNet2DConditionModel(**KINDS[kind].unet)
    network.load_state_dict(unet_state(kind))
    return network.eval().requires_grad_(False)


def model_of(kind: str) -> Model:
    return Model(
        kind=OF_NAME[kind],
        path=Path("model"),
        unet=unet_of(kind),
        vae=None,
        texts=(),
        predicts_velocity=False,
        zero_terminal_snr=False,
        device=CPU,
        dtype=torch.float32,
        vae_dtype=torch.float32,
    )


def options_of(*paths: Path, **values: tuple[object, ...]) -> ControlOptions:
    others = dict.fromkeys(
        ("control_net_lllite_models", "control_net_preps", "control_net_multipliers", "control_net_ratios")
    )
    return ControlOptions(**{"control_net_models": paths, **others, **values})  # type: ignore[arg-type]


def picture(*guides: Path, seed: int = 1, settings: Settings = SETTINGS) -> Picture:
    return Picture("line 1", "a cat", "", seed, settings, "a cat", guides=guides)


def write_guide(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def call_of(kind: str, rows: int = 2, step: int = 0, pictures: int = 1) -> UnetCall:
    generator = torch.Generator().manual_seed(3)
    config = KINDS[kind].unet
    added = {}
    if kind == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {
            "text_embeds": torch.randn((rows, pooled), generator=generator),
            "time_ids": torch.full((rows, 6), 64.0),
        }
    return UnetCall(
        step=step,
        num_steps=4,
        timestep=501.0,
        sample=torch.randn((rows, 4, 6, 8), generator=generator),
        context=torch.randn((rows, 77, config["cross_attention_dim"]), generator=generator),
        pictures=pictures,
        negative_rows=rows // 2,
        added=added,
    )


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).float().permute(2, 0, 1)[None] / 255


def theirs(kind: str, call: UnetCall, guides: Tensor, scale: float = 1.0, seed: int = 50) -> list[Tensor]:
    """The residuals of diffusers' own network."""
    down, mid = control_net(kind, seed)(
        call.sample,
        torch.tensor(call.timestep),
        encoder_hidden_states=call.context,
        controlnet_cond=guides,
        conditioning_scale=scale,
        added_cond_kwargs=dict(call.added),
        return_dict=False,
    )
    return [*down, mid]


def residuals(call: UnetCall) -> list[Tensor]:
    down, mid = call.residuals
    return [*down, mid]


# Files


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("layout", ["released", "prefixed", "diffusers", "folder", "difference"])
def test_each_layout_gives_the_same_network(tmp_path: Path, kind: str, layout: str) -> None:
    path = write_control_net(tmp_path / ("net" if layout == "folder" else "net.safetensors"), kind, layout)
    unet = unet_of(kind)

    with open_checkpoint(path) as checkpoint:
        plan = read_control_net(checkpoint, unet.config, OF_NAME[kind].words)
        loaded = load_control_net(plan, unet, CPU, torch.float32).state_dict()

    wanted = control_net_state(kind)
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(loaded[name], tensor, atol=1e-6, rtol=1e-6)


def test_released_names_are_translated_as_diffusers_does() -> None:
    state = control_net_state("sd1")

    converted = convert_controlnet_checkpoint(ldm_control_net(state), control_net_config("sd1"))

    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())
