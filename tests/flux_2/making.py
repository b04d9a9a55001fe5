"""Tiny FLUX.2 transformers, here and in diffusers, and what their forward takes."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor

from flux_2.model import Flux2Model
from tests.tiny.dit_files import frozen
from tests.tiny.flux_2 import CONFIG, CONFIGS, VAE, diffusers_state, tiny_state, vae_diffusers


def tiny_model(kind: str = "klein") -> Flux2Model:
    """Our network with the weights of `tiny_state`."""
    return frozen(Flux2Model(CONFIGS[kind]), tiny_state(kind))


def in_diffusers(state: Mapping[str, Tensor]) -> Flux2Transformer2DModel:
    """diffusers' network with these weights, of the size of CONFIG."""
    width = CONFIG.dim // CONFIG.num_heads
    model = Flux2Transformer2DModel(
        num_layers=CONFIG.double_blocks,
        num_single_layers=CONFIG.single_blocks,
        attention_head_dim=width,
        num_attention_heads=CONFIG.num_heads,
        joint_attention_dim=CONFIG.text_dim,
        axes_dims_rope=(width // 4,) * 4,
        guidance_embeds="guidance_in.in_layer.weight" in state,
    )
    return frozen(model, diffusers_state(state))


def autoencoder_in_diffusers(state: Mapping[str, Tensor]) -> AutoencoderKLFlux2:
    """diffusers' autoencoder with these weights, under released names."""
    return frozen(AutoencoderKLFlux2(block_out_channels=VAE.widths), vae_diffusers(state))


def tiny_inputs(kind: str = "klein", batch: int = 2, rows: int = 3, columns: int = 5) -> dict[str, Tensor]:
    """Inputs of our network."""
    generator = torch.Generator().manual_seed(7)
    given = {
        "noisy": torch.randn(batch, CONFIG.channels, 1, rows, columns, generator=generator),
        "timesteps": torch.linspace(900.0, 130.0, batch),
        "text": torch.randn(batch, 7, CONFIG.text_dim, generator=generator),
    }
    return {**given, "guidance": torch.linspace(4.0, 1.0, batch)} if kind == "dev" else given


def places_of(latents: Tensor, first: int) -> Tensor:
    """The places of a picture's tokens, L 4: `first`, row, column, 0."""
    rows, columns = latents.shape[-2:]
    return torch.cartesian_prod(
        torch.tensor([first]), torch.arange(rows), torch.arange(columns), torch.tensor([0])
    )


def predict_with(
    dit: Flux2Transformer2DModel, given: Mapping[str, Tensor], references: Sequence[Tensor] = ()
) -> Tensor:
    """The velocity B Z 1 H W that diffusers' network makes of the inputs of ours."""
    noisy, text = given["noisy"], given["text"]
    images = [noisy, *references]
    place = torch.zeros(text.shape[1], 4)
    place[:, 3] = torch.arange(text.shape[1])
    found = dit(
        hidden_states=torch.cat([one.flatten(2).transpose(1, 2) for one in images], dim=1),
        encoder_hidden_states=text,
        timestep=given["timesteps"] / 1000,
        img_ids=torch.cat([places_of(one, 10 * number) for number, one in enumerate(images)]),
        txt_ids=place,
        guidance=given.get("guidance"),
        return_dict=False,
    )[0]
    rows, columns = noisy.shape[-2:]
    made: Tensor = found[:, : rows * columns].transpose(1, 2).unflatten(2, (1, rows, columns))
    return made
