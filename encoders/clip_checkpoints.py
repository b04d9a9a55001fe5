"""Checkpoint files of CLIP's text and image towers: recognize them, read dimensions.

The text tower is published under several prefixes, alone or next to the image tower. Its prefix is therefore
found from the name of the token embeddings, and tensors of other networks are left out by name. Our modules
have Hugging Face's names without the prefix `text_model.`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints.dialects import LoadPlan, count, make_shape_reader, make_wrong_kind_error, rename_sources
from checkpoints.encoders import find_network, head_width, read_network_config
from checkpoints.opening import Checkpoint, list_tensor_sources
from checkpoints.tokenizers import TokenizerFiles
from modules.errors import CheckpointError
from protocols.loading import TensorSource

CLIP_HEAD_WIDTH = 64  # channels of a head in CLIP-L; cannot be read from the tensors
CLIP_TOKENS = 77
# statistics of CLIP's training images, RGB in 0..1: Radford et al. 2021, arXiv 2103.00020
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# values of keys that a config.json leaves out, because they are the defaults of transformers
CLIP_DEFAULTS = {"hidden_size": 512, "num_attention_heads": 8, "layer_norm_eps": 1e-5}

# beginnings of the names of tensors in other parts of the model
_OTHER_TENSORS = ("vision_model.", "visual_projection.", "text_projection", "logit_scale")
_COMPUTED = ("embeddings.position_ids",)  # saved by old versions of transformers; computed here


def clip_tokenizer_files(option: str, folders: tuple[str, ...]) -> TokenizerFiles:
    """Return where to look for CLIP's tokenizer.

    `option` is the tokenizer's option; `folders` are the subfolders of a release that may contain it.
    """
    return TokenizerFiles(
        option=option,
        names=("tokenizer.json", "vocab.json"),
        folder="",
        repository="openai/clip-vit-large-patch14",
        folders=folders,
        unique_token=CLIP_START,
        ambiguous_folders=(".", "tokenizer"),
    )


@dataclass(frozen=True)
class ClipNaming:
    """A model family's names for its CLIP-L in options, caches and conditions; defaults are FLUX's."""

    name: str = "clip_l"  # in cache records
    pooled_key: str = "l_pooled"  # key of the pooled state
    mask_key: str | None = None  # key of the mask of real tokens; None: it is not returned
    description: str = "CLIP-L"  # in the log
    option: str = "--clip_l"
    release: str = "clip_l.safetensors, the folder text_encoder of FLUX.1 or clip-vit-large-patch14"
    folder: str = "text_encoder"  # subfolder in a full release
    tokenizer: TokenizerFiles = clip_tokenizer_files(
        "--clip_l_tokenizer",
        (".", "clip_l", "tokenizer", "../tokenizer", "openai_clip-vit-large-patch14"),
    )

    @property
    def keys(self) -> frozenset[str]:
        """Names of the conditions that the encoder returns."""
        return frozenset({self.pooled_key} if self.mask_key is None else {self.pooled_key, self.mask_key})

    def read_width(self, checkpoint: Checkpoint) -> int:
        """Return the number of channels of the pooled state, from the header of a file."""
        return read_clip_text(checkpoint, self).config.dim


@dataclass(frozen=True)
class ClipTextConfig:
    """Dimensions of a CLIP text tower."""

    vocabulary: int
    positions: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    projection_dim: int = 0  # width of the projected pooled state; 0: it is not projected


def read_clip_text(
    checkpoint: Checkpoint, naming: ClipNaming, config_json: Mapping[str, Any] | None = None
) -> LoadPlan[ClipTextConfig]:
    """Plan how to load the text tower of a CLIP-L.

    The file may also contain the image tower, have any known prefix, and be in fp8.

    Args:
        checkpoint: The opened file.
        naming: The family's names for the encoder in options, caches and conditions.
        config_json: The network's settings; None reads them from a config.json next to the file.

    Raises:
        CheckpointError: If the file contains another model.
    """
    network = find_network(
        checkpoint,
        "embeddings.token_embedding.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        _OTHER_TENSORS,
    )
    if network is None:
        raise make_wrong_kind_error(checkpoint, "a CLIP text encoder", naming.option, naming.release)
    sources = list_tensor_sources(network)
    if config_json is None:
        width = make_shape_reader(network, sources)("embeddings.token_embedding.weight")[-1]
        config_json = read_network_config(
            checkpoint.path, "text_config", kind="clip", dim=width, defaults=CLIP_DEFAULTS
        )
    return plan_clip_text(network, sources, config_json, naming)


def plan_clip_text(
    network: Checkpoint,
    sources: Mapping[str, TensorSource],
    config_json: Mapping[str, Any],
    naming: ClipNaming,
) -> LoadPlan[ClipTextConfig]:
    """Plan how to load a text tower whose tensors have been located.

    Args:
        network: The file with prefixes removed.
        sources: How to build each tensor, by its name in the network.
        config_json: The network's settings; may be empty.
        naming: The family's names for the encoder in options, caches and conditions.

    Raises:
        CheckpointError: If a tensor that gives a dimension is missing or the tower takes too few tokens.
    """
    shape = make_shape_reader(
        network, sources, make_wrong_kind_error(network, "a CLIP text encoder", naming.option, naming.release)
    )
    vocabulary, dim = shape("embeddings.token_embedding.weight", 2)
    positions = shape("embeddings.position_embedding.weight", 2)[0]
    if positions < CLIP_TOKENS:
        raise CheckpointError(
            f"{network.path} takes {positions} tokens, but {CLIP_TOKENS} are needed. Pass {naming.release} "
            f"to {naming.option}.",
            network.path,
        )
    names = ("num_attention_heads", "layer_norm_eps")
    for name in names:
        if not isinstance(config_json.get(name, 1), int | float):
            raise CheckpointError(
                f"{network.path}: {name} is {config_json[name]!r} in the config.json next to it, which must "
                "be a number. Replace it by the config.json that belongs to the file.",
                network.path,
            )
    config = ClipTextConfig(
        vocabulary=vocabulary,
        positions=positions,
        dim=dim,
        ffn_dim=shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
        num_heads=dim // head_width(network.path, dim, config_json, CLIP_HEAD_WIDTH),
        num_layers=count(sources, r"encoder\.layers\.\d+"),
        activation=str(config_json.get("hidden_act", ClipTextConfig.activation)),
        eps=float(config_json.get("layer_norm_eps", ClipTextConfig.eps)),
    )
    other_tensors = [f"{start}*" for start in _OTHER_TENSORS]
    return LoadPlan(config, network, sources, (*_COMPUTED, *other_tensors))


VISION_HEAD_WIDTH = 104  # channels of a head in OpenCLIP's bigG; cannot be read from the tensors
# values of keys that a config.json leaves out, because they are the defaults of transformers
VISION_DEFAULTS = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TOWER = "vision_model."
_UNUSED = ("text_model.*", "text_projection.*", "logit_scale", "embeddings.position_ids")


@dataclass(frozen=True)
class ClipVisionConfig:
    """Dimensions of a CLIP image tower; defaults are OpenCLIP's."""

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
    """Plan how to load a CLIP image tower with its projection; the file may also contain the text tower.

    1. Check that the file has an image tower.
    2. Infer patch size and image size from the shapes of the patch embedding and the positions.
    3. Read what shapes do not show, such as the activation, from a config.json next to the file.

    Args:
        checkpoint: The opened file.
        option: Option that names the file, for messages.
        release: Description of the released files, for messages.

    Raises:
        CheckpointError: If the file contains another model.
    """
    sources = rename_sources(list_tensor_sources(checkpoint), lambda name: name.removeprefix(_TOWER))
    required = {"embeddings.class_embedding", "visual_projection.weight", "pre_layrnorm.weight"}
    if not required <= sources.keys():
        raise make_wrong_kind_error(checkpoint, "a CLIP image encoder with its projection", option, release)
    shape = make_shape_reader(checkpoint, sources)
    patch_weight = shape("embeddings.patch_embedding.weight")
    num_positions = shape("embeddings.position_embedding.weight")[0] - 1  # without the class token
    patches_per_side = math.isqrt(max(num_positions, 0))
    if (
        not (len(patch_weight) == 4 and patch_weight[1] == 3 and patch_weight[2] == patch_weight[3])
        or patches_per_side**2 != num_positions
    ):
        raise CheckpointError(
            f"{checkpoint.path}: its patches ({list(patch_weight)}) and {num_positions} positions are not "
            f"those of a CLIP image encoder. Pass {release}.",
            checkpoint.path,
        )
    dim, _, patch_size, _ = patch_weight
    config_json = read_network_config(
        checkpoint.path, "vision_config", kind="clip", dim=dim, defaults=VISION_DEFAULTS
    )
    config = ClipVisionConfig(
        dim=dim,
        ffn_dim=shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=dim // head_width(checkpoint.path, dim, config_json, VISION_HEAD_WIDTH),
        num_layers=count(sources, r"encoder\.layers\.\d+"),
        image_size=patches_per_side * patch_size,
        patch_size=patch_size,
        projection_dim=shape("visual_projection.weight")[0],
        activation=str(config_json.get("hidden_act", ClipVisionConfig.activation)),
        eps=float(config_json.get("layer_norm_eps", ClipVisionConfig.eps)),
    )
    return LoadPlan(config, checkpoint, sources, _UNUSED)
