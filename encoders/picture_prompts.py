"""Pictures in prompts: the vision tower of a language model, what it is given, and where its tokens stand.

The tower is the class of transformers; its files are those of the language model beside it.
"""
# Letters: B prompts, L tokens, P patches of all pictures, K numbers of a patch, C width of the language model

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.language_models import LanguageModel
from encoders.vision_towers import PATCHES, VisionTower
from modules.checkpoints.dialects import LoadPlan, count, load_planned, shapes_of
from modules.checkpoints.encoders import told_beside
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.errors import CheckpointError, MediaError
from modules.media.buckets import Size
from modules.media.reading import read_image, resize_cover, resize_stretched

LEAST_SIDE = 28  # pixels that reducing leaves of a side
MOST_RATIO = 200  # of the sides of a picture, for the released image processor


def read_rgb(path: Path, size: Size | None = None) -> Tensor:
    """Read a picture in its own size, or covering `size`: H W 3 uint8. Raises MediaError if it cannot."""
    frame = read_image(path)
    return torch.from_numpy(frame if size is None else resize_cover(frame, size))


def read_within(path: Path, size: Size | None = None, *, area: int) -> Tensor:
    """Read a picture as `read_rgb` does, reduced to at most `area` pixels in its shape, bicubic."""
    frame = read_rgb(path, size).numpy()
    sides = frame.shape[1], frame.shape[0]
    scale = math.sqrt(area / math.prod(sides))
    if scale < 1:
        width, height = (max(round(side * scale), LEAST_SIDE) for side in sides)
        frame = resize_stretched(frame, (width, height))
    return torch.from_numpy(frame)


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
    always: bool = True  # prompts have some; else the tower is loaded when one does

    def choose(self, paths: Sequence[Path]) -> Sequence[Path]:
        return paths[: self.shown]

    def write(self, number: int, tokens: int) -> str:
        return self.text.format(number=number, tokens=self.token * tokens)


@dataclass(frozen=True)
class ReadPictures:
    """The pictures of a prompt as the vision tower takes them."""

    patches: Tensor  # P K float32
    sides: tuple[tuple[int, int], ...] = ()  # rows and columns of tokens of each picture

    @property
    def counts(self) -> list[int]:
        return [rows * columns for rows, columns in self.sides]


@dataclass(frozen=True)
class VisionConfig:
    """A kind of vision towers, and the settings of its configuration in transformers."""

    tower: VisionTower
    settings: Mapping[str, Any]


def read_vision_tower(checkpoint: Checkpoint, model: LanguageModel) -> LoadPlan[VisionConfig]:
    """Plan how to load the vision tower of a model, which may stand under any prefix.

    Raises CheckpointError if the file has none, or one of another model.
    """
    path, mark, tower = checkpoint.path, f"visual.{PATCHES}", model.tower
    prefix = next((name.removesuffix(PATCHES) for name in checkpoint.tensors if name.endswith(mark)), None)
    if prefix is None or tower is None:
        raise CheckpointError(
            f"{path} has no vision tower, which prompts with pictures need. Give {model.files} to "
            f"{model.option}.",
            path,
        )
    own = checkpoint.without_prefix(prefix, others=("",))
    sources = plain_sources(own)
    what = f"its vision tower is not that of {tower.name}. Give {model.files} with its config.json."
    wrong = CheckpointError(f"{path}: {what}", path)
    shape = shapes_of(own, sources, wrong)
    dim, _, frames, patch, columns = shape(PATCHES, 5)
    (_, wide), (out_dim, _) = (shape(name, 2) for name in tower.merger)
    merge = math.isqrt(wide // dim)
    if patch != columns or merge < 1 or merge**2 * dim != wide:
        raise wrong
    sizes = {
        "depth": count(sources, r"blocks\.\d+"),
        "hidden_size": dim,
        "intermediate_size": shape(tower.feed, 2)[0],
        "patch_size": patch,
        "temporal_patch_size": frames,
        "spatial_merge_size": merge,
        "out_hidden_size": out_dim,
    }
    told = told_beside(path, "vision_config", tower.kind, dim, {})
    settings = tower.read(sizes, told, {name: info.shape for name, info in own.tensors.items()})
    if settings is None:
        raise wrong
    return LoadPlan(VisionConfig(tower, {**sizes, **settings}), own, sources)


def build_vision_tower(config: VisionConfig) -> nn.Module:
    """Build the network, a class of transformers, for `on_meta_device`."""
    kind = config.tower
    module = importlib.import_module(f"transformers.models.{kind.module}.modeling_{kind.module}")
    classes = (getattr(module, name) for name in kind.classes)
    told = next(classes)(**config.settings, attn_implementation="sdpa")
    tower: Any = next(classes)(told)
    angles = type(tower.rotary_pos_emb)
    with torch.device("cpu"):  # files do not hold the frequencies
        try:
            tower.rotary_pos_emb = angles(told)
        except TypeError:  # transformers 4
            tower.rotary_pos_emb = angles(told.hidden_size // told.num_heads // 2)
    tower.colours = kind.colours
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
    colours: Any = tower.colours
    cut = processor(
        patch_size=patch,
        temporal_patch_size=frames,
        merge_size=merge,
        min_pixels=use.fewest,
        max_pixels=use.most,
        **colours,
    )
    found = cut(images=[Image.fromarray(picture.numpy()) for picture in pictures], return_tensors="pt")
    sides = [(int(rows) // merge, int(columns) // merge) for _, rows, columns in found["image_grid_thw"]]
    return ReadPictures(found["pixel_values"], tuple(sides))


def embed_pictures(
    tower: nn.Module, tokens: Tensor, ids: Tensor, pictures: Sequence[ReadPictures], token: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return embeddings B L C, pictures in place of the tokens for them, and positions 3 B L int64.

    Also what to add after the first layers of the language model, each B L C, 0 for words. tokens:
    embeddings, B L C. ids: B L, on the CPU. pictures: of each prompt. token: the id for a picture.
    """
    shown, weight = [one for one in pictures if one.sides], tower.get_parameter(PATCHES)
    merge: int = tower.config.spatial_merge_size  # type: ignore[union-attr,assignment]
    grids = [(1, rows * merge, columns * merge) for one in shown for rows, columns in one.sides]
    patches = torch.cat([one.patches for one in shown]).to(weight)
    found = tower(patches, grid_thw=torch.tensor(grids, device=weight.device))
    # transformers 4: the states alone, or a tuple of them and those that are added later
    states, deep = found if isinstance(found, tuple) else (getattr(found, "pooler_output", found), None)
    deep = getattr(found, "deepstack_features", deep) or ()
    has_pictures = torch.tensor([bool(one.sides) for one in pictures])
    ids = ids.masked_fill(~has_pictures[:, None], -1)  # elsewhere the token is a word like others
    places = [place_tokens(row, one.sides, token) for row, one in zip(ids.tolist(), pictures, strict=True)]
    where = (ids == token).to(tokens.device)[..., None]
    added = [torch.zeros_like(tokens).masked_scatter(where, one.to(tokens)) for one in deep]
    return tokens.masked_scatter(where, states.to(tokens)), torch.stack(places, dim=1), added


def place_tokens(ids: Sequence[int], sides: Sequence[tuple[int, int]], token: int) -> Tensor:
    """Return the positions of a prompt's tokens in time, rows and columns: 3 L int64.

    Each word advances all three by one. A picture's tokens share a time and form a grid; the next word stands
    behind its longer side.
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
