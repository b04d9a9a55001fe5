"""Tiny HunyuanVideo transformers, here and in diffusers, and what their forward takes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_model.checkpoints import load_dit
from hunyuan_model.model import HunyuanVideoModel
from tests.golden_cases import load_model, read_case
from tests.tiny.hunyuan_dit import CONFIGS, tiny_state

TEXT_ROWS = 12


def golden_model(case: str) -> tuple[HunyuanVideoModel, dict[str, Tensor], dict[str, Any]]:
    """The model of a golden case, the inputs of its forward pass, and what is stored beside them."""
    description, tensors = read_case(case)
    names = {
        "noisy": "x",
        "timesteps": "t",
        "llama": "text_states",
        "llama_mask": "text_mask",
        "clip_l": "text_states_2",
        "guidance": "guidance",
    }
    inputs = {ours: tensors[theirs] for ours, theirs in names.items()}
    return load_model(case, load_dit), inputs, tensors | {"tolerance": description["tolerance"]}


def tiny_model(kind: str, **sizes: int) -> HunyuanVideoModel:
    model = HunyuanVideoModel(replace(CONFIGS[kind], **sizes))  # type: ignore[arg-type]
    model.load_state_dict(tiny_state(kind, **sizes))
    return model.eval().requires_grad_(False)


def tiny_inputs(kind: str, lengths: tuple[int, ...] = (5, 11), frames: int = 3) -> dict[str, Any]:
    """lengths: real tokens of each sample's text; what stands in the padding is large, so that a look at it
    shows.
    """
    config, generator, batch = CONFIGS[kind], torch.Generator().manual_seed(7), len(lengths)
    mask = (torch.arange(TEXT_ROWS) < torch.tensor(lengths)[:, None]).long()
    text = torch.randn(batch, TEXT_ROWS, config.text_dim, generator=generator)
    return {
        "noisy": torch.randn(batch, config.in_dim, frames, 4, 6, generator=generator),
        "timesteps": torch.linspace(900.0, 100.0, batch),
        "llama": torch.where(mask[:, :, None] == 1, text, 30 * text),
        "llama_mask": mask,
        "clip_l": torch.randn(batch, config.pooled_dim, generator=generator),
        "guidance": torch.linspace(1000.0, 6000.0, batch),
    }


def in_diffusers(kind: str) -> nn.Module:
    """The same network there."""
    from tests.parity import hunyuan  # checks on a GPU need no diffusers

    return hunyuan.in_diffusers(tiny_state(kind))


@torch.no_grad()
def run_there(theirs: nn.Module, inputs: dict[str, Any]) -> Tensor:
    names = ("noisy", "timesteps", "llama", "llama_mask", "clip_l", "guidance")
    return theirs(*(inputs[name] for name in names), return_dict=False)[0]
