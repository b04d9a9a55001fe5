"""LoRAs for a tiny HunyuanVideo, made here and in diffusers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from tests.hunyuan_model.making import in_diffusers, run_there, tiny_inputs, tiny_model
from tests.networks.making import add_lora, randomize, saved_by_diffusers
from tests.tiny.loras import make_lora

NEAR = 5e-6  # of the largest value; float32, summed in another order
IN_DIFFUSERS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],  # what diffusers' own training scripts take
    "some": ["to_v", "add_q_proj", "proj_mlp", "net.0.proj"],
    "all": r".*\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|"
    r"net\.0\.proj|net\.2|proj_mlp|proj_out|linear_1|linear)",
    "last": r"norm_out\.linear|proj_out|time_text_embed.timestep_embedder.linear_2",
}


def saved(
    path: Path, kind: str = "t2v", dtype: torch.dtype = torch.float32, alpha: float = 3.0, **arguments: Any
) -> OwnNetwork:
    """A LoRA with random up factors, not attached."""
    network = make_lora("lora_hunyuan", 4, alpha, tiny_model(kind), **arguments)
    randomize(network)
    save_network(network, path, dtype, {"ss_base_model_version": "hunyuan_video"})
    return network


@torch.no_grad()
def run_here(kind: str, path: Path, multiplier: float = 1.0) -> Tensor:
    """What the model with a LoRA file added gives."""
    return add_lora(tiny_model(kind), path, multiplier)(**tiny_inputs(kind))


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= NEAR * expected.abs().max()


def made_there(
    folder: Path, kind: str, targets: Any, alpha: int = 4, with_settings: bool = True
) -> tuple[Path, Tensor]:
    """A LoRA that diffusers saves, and what its model gives with it."""
    theirs = in_diffusers(kind)
    path = saved_by_diffusers(theirs, folder / "theirs.safetensors", targets, alpha, with_settings)
    return path, run_there(theirs, tiny_inputs(kind))
