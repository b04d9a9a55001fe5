"""A tiny Z-Image, its inputs, and diffusers' network with the same weights."""

from collections.abc import Mapping

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from tests.tiny.z_image import CONFIG, tiny_state
from z_image.configs import ZImageConfig
from z_image.model import ZImageModel


def in_diffusers(state: Mapping[str, Tensor], config: ZImageConfig = CONFIG) -> ZImageTransformer2DModel:
    """diffusers' network with these weights."""
    dit = ZImageTransformer2DModel(
        in_channels=config.in_dim,
        dim=config.dim,
        n_layers=config.num_layers,
        n_refiner_layers=config.noise_refiner_layers,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
        cap_feat_dim=config.text_dim,
        axes_dims=list(config.rotary_widths),
        axes_lens=[1024, 512, 512],
    )
    dit.load_state_dict(dict(state))
    return dit.eval()


def tiny_model(seed: int = 0) -> ZImageModel:
    """Our network with the weights of `tiny_state`."""
    model = ZImageModel(CONFIG)
    model.load_state_dict(tiny_state(seed))
    return model.eval()


def tiny_inputs(batch: int = 2, rows: int = 5, columns: int = 7, text: int = 40) -> dict[str, Tensor]:
    """Inputs of our network; each text is 20 tokens shorter than the one before it."""
    generator = torch.Generator().manual_seed(7)
    lengths = text - 20 * torch.arange(batch)
    return {
        "noisy": torch.randn(batch, CONFIG.in_dim, 2 * rows, 2 * columns, generator=generator),
        "times": torch.linspace(0.1, 0.9, batch),
        "caption": torch.randn(batch, text, CONFIG.text_dim, generator=generator),
        "caption_mask": torch.arange(text) < lengths[:, None],
    }


def predict_with(dit: ZImageTransformer2DModel, given: Mapping[str, Tensor]) -> Tensor:
    """What diffusers' network makes of the inputs of ours, B C H W: each sample by itself."""
    found = []
    for noisy, time, caption, mask in zip(
        *(given[name] for name in ("noisy", "times", "caption", "caption_mask")), strict=True
    ):
        (out,) = dit([noisy.unsqueeze(1)], time[None], [caption[mask]], return_dict=False)[0]
        found.append(out.squeeze(1))
    return torch.stack(found)
