"""Checkpoint files of CLIP's image towers with their projection: recognise them, read their dimensions.

Our modules have Hugging Face's names, without `vision_model.` in front.
"""

import math
from dataclasses import dataclass

from modules.checkpoints.dialects import LoadPlan, count, other_kind, rename_sources, shapes_of
from modules.checkpoints.encoders import head_width, told_beside
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.errors import CheckpointError

HEAD_WIDTH = 104  # of OpenCLIP's bigG; cannot be read from the tensors
# values that a config.json leaves out: transformers do not write what equals their default
DEFAULTS = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TOWER = "vision_model."
_UNUSED = ("text_model.*", "text_projection.*", "logit_scale", "embeddings.position_ids")


@dataclass(frozen=True)
class ClipVisionConfig:
    """Dimensions of a CLIP image tower. The defaults are OpenCLIP's."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_size: int
    patch_size: int
    projection_dim: int
    activation: str = "gelu"
    eps: float = 1e-5


def read_clip_vision(checkpoint: Checkpoint, option: str, release: str) -> LoadPlan[ClipVisionConfig]:
    """Plan how to load an image tower with its projection: alone or with the text tower.

    option, release: for messages: the option that needs it, and the files that have it. Raises
    CheckpointError for any other file.
    """
    sources = rename_sources(plain_sources(checkpoint), lambda name: name.removeprefix(_TOWER))
    if (
        not {"embeddings.class_embedding", "visual_projection.weight", "pre_layrnorm.weight"}
        <= sources.keys()
    ):
        raise other_kind(checkpoint, "a CLIP image encoder with its projection", option, release)
    shape = shapes_of(checkpoint, sources)
    patches = shape("embeddings.patch_embedding.weight")
    positions = shape("embeddings.position_embedding.weight")[0] - 1
    side = math.isqrt(max(positions, 0))
    if len(patches) != 4 or patches[1] != 3 or patches[2] != patches[3] or side * side != positions:
        raise CheckpointError(
            f"{checkpoint.path}: its patches ({list(patches)}) and {positions} places are no CLIP image "
            f"encoder's. Give {release}.",
            checkpoint.path,
        )
    dim, patch = patches[0], patches[2]
    told = told_beside(checkpoint.path, "vision_config", "clip", dim, DEFAULTS)
    config = ClipVisionConfig(
        dim=dim,
        ffn_dim=shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=dim // head_width(checkpoint.path, dim, told, HEAD_WIDTH),
        num_layers=count(sources, r"encoder\.layers\.\d+"),
        image_size=side * patch,
        patch_size=patch,
        projection_dim=shape("visual_projection.weight")[0],
        activation=str(told.get("hidden_act", ClipVisionConfig.activation)),
        eps=float(told.get("layer_norm_eps", ClipVisionConfig.eps)),
    )
    return LoadPlan(config, checkpoint, sources, _UNUSED)
