"""A tiny random SigLIP image tower in every file layout.

Its geometry is the real one: 384 pixels, patches of 14, heads of 72.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from frame_pack.image_checkpoints import SiglipConfig
from frame_pack.image_encoder import SiglipVision
from tests.tiny.hunyuan_encoders import prefixed
from tests.tiny.wan_encoders import random_tensors

SIGLIP_DIM = 144  # width of the image features


def siglip_config(heads: int = 2, image_size: int = 384, patch_size: int = 14) -> SiglipConfig:
    return SiglipConfig(SIGLIP_DIM, 200, heads, num_layers=2, image_size=image_size, patch_size=patch_size)


def siglip_tensors(
    seed: int = 5, dtype: torch.dtype = torch.float32, config: SiglipConfig | None = None
) -> dict[str, Tensor]:
    """An image tower with the names of the bare module, without its pooling."""
    with torch.device("meta"):
        network = SiglipVision(config or siglip_config())
    return {name: tensor.to(dtype) for name, tensor in random_tensors(network, seed).items()}


def siglip_layouts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The image tower as the published files name it."""
    one = torch.ones(2)
    head = {
        "head.probe": torch.ones(1, 1, SIGLIP_DIM),
        "head.attention.in_proj_weight": one,
        "head.mlp.fc1.weight": one,
    }
    plain = prefixed({**tensors, **head}, "vision_model.")
    return {
        "vision": plain,
        "without prefix": {**tensors, **head},  # as transformers 5 save it
        "without pooling": prefixed(tensors, "vision_model."),
        "old": {**plain, "vision_model.embeddings.position_ids": torch.arange(729)[None]},
        "both towers": {
            **plain,
            "text_model.embeddings.token_embedding.weight": one,
            "text_model.encoder.layers.0.self_attn.q_proj.weight": one,
            "logit_scale": torch.tensor(2.0),
            "logit_bias": torch.tensor(-2.0),
        },
    }
