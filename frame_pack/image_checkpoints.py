"""Checkpoint files of FramePack's image encoder, a SigLIP image tower: recognise them, read their dimensions.

Our modules have Hugging Face's names.
"""

import math
from dataclasses import dataclass

from modules.checkpoints.dialects import LoadPlan, count, other_kind, shapes_of
from modules.checkpoints.encoders import ALL_IN_ONE, head_width, network_in, told_beside
from modules.checkpoints.opening import Checkpoint, plain_sources
from modules.errors import CheckpointError

OPTION = "--image_encoder"
FILES = (
    "the folder image_encoder of flux_redux_bfl, its model.safetensors or "
    "sigclip_vision_patch14_384.safetensors"
)
HEAD_WIDTH = 72  # of so400m; cannot be read from the tensors
IMAGE_SIZE = 384  # as FramePack was trained: the tensors only show the number of whole patches
# values that a config.json leaves out: transformers do not write what equals their default
DEFAULTS = {"hidden_size": 768, "num_attention_heads": 12, "layer_norm_eps": 1e-6, "image_size": 224}
_BESIDE = ("text_model.", "logit_scale", "logit_bias")  # the other tower
# the pooling after the last hidden state; a tensor that old versions of transformers saved
_UNUSED = ("head.*", "embeddings.position_ids")


@dataclass(frozen=True)
class SiglipConfig:
    """Dimensions of a SigLIP image tower."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    # height and width that images are resized to; pixels after the last whole patch are not seen
    image_size: int
    patch_size: int
    activation: str = "gelu_pytorch_tanh"
    eps: float = 1e-6

    @property
    def num_tokens(self) -> int:
        """Number of whole patches in an image."""
        return (self.image_size // self.patch_size) ** 2


def read_siglip(checkpoint: Checkpoint) -> LoadPlan[SiglipConfig]:
    """Plan how to load the image tower: alone or with the text tower, with any prefix, in 16 or 8 bits.

    Raises CheckpointError for any other file. A CLIP is recognised by its patches, which have no bias.
    """
    own = network_in(
        checkpoint, "embeddings.patch_embedding.bias", "encoder.layers.0.self_attn.q_proj.weight", _BESIDE
    )
    if own is None:
        raise other_kind(checkpoint, "a SigLIP image encoder", OPTION, FILES)
    sources = plain_sources(own)
    shape = shapes_of(own, sources)
    patches = shape("embeddings.patch_embedding.weight")
    if len(patches) != 4 or patches[1] != 3 or patches[2] != patches[3]:
        raise CheckpointError(
            f"{checkpoint.path}: the patch embedding has shape {list(patches)}, but a SigLIP for images of "
            "one size has "
            f"[width, 3, side, side]. Give {FILES} to {OPTION}.",
            checkpoint.path,
        )
    dim, patch = patches[0], patches[2]
    told = told_beside(checkpoint.path, "vision_config", "siglip", dim, DEFAULTS)
    config = SiglipConfig(
        dim=dim,
        ffn_dim=shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=dim // head_width(checkpoint.path, dim, told, HEAD_WIDTH),
        num_layers=count(sources, r"encoder\.layers\.\d+"),
        image_size=_image_size(
            shape("embeddings.position_embedding.weight")[0], patch, told.get("image_size")
        ),
        patch_size=patch,
        activation=str(told.get("hidden_act", SiglipConfig.activation)),
        eps=float(told.get("layer_norm_eps", SiglipConfig.eps)),
    )
    return LoadPlan(config, own, sources, (*_UNUSED, *(f"{start}*" for start in (*_BESIDE, *ALL_IN_ONE))))


def _image_size(positions: int, patch: int, told: object) -> int:
    """Return the side that gives `positions` patches: config.json's, else FramePack's, else the smallest."""
    side = math.isqrt(positions)
    return next(
        (size for size in (told, IMAGE_SIZE) if isinstance(size, int) and size // patch == side), side * patch
    )
