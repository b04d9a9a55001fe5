"""A tiny HunyuanVideo 1.5, its inputs, and diffusers' networks with the same weights."""

from collections.abc import Mapping

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from torch import Tensor, nn

from hunyuan_model.model import rotary_widths
from hunyuan_video_15.model import HunyuanVideo15Model
from hunyuan_video_15.vae import HunyuanVideo15Vae, HunyuanVideo15VaeConfig
from tests.tiny.dit_files import frozen
from tests.tiny.hunyuan_video_15 import CONFIG, VAE, diffusers_state, diffusers_vae, tiny_state, vae_state

TEXTS, GLYPHS = (9, 5), (0, 4)  # real tokens of each sample
IMAGE_TOKENS = 7


def tiny_model(seed: int = 0) -> HunyuanVideo15Model:
    """Our network with the weights of `tiny_state`."""
    return frozen(HunyuanVideo15Model(CONFIG), tiny_state(seed))


def in_diffusers(state: Mapping[str, Tensor]) -> HunyuanVideo15Transformer3DModel:
    """diffusers' network with these weights, by their released names."""
    layers = len({name.split(".")[1] for name in state if name.startswith("double_blocks.")})
    with torch.device("meta"):
        dit = HunyuanVideo15Transformer3DModel(
            in_channels=CONFIG.in_dim,
            out_channels=CONFIG.out_dim,
            num_attention_heads=CONFIG.num_heads,
            attention_head_dim=CONFIG.dim // CONFIG.num_heads,
            num_layers=layers,
            num_refiner_layers=CONFIG.refiner_blocks,
            text_embed_dim=CONFIG.text_dim,
            text_embed_2_dim=CONFIG.glyph_dim,
            image_embed_dim=CONFIG.image_dim,
            rope_axes_dim=rotary_widths(CONFIG.dim // CONFIG.num_heads),
        )
        # the class has a fixed width here
        glyphs = dit.context_embedder_2
        first, then = CONFIG.glyph_hidden
        glyphs.linear_1 = nn.Linear(CONFIG.glyph_dim, first)
        glyphs.linear_2 = nn.Linear(first, then)
        glyphs.linear_3 = nn.Linear(then, CONFIG.dim)
    dit.load_state_dict(diffusers_state(state), assign=True)
    return dit.eval()


def tiny_inputs(
    batch: int = 2, frames: int = 3, rows: int = 4, columns: int = 6, has_image: bool = False
) -> dict[str, Tensor]:
    """Inputs of our network, with texts of unequal lengths; one of two samples quotes no text."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def mask(lengths: tuple[int, ...]) -> Tensor:
        return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    inputs = {
        "noisy": draw(2, CONFIG.out_dim, frames, rows, columns),
        "timesteps": torch.tensor([964.3, 121.7]),
        "text": draw(2, max(TEXTS), CONFIG.text_dim),
        "text_mask": mask(TEXTS),
        "glyphs": draw(2, max(GLYPHS), CONFIG.glyph_dim),
        "glyphs_mask": mask(GLYPHS),
    }
    if has_image:
        inputs["first_latents"] = draw(2, CONFIG.out_dim, 1, rows, columns)
        inputs["image"] = draw(2, IMAGE_TOKENS, CONFIG.image_dim)
    return {name: tensor[:batch] for name, tensor in inputs.items()}


def predict_with(dit: HunyuanVideo15Transformer3DModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """What diffusers' network makes of the inputs of ours, B Z F H W."""
    noisy = inputs["noisy"]
    condition, mask = torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])
    image = torch.zeros(len(noisy), IMAGE_TOKENS, CONFIG.image_dim)
    if "image" in inputs:
        condition[:, :, :1] = inputs["first_latents"]
        mask[:, :, 0] = 1
        image = inputs["image"]
    (velocity,) = dit(
        hidden_states=torch.cat([noisy, condition, mask], dim=1),
        timestep=inputs["timesteps"],
        encoder_hidden_states=inputs["text"],
        encoder_attention_mask=inputs["text_mask"],
        encoder_hidden_states_2=inputs["glyphs"],
        encoder_attention_mask_2=inputs["glyphs_mask"],
        image_embeds=image,
        return_dict=False,
    )
    return velocity


def tiny_vae(tile: int | None = None, config: HunyuanVideo15VaeConfig = VAE) -> HunyuanVideo15Vae:
    """Our VAE with the weights of `vae_state`."""
    vae = HunyuanVideo15Vae(config, tile)
    state = vae_state(config=config)
    return frozen(vae, {name: tensor.view_as(vae.state_dict()[name]) for name, tensor in state.items()})


def vae_in_diffusers(
    state: Mapping[str, Tensor], config: HunyuanVideo15VaeConfig = VAE
) -> AutoencoderKLHunyuanVideo15:
    """diffusers' VAE with these weights, by their released names."""
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=config.latent_channels, block_out_channels=config.widths
    )
    vae.load_state_dict(diffusers_vae(state))
    return vae.eval().requires_grad_(False)
