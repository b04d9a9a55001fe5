"""Tiny FLUX.1 and Chroma transformers, here and in diffusers, and what their forward takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flux.model import FluxModel, pack, unpack
from tests.tiny.dit_files import frozen
from tests.tiny.flux import CLIP_DIM, CONFIGS, T5_DIM, diffusers_state, tiny_state

TEXT_ROWS = 9


def tiny_model(kind: str) -> FluxModel:
    return frozen(FluxModel(CONFIGS[kind]), tiny_state(kind))


def in_diffusers(kind: str, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The same weights in diffusers' class. state: published names; None: those of `tiny_model`."""
    from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel  # checks on a GPU need none

    config, state = CONFIGS[kind], state or tiny_state(kind)
    width = config.dim // config.num_heads
    side = 7 * width // 16
    sizes: dict[str, Any] = {
        "in_channels": config.token_dim,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "attention_head_dim": width,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": state["txt_in.weight"].shape[1],
        "axes_dims_rope": (width - 2 * side, side, side),
    }
    model: nn.Module
    if config.approximator is not None:
        of = config.approximator
        model = ChromaTransformer2DModel(
            **sizes,
            approximator_num_channels=of.in_dim,
            approximator_hidden_dim=of.dim,
            approximator_layers=of.layers,
        )
        for norm in model.distilled_guidance_layer.norms:
            norm.eps = config.eps  # of the released code; diffusers leaves it to torch
    else:
        model = FluxTransformer2DModel(
            **sizes,
            pooled_projection_dim=state["vector_in.in_layer.weight"].shape[1],
            guidance_embeds=config.has_guidance,
        )
    return frozen(model, diffusers_state(state))


def tiny_inputs(kind: str, lengths: tuple[int, ...] = (5, 3)) -> dict[str, Any]:
    """lengths: real tokens of each text; what stands in the padding is large, so that a look shows."""
    config, generator, batch = CONFIGS[kind], torch.Generator().manual_seed(7), len(lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    t5 = draw(batch, TEXT_ROWS, config.text_dim)
    mask = torch.zeros(batch, TEXT_ROWS, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        t5[row, length + 1 :] = 50.0
    return {
        "noisy": draw(batch, config.channels, 1, 6, 8),
        "timesteps": torch.tensor([730.0, 210.0, 500.0][:batch]),
        "t5": t5,
        "t5_mask": mask,
        "pooled": None if kind == "chroma" else draw(batch, config.pooled_dim),
        "guidance": torch.tensor([3.5, 1.0, 2.0][:batch]) if kind == "dev" else None,
    }


def places_of(latents: Tensor, first: int) -> Tensor:
    """The places of a picture's tokens, L 3: `first`, row, column."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    places = torch.full((rows, columns, 3), float(first))
    places[..., 1] = torch.arange(rows)[:, None]
    places[..., 2] = torch.arange(columns)
    return places.flatten(0, 1)


def run_there(
    model: nn.Module,
    inputs: dict[str, Any],
    sample: int,
    references: Sequence[Tensor] = (),
    control_net: Any = None,
    learns: bool = False,
) -> Tensor:
    """What diffusers' class returns for one sample, cut to the tokens of its text that count, B Z 1 H W.

    references: of all samples, behind the picture, at 1, 2, ... of the first axis; what a ControlNet sees if
    there is one. learns: the ControlNet, with gradients.
    """
    controls, references = (references, ()) if control_net is not None else ((), references)
    one = {name: None if value is None else value[sample : sample + 1] for name, value in inputs.items()}
    noisy, mask = one["noisy"], one["t5_mask"]
    images = [noisy, *(each[sample : sample + 1] for each in references)]
    rows, columns = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    is_chroma = type(model).__name__ == "ChromaTransformer2DModel"
    rows_there = one["t5"].shape[1]
    count = rows_there if mask is None else min(int(mask.sum()) + is_chroma, rows_there)
    more = {} if is_chroma else {"pooled_projections": one["pooled"], "guidance": one["guidance"]}
    given = {
        "hidden_states": torch.cat([pack(each) for each in images], dim=1),
        "encoder_hidden_states": one["t5"][:, :count],
        "timestep": one["timesteps"] / 1000,
        "img_ids": torch.cat([places_of(each, place) for place, each in enumerate(images)]),
        "txt_ids": torch.zeros(count, 3),
        **more,
    }
    if control_net is not None:
        with torch.set_grad_enabled(learns):
            made = control_net(**given, controlnet_cond=pack(controls[0][sample : sample + 1]))
        given |= {name: getattr(made, name) for name in made}
    found = model(**given).sample
    return unpack(found[:, : rows * columns], rows, columns)


def tiny_control_net() -> Any:
    """A ControlNet of diffusers for the tiny FLUX.1 dev, with other weights than zeros behind its blocks."""
    from diffusers import FluxControlNetModel

    config = CONFIGS["dev"]
    width = config.dim // config.num_heads
    side = 7 * width // 16
    torch.manual_seed(3)
    network = FluxControlNetModel(
        in_channels=config.token_dim,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=width,
        num_attention_heads=config.num_heads,
        joint_attention_dim=T5_DIM,
        pooled_projection_dim=CLIP_DIM,
        guidance_embeds=True,
        axes_dims_rope=[width - 2 * side, side, side],
    )
    for name, parameter in network.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.1)
    return network.eval().requires_grad_(False)
