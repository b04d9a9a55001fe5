"""Pictures in the prompts of Qwen2.5-VL: its vision tower, what it is given, and where its tokens stand.

The tower is the class of transformers; its files are those of the language model beside it. Source: Bai et
al. 2025, arXiv 2502.13923, and the released configuration.
"""
# Letters: B prompts, L tokens, P patches of all pictures, K numbers of a patch, C width of the language model

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.language_models import LanguageModel
from modules.checkpoints.dialects import LoadPlan, count, load_planned, shapes_of
from modules.checkpoints.encoders import told_beside
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.errors import CheckpointError, MediaError
from modules.media.buckets import Size
from modules.media.reading import read_image, resize_cover

PATCHES = "patch_embed.proj.weight"
HEAD_WIDTH = 80  # as released; cannot be read from the tensors
WINDOW = 112  # pixels that layers attend within, likewise
FULL_EVERY = 8  # each eighth layer attends to the whole picture, likewise
MOST_TOLD = 1 << 16  # of these in a config.json
MOST_RATIO = 200  # of the sides of a picture, for the released image processor


def read_rgb(path: Path, size: Size | None = None) -> Tensor:
    """Read a picture in its own size, or covering `size`: H W 3 uint8. Raises MediaError if it cannot."""
    frame = read_image(path)
    return torch.from_numpy(frame if size is None else resize_cover(frame, size))


@dataclass(frozen=True)
class PictureUse:
    """How a family shows pictures to the encoder of its prompts."""

    text: str  # that stands for each in front of the prompt: {number} from 1, {tokens} of the picture
    token: str = "<|image_pad|>"
    # a picture as it is shown, of `Prompt.picture_size` if that is given: H W 3 uint8; MediaError
    read: Callable[[Path, Size | None], Tensor] = read_rgb
    shown: int | None = None  # the first pictures that are shown; None: all
    fewest: int = 3136  # pixels; smaller pictures are enlarged
    most: int = 12845056  # pixels; larger pictures are reduced

    def choose(self, paths: Sequence[Path]) -> Sequence[Path]:
        """Return the files that are shown."""
        return paths[: self.shown]

    def write(self, number: int, tokens: int) -> str:
        """Return the text of a picture, which stands for so many tokens."""
        return self.text.format(number=number, tokens=self.token * tokens)


@dataclass(frozen=True)
class ReadPictures:
    """The pictures of a prompt as the vision tower takes them."""

    patches: Tensor  # P K float32
    sides: tuple[tuple[int, int], ...] = ()  # rows and columns of tokens of each picture

    @property
    def counts(self) -> list[int]:
        """Return the number of tokens of each picture."""
        return [rows * columns for rows, columns in self.sides]


