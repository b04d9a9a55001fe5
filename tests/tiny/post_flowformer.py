"""A narrow FlowFormer with the names of the published file."""

from pathlib import Path

import torch
from torch import Tensor

from modules.checkpoints.writing import save_tensors
from post.interpolation.flowformer import FlowDecoderConfig, FlowFormer, FlowFormerConfig
from post.interpolation.flowformer_memory import MemoryConfig
from post.interpolation.twins import StageConfig
from tests.tiny.post_interpolation import draw

TRUNK = (StageConfig(patch=4, width=32, reduction=8), StageConfig(patch=2, width=64, reduction=4))
FLOWFORMER = FlowFormerConfig(
    features=TRUNK,
    context=TRUNK,
    matching=16,
    memory=MemoryConfig(tokens=3, width=16, context=64, context_part=8, costs=(2, 4, 8), layers=2),
    decoder=FlowDecoderConfig(
        memory=16,
        query=8,
        hidden=32,
        compared=8,
        correlation=(16, 12),
        flow=(8, 4),
        motion=16,
        head=8,
        mask=8,
    ),
)


def tiny_flowformer() -> FlowFormer:
    """Random weights that move pixels by a few places."""
    network = draw(FlowFormer(FLOWFORMER), 2)
    assert isinstance(network, FlowFormer)
    return network


def flowformer_tensors() -> dict[str, Tensor]:
    """The tensors of such a file, with those that no one uses."""
    tensors = dict(tiny_flowformer().state_dict())
    for trunk in ("memory_encoder.feat_encoder", "context_encoder"):
        tensors[f"{trunk}.svt.norm.weight"] = tensors[f"{trunk}.svt.norm.bias"] = torch.zeros(256)
    tensors["memory_decoder.att.pos_emb.rel_ind"] = torch.zeros(4, 4, dtype=torch.int64)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_flowformer(path: Path, prefix: str = "") -> Path:
    """A file of the layout of flowformer_sintel, .safetensors or .pth."""
    tensors = {prefix + name: tensor for name, tensor in flowformer_tensors().items()}
    if path.suffix == ".safetensors":
        save_tensors(path, tensors)
    else:
        torch.save(tensors, path)
    return path
