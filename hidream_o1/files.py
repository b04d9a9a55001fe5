"""Files of HiDream-O1-Image: one network that is the transformer and reads its texts itself.

Released folders have names that begin with `model.`, single files for ComfyUI have them with or without it.
Full and Dev have equal tensors: only names distinguish them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from checkpoints.dialects import DitShapes, make_wrong_kind_error, rename_sources
from checkpoints.dits import DitFormat, DitHeader
from checkpoints.encoders import read_network_config
from checkpoints.opening import Checkpoint, list_tensor_sources
from encoders.files import TransformerFiles
from encoders.vision_towers import DEEP_LAYERS, HEADS
from hidream_o1.configs import HiDreamO1Config, HiDreamO1VisionConfig
from hidream_o1.model import HiDreamO1Model
from hidream_o1.options import NAME
from hidream_o1.pixels import Pixels
from hidream_o1.references import SHOWN_STEP
from hidream_o1.texts import SOURCE, HiDreamO1Tokenizer
from hidream_o1.vision import count_side
from modules.errors import CheckpointError
from protocols.family import TextEncoder
from protocols.loading import TensorSource

MODEL_LABEL = f"a {NAME} network"
DIT_OPTION = "--dit"
RELEASED_FILES = (
    "hidream_o1_image_bf16.safetensors or hidream_o1_image_dev_bf16.safetensors of Comfy-Org, or the folder "
    "of HiDream-ai/HiDream-O1-Image or HiDream-ai/HiDream-O1-Image-Dev"
)
PREFIX = "model."  # of names in released folders
IDENTIFYING_TENSOR = "x_embedder.proj1.weight"
BLOCK = "language_model.layers.0."
TOWER = "visual."


def _read_header(checkpoint: Checkpoint) -> DitHeader[HiDreamO1Config]:
    """Return the dimensions, tensor naming and dtype of a HiDream-O1-Image file."""
    file_shapes = {name.removeprefix(PREFIX): info.shape for name, info in checkpoint.tensors.items()}
    if IDENTIFYING_TENSOR not in file_shapes:
        raise make_wrong_kind_error(checkpoint, MODEL_LABEL, DIT_OPTION, RELEASED_FILES)
    config = _read_config(DitShapes(checkpoint.path, file_shapes, NAME))
    query = f"{BLOCK}self_attn.q_proj.weight"
    dialect = "bare" if query in checkpoint.tensors else "released"
    name = query if dialect == "bare" else PREFIX + query
    return DitHeader(config, dialect, checkpoint.tensors[name].dtype)


def _read_config(shapes: DitShapes) -> HiDreamO1Config:
    """Return the dimensions of a network. Raises CheckpointError if they do not match each other."""
    vocabulary, dim = shapes.get_shape("language_model.embed_tokens.weight")
    (head_width,) = shapes.get_shape(f"{BLOCK}self_attn.q_norm.weight", axes=1)
    width = shapes.get_shape(f"{BLOCK}self_attn.q_proj.weight")[0]
    kv_width = shapes.get_shape(f"{BLOCK}self_attn.k_proj.weight")[0]
    ffn_dim = shapes.get_shape(f"{BLOCK}mlp.gate_proj.weight")[0]
    bottleneck, patch_values = shapes.get_shape(IDENTIFYING_TENSOR)
    patch_size = math.isqrt(patch_values // 3)
    fits = (
        head_width % 32 == 0  # rows and columns have five of 16 frequencies each
        and width % kv_width == 0
        and kv_width % head_width == 0
        and patch_values == 3 * patch_size**2
        and shapes.get_shape(f"{BLOCK}self_attn.o_proj.weight") == (dim, width)
        and shapes.get_shape(f"{BLOCK}mlp.down_proj.weight") == (dim, ffn_dim)
        and shapes.get_shape("x_embedder.proj2.weight") == (dim, bottleneck)
        and shapes.get_shape("final_layer2.linear.weight") == (patch_values, dim)
        and shapes.get_shape("t_embedder1.mlp.2.weight") == (dim, dim)
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: width {dim}, heads of {head_width} and patches of {patch_values} values do not "
            f"fit {MODEL_LABEL}. Copy the file again.",
            shapes.path,
        )
    return HiDreamO1Config(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=width // head_width,
        num_kv_heads=kv_width // head_width,
        head_width=head_width,
        num_layers=shapes.count_blocks("language_model.layers"),
        vocabulary=vocabulary,
        bottleneck=bottleneck,
        patch_size=patch_size,
        freq_dim=shapes.get_shape("t_embedder1.mlp.0.weight")[1],
        vision=_read_vision(shapes, dim),
    )


def _read_vision(shapes: DitShapes, decoder_dim: int) -> HiDreamO1VisionConfig | None:
    """Return the dimensions of the vision tower; None without one.

    The folder's config.json says which layers have features of their own (DeepStack); they are left out if
    the file has no weights for them, as single files for ComfyUI.

    Raises:
        CheckpointError: If tensors do not match each other or config.json.
    """
    if f"{TOWER}patch_embed.proj.weight" not in shapes.shapes:
        return None
    dim, _, frames, patch_size, patch_width = shapes.get_shape(f"{TOWER}patch_embed.proj.weight", axes=5)
    merged_dim = shapes.get_shape(f"{TOWER}merger.linear_fc1.weight")[1]
    out_dim = shapes.get_shape(f"{TOWER}merger.linear_fc2.weight")[0]
    num_layers = shapes.count_blocks(f"{TOWER}blocks")
    settings = read_network_config(shapes.path, "vision_config", kind="qwen3_vl", dim=dim, defaults={})
    num_heads = settings.get("num_heads", HEADS)
    merge = math.isqrt(merged_dim // dim)
    position_side = count_side(shapes.get_shape(f"{TOWER}pos_embed.weight")[0])
    deep_layers = settings.get("deepstack_visual_indexes", DEEP_LAYERS.get(num_layers, []))
    mergers = f"{TOWER}deepstack_merger_list"
    if f"{mergers}.0.linear_fc1.weight" not in shapes.shapes:
        deep_layers = []
    fits = (
        isinstance(num_heads, int)
        and num_heads > 0
        and dim % (4 * num_heads) == 0  # rows and columns have a quarter of a head's channels each
        and merge**2 * dim == merged_dim
        and patch_size == patch_width
        and patch_size * merge == SHOWN_STEP
        and out_dim == decoder_dim
        and position_side is not None
        and isinstance(deep_layers, list)
        and all(layer in range(num_layers) for layer in deep_layers)
        and len(deep_layers) in (0, shapes.count_blocks(mergers))
    )
    if not fits:
        raise CheckpointError(
            f"{shapes.path}: its vision tower is not that of {NAME}, or its config.json is of another model. "
            f"Pass {RELEASED_FILES}.",
            shapes.path,
        )
    assert position_side is not None
    return HiDreamO1VisionConfig(
        dim=dim,
        ffn_dim=shapes.get_shape(f"{TOWER}blocks.0.mlp.linear_fc1.weight")[0],
        num_heads=num_heads,
        num_layers=num_layers,
        position_side=position_side,
        patch_size=patch_size,
        frames=frames,
        merge=merge,
        out_dim=out_dim,
        deep_layers=tuple(deep_layers),
    )


def _make_sources(checkpoint: Checkpoint, header: DitHeader[HiDreamO1Config]) -> Mapping[str, TensorSource]:
    sources = list_tensor_sources(checkpoint)
    if header.dialect == "bare":
        return sources
    return rename_sources(sources, lambda name: name.removeprefix(PREFIX))


FORMAT = DitFormat(
    _read_header,
    lambda _: MODEL_LABEL,
    network=HiDreamO1Model,
    sources=_make_sources,
    option=DIT_OPTION,
    # the head for words; the vision tower, if the run has no edits, or some of its mergers
    ignore=("lm_head.*", f"{TOWER}*", f"{PREFIX}{TOWER}*"),
)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load


@dataclass(frozen=True)
class HiDreamO1Files(TransformerFiles):
    """Model files of a run: the network and its tokenizer. There is no VAE."""

    tokenizer: Path | None = None  # None: next to the network's file
    takes_references: bool = False  # whether texts may have references
    needs_tower: bool = False  # whether the run has references for certain

    format: ClassVar = FORMAT

    def add_tokenizer(self, tokenizer: Path | None) -> Self:
        """Return a copy with the tokenizer's file or folder."""
        return replace(self, tokenizer=tokenizer)

    def find_tokenizer(self) -> Path | None:
        """Return the tokenizer's file; None if it is not on this machine or no network is given."""
        if self.tokenizer is not None or self.dit is None or not self.dit.exists():
            return self.tokenizer
        return SOURCE.files.find(None, self.dit)

    def load_vae(self, device: torch.device) -> Pixels:
        """Return what stands in place of a VAE."""
        return Pixels(device)

    def vae_identity(self) -> Mapping[str, str]:
        """Return fields of cache records: cached pixels depend on nothing else."""
        return {"vae": "pixels"}

    def check_vae(self) -> None:
        """Do nothing, because there is no file."""

    def text_encoders(self) -> list[TextEncoder]:
        """Return the tokenizer; the network embeds its tokens."""
        return [HiDreamO1Tokenizer(self.dit_path, self.tokenizer, takes_references=self.takes_references)]

    def check_tower(self) -> None:
        """Raise CheckpointError if the network's file has no vision tower."""
        if self.dit_header().config.vision is None:
            raise CheckpointError(
                f"{self.dit_path} has no vision tower ({TOWER}*), which references (--task i2i) need. Pass "
                f"{RELEASED_FILES}.",
                self.dit_path,
            )

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check the vision tower of edits, and the tokenizer's file if it is given."""
        if config is not None and self.needs_tower:
            self.check_tower()
        if self.tokenizer is not None:
            SOURCE.files.check_option_value(self.tokenizer)
