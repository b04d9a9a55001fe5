"""Tiny FramePack transformers, here and in diffusers, and what their forward takes."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import Tensor

from frame_pack.files import load_dit
from frame_pack.model import FramePackModel
from tests.golden_cases import load_model, read_case
from tests.parity import framepack
from tests.tiny.framepack_dit import CONFIG, tiny_state

TEXT_ROWS = 12
CLEAN = {"clean_latents": (2, "clean_latent_indices"), "clean_latents_2x": (3, "clean_latent_2x_indices")}
# three and six are not multiples of two and of four
CLEAN |= {"clean_latents_4x": (6, "clean_latent_4x_indices")}


def golden_model() -> tuple[FramePackModel, dict[str, Tensor], dict[str, Any]]:
    """The model of the golden case, the inputs of its forward pass, and what is stored beside them."""
    description, tensors = read_case("framepack_dit")
    names = {
        "noisy": "hidden_states",
        "timesteps": "timestep",
        "llama": "encoder_hidden_states",
        "llama_mask": "encoder_attention_mask",
        "clip_l": "pooled_projections",
        "guidance": "guidance",
        "image_embeddings": "image_embeddings",
        "latent_indices": "latent_indices",
    }
    names |= {name: name for latents, (_, indices) in CLEAN.items() for name in (latents, indices)}
    inputs = {ours: tensors[theirs] for ours, theirs in names.items()}
    tolerance = {"tolerance": description["tolerance"]}
    return load_model("framepack_dit", load_dit), inputs, tensors | tolerance


def tiny_model(**sizes: int) -> FramePackModel:
    model = FramePackModel(replace(CONFIG, **sizes))  # type: ignore[arg-type]
    model.load_state_dict(tiny_state(**sizes))
    return model.eval().requires_grad_(False)


def tiny_inputs(
    lengths: tuple[int, ...] = (5, 11), clean: tuple[str, ...] = tuple(CLEAN), size: tuple[int, int] = (6, 10)
) -> dict[str, Any]:
    """lengths: real tokens of each sample's text; what stands in the padding is large, so that a look at it
    shows.

    clean: which finished latents there are. size: rows and columns of latents; patches of 3 x 5 are no
    multiples of two or four.
    """
    generator, batch = torch.Generator().manual_seed(7), len(lengths)
    mask = (torch.arange(TEXT_ROWS) < torch.tensor(lengths)[:, None]).long()
    text = torch.randn(batch, TEXT_ROWS, CONFIG.text_dim, generator=generator)
    inputs = {
        "noisy": torch.randn(batch, CONFIG.in_dim, 3, *size, generator=generator),
        "timesteps": torch.linspace(900.0, 100.0, batch),
        "llama": torch.where(mask[:, :, None] == 1, text, 30 * text),
        "llama_mask": mask,
        "clip_l": torch.randn(batch, CONFIG.pooled_dim, generator=generator),
        "guidance": torch.linspace(10000.0, 6000.0, batch),
        "image_embeddings": torch.randn(batch, 7, CONFIG.image_dim, generator=generator),
        "latent_indices": torch.arange(10, 13).expand(batch, -1),
    }
    drawn = {
        name: torch.randn(batch, CONFIG.in_dim, frames, *size, generator=generator)
        for name, (frames, _) in CLEAN.items()
    }
    starts = {"clean_latents": 1, "clean_latents_2x": 20, "clean_latents_4x": 30}
    for name in clean:
        frames, indices = CLEAN[name]
        inputs |= {
            name: drawn[name],
            indices: torch.arange(starts[name], starts[name] + frames).expand(batch, -1),
        }
    return inputs


def in_diffusers() -> HunyuanVideoFramepackTransformer3DModel:
    """The same network there."""
    return framepack.in_diffusers(tiny_state())


def run_there(theirs: HunyuanVideoFramepackTransformer3DModel, inputs: dict[str, Any]) -> Tensor:
    """It takes indices of one sample, which count for all, and all three kinds of finished latents."""
    names = {
        "noisy": "hidden_states",
        "timesteps": "timestep",
        "llama": "encoder_hidden_states",
        "llama_mask": "encoder_attention_mask",
        "clip_l": "pooled_projections",
        "guidance": "guidance",
        "image_embeddings": "image_embeds",
        "latent_indices": "indices_latents",
        "clean_latents": "latents_clean",
        "clean_latent_indices": "indices_latents_clean",
        "clean_latents_2x": "latents_history_2x",
        "clean_latent_2x_indices": "indices_latents_history_2x",
        "clean_latents_4x": "latents_history_4x",
        "clean_latent_4x_indices": "indices_latents_history_4x",
    }
    given = {names[name]: value[0] if name.endswith("indices") else value for name, value in inputs.items()}
    return theirs(**given, return_dict=False)[0]