@dataclass(frozen=True)
class VisionConfig:
    """Dimensions of the vision tower."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    patch: int  # pixels
    frames: int  # of a patch
    merge: int  # patches that become a token, in each direction
    out_dim: int
    window: int
    full_layers: tuple[int, ...]  # that attend to the whole picture


def read_vision_tower(checkpoint: Checkpoint, model: LanguageModel) -> LoadPlan[VisionConfig]:
    """Plan how to load the vision tower of Qwen2.5-VL, which may stand under any prefix.

    Raises CheckpointError if the file has none, or one of another model.
    """
    path, mark = checkpoint.path, f"visual.{PATCHES}"
    prefix = next((name.removesuffix(PATCHES) for name in checkpoint.tensors if name.endswith(mark)), None)
    if prefix is None:
        raise CheckpointError(
            f"{path} has no vision tower, which prompts with pictures need. Give {model.files} to "
            f"{model.option}.",
            path,
        )
    own = checkpoint.without_prefix(prefix, others=("",))
    sources = plain_sources(own)
    wrong = CheckpointError(f"{path}: its vision tower is not that of Qwen2.5-VL. Give {model.files}.", path)
    shape = shapes_of(own, sources, wrong)
    dim, _, frames, patch, columns = shape(PATCHES, 5)
    wide, out_dim = shape("merger.mlp.0.weight", 2)[1], shape("merger.mlp.2.weight", 2)[0]
    told = told_beside(path, "vision_config", "qwen2_5_vl", dim, {})
    num_layers, merge = count(sources, r"blocks\.\d+"), math.isqrt(wide // dim)
    heads = told.get("num_heads", dim // HEAD_WIDTH or 1)
    window = told.get("window_size", WINDOW)
    full = told.get("fullatt_block_indexes", list(range(FULL_EVERY - 1, num_layers, FULL_EVERY)))
    sizes = (heads, window, *(full if isinstance(full, list) else [None]))
    told_fits = all(type(size) is int and 0 <= size < MOST_TOLD for size in sizes)
    is_square = patch == columns and merge >= 1 and merge**2 * dim == wide
    if not told_fits or not is_square or heads < 1 or dim % (4 * heads) or window < patch * merge:
        raise wrong
    config = VisionConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.mlp.gate_proj.weight", 2)[0],
        num_heads=heads,
        num_layers=num_layers,
        patch=patch,
        frames=frames,
        merge=merge,
        out_dim=out_dim,
        window=window,
        full_layers=tuple(full),
    )
    return LoadPlan(config, own, sources)


def build_vision_tower(config: VisionConfig) -> nn.Module:
    """Build the network, a class of transformers, for `on_meta_device`."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    attention: dict[str, Any] = {"attn_implementation": "sdpa"}
    told = Qwen2_5_VLVisionConfig(
        depth=config.num_layers,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_heads=config.num_heads,
        patch_size=config.patch,
        temporal_patch_size=config.frames,
        spatial_merge_size=config.merge,
        window_size=config.window,
        fullatt_block_indexes=list(config.full_layers),
        out_hidden_size=config.out_dim,
        **attention,
    )
    tower: Any = Qwen2_5_VisionTransformerPretrainedModel(told)
    angles = type(tower.rotary_pos_emb)
    with torch.device("cpu"):  # files do not hold the frequencies
        try:
            tower.rotary_pos_emb = angles(told)
        except TypeError:  # transformers 4
            tower.rotary_pos_emb = angles(config.dim // config.num_heads // 2)
    built: nn.Module = tower
    return built


def load_vision_tower(
    path: Path, model: LanguageModel, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Load the vision tower; fp8 weights are dequantized. Raises CheckpointError as `load_language_model`."""
    with open_checkpoint(path) as checkpoint:
        plan = read_vision_tower(checkpoint, model)
        tower = load_planned(plan, build_vision_tower, device, dtype, f"the vision tower ({model.option})")
    angles: Any = tower.rotary_pos_emb
    angles.to(device)
    return tower


def read_pictures(tower: nn.Module, pictures: Sequence[Tensor], use: PictureUse) -> ReadPictures:
    """Cut pictures into patches: sides become multiples of a token's, colours are normalised.

    pictures: each H W 3 uint8 RGB. Raises MediaError if one is 200 times as long as it is wide.
    """
    from PIL import Image

    processor: Any
    try:  # that of transformers 5 under the older name needs torchvision
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        processor = Qwen2VLImageProcessorPil
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        processor = Qwen2VLImageProcessor
    config: Any = tower.config
    merge, patch, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    if not pictures:
        return ReadPictures(torch.zeros(0, 3 * frames * patch**2))
    for picture in pictures:
        height, width = picture.shape[:2]
        if max(height, width) > MOST_RATIO * min(height, width):
            raise MediaError(
                f"a picture of {width}x{height} is too long and narrow for {use.token}. Crop it."
            )
    cut = processor(
        patch_size=patch,
        temporal_patch_size=frames,
        merge_size=merge,
        min_pixels=use.fewest,
        max_pixels=use.most,
    )
    found = cut(images=[Image.fromarray(picture.numpy()) for picture in pictures], return_tensors="pt")
    sides = [(int(rows) // merge, int(columns) // merge) for _, rows, columns in found["image_grid_thw"]]
    return ReadPictures(found["pixel_values"], tuple(sides))


def embed_pictures(
    tower: nn.Module, tokens: Tensor, ids: Tensor, pictures: Sequence[ReadPictures], token: int
) -> tuple[Tensor, Tensor]:
    """Put pictures in place of the tokens that stand for them: B L C. And return their places: 3 B L int64.

    tokens: embeddings, B L C. ids: B L, on the CPU. pictures: of each prompt. token: that stands for them.
    """
    shown, weight = [one for one in pictures if one.sides], tower.get_parameter(PATCHES)
    merge: int = tower.config.spatial_merge_size  # type: ignore[union-attr,assignment]
    grids = [(1, rows * merge, columns * merge) for one in shown for rows, columns in one.sides]
    patches = torch.cat([one.patches for one in shown]).to(weight)
    found = tower(patches, grid_thw=torch.tensor(grids, device=weight.device))
    states = getattr(found, "pooler_output", found)  # transformers 4: the states alone
    has_pictures = torch.tensor([bool(one.sides) for one in pictures])
    ids = ids.masked_fill(~has_pictures[:, None], -1)  # elsewhere the token is a word like others
    places = [place_tokens(row, one.sides, token) for row, one in zip(ids.tolist(), pictures, strict=True)]
    where = (ids == token).to(tokens.device)[..., None]
    return tokens.masked_scatter(where, states.to(tokens)), torch.stack(places, dim=1)


def place_tokens(ids: Sequence[int], sides: Sequence[tuple[int, int]], token: int) -> Tensor:
    """Return the places of a prompt's tokens in time, rows and columns: 3 L int64.

    A word moves on by one in all three. A picture's tokens share a time and stand in a grid; the next word
    stands behind its longer side.
    """
    rest, start, found = list(sides), 0, list[Tensor]()
    for is_picture, group in groupby(ids, lambda number: number == token):
        length = len(list(group))
        while length and is_picture:  # pictures may follow one another
            rows, columns = rest.pop(0)
            grid = torch.cartesian_prod(
                torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns)
            )
            found.append(grid.T + start)
            start, length = start + max(rows, columns), length - rows * columns
        found.append(torch.arange(start, start + length).expand(3, -1))
        start += length
    return torch.cat(found, dim=1)
