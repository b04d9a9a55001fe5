"""What tests of ControlNets and LLLites share: models, pictures, guides and calls of the U-Net."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from stable_diffusion.contract import SD1, SD2, SDXL, AskedPicture, Model, PictureSettings, UnetCall
from tests.tiny.stable_diffusion import KINDS, unet_state

CPU = torch.device("cpu")
OF_NAME = {kind.name: kind for kind in (SD1, SD2, SDXL)}
SETTINGS = PictureSettings(width=64, height=48, steps=4, scale=7.5)


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


def picture(*guides: Path, parts: int = 1) -> AskedPicture:
    return AskedPicture("line 1", "a cat", "", 1, replace(SETTINGS, parts=parts), "a cat", guides=guides)


def write_guide(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def call_of(kind: str, rows: int = 2, step: int = 0, size: tuple[int, int] = (64, 48)) -> UnetCall:
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
        sample=torch.randn((rows, 4, size[1] // 8, size[0] // 8), generator=generator),
        context=torch.randn((rows, 77, config["cross_attention_dim"]), generator=generator),
        negative_rows=rows // 2,
        added=added,
    )


def pixels(path: Path) -> Tensor:
    """A guide as it is: 1 3 H W in 0..1."""
    return torch.from_numpy(np.array(Image.open(path))).float().permute(2, 0, 1)[None] / 255
