"""Images in prompts: the vision tower of a language model, its inputs, and the positions of its tokens.

The tower is a class of the library transformers; its weights are in the file of the language model.
"""
# Letters: B prompts, L tokens, P patches of all images, K values of a patch, C width of the language model

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, count, load_planned, make_shape_reader
from checkpoints.encoders import read_network_config
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.language_models import LanguageModel
from encoders.vision_towers import PATCHES, VisionTower
from modules.errors import CheckpointError, MediaError
from modules.media.buckets import Size
from modules.media.reading import read_image, resize_cover, resize_stretched
from protocols.loading import TensorSource

Shown = TypeVar("Shown")
MIN_SIDE = 28  # smallest side of a shrunk image, in pixels
MAX_RATIO = 200  # largest aspect ratio that the released image processor accepts


def read_rgb(path: Path, size: Size | None = None) -> Tensor:
    """Read an image, H W 3 uint8, in its own size, or resized and cropped to `size`.

    Raises:
        MediaError: If the image cannot be read.
    """
    frame = read_image(path)
    return torch.from_numpy(frame if size is None else resize_cover(frame, size))


def read_within(path: Path, size: Size | None = None, *, area: int) -> Tensor:
    """Read an image as RGB and shrink it to at most `area` pixels, keeping its aspect ratio (bicubic)."""
    frame = read_rgb(path, size).numpy()
    height, width = frame.shape[:2]
    scale = math.sqrt(area / (width * height))
    if scale < 1:
        new_width = max(round(width * scale), MIN_SIDE)
        new_height = max(round(height * scale), MIN_SIDE)
        frame = resize_stretched(frame, (new_width, new_height))
    return torch.from_numpy(frame)


@dataclass(frozen=True)
class ImagePromptFormat:
    """Text and placeholder tokens that a family puts into a prompt for each image."""

    # text for each image, which precedes the prompt; with the fields {number} (from 1) and {tokens}
    # (placeholder tokens of the image)
    text: str
    alone: str = ""  # text if there is a single image; "": `text`
    token: str = "<|image_pad|>"  # placeholder token of images
    # reads an image, at `Prompt.image_size` if that is set: H W 3 uint8; raises MediaError
    read: Callable[[Path, Size | None], Tensor] = read_rgb
    # converts an image of `Prompt.image_pixels`, H W C uint8, to H W 3
    show: Callable[[Tensor], Tensor] = lambda frame: frame[..., :3]
    # returns hashes of `Prompt.image_pixels` for caches, n 32 uint8; None: caches have no hashes
    hash_images: Callable[[Sequence[Tensor]], Tensor] | None = None
    max_images: int | None = None  # number of images that are used, from the first on; None: all
    min_pixels: int = 3136  # minimum number of pixels; smaller images are enlarged
    max_pixels: int = 12845056  # maximum number of pixels; larger images are shrunk
    between: str = ""  # text between two images
    loads_tower_at_once: bool = True  # load the tower with the encoder; False: once a prompt has images

    def select(self, pictures: Sequence[Shown]) -> Sequence[Shown]:
        """Return the first `max_images` images."""
        return pictures[: self.max_images]

    def write(self, number: int, tokens: int, count: int = 2) -> str:
        """Return the text that inserts an image into a prompt.

        Args:
            number: 1-based index of the image in the prompt.
            tokens: Number of its placeholder tokens.
            count: Number of images in the prompt; the text of a single image may differ.
        """
        before = self.between if number > 1 else ""
        text = self.alone if self.alone and count == 1 else self.text
        return before + text.format(number=number, tokens=self.token * tokens)


@dataclass(frozen=True)
class PatchedImages:
    """The images of a prompt, cut into patches for the vision tower."""

    patches: Tensor  # of all images, P K float32
    token_grids: tuple[tuple[int, int], ...] = ()  # for each image, its rows and columns of tokens

    @property
    def counts(self) -> list[int]:
        """Number of tokens of each image."""
        return [rows * columns for rows, columns in self.token_grids]


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower's kind, and the arguments of its config class in transformers."""

    tower: VisionTower
    settings: Mapping[str, Any]


def read_vision_tower(checkpoint: Checkpoint, model: LanguageModel) -> LoadPlan[VisionConfig]:
    """Plan how to load the vision tower of a model; tensor names may have any prefix.

    Raises:
        CheckpointError: If the file has no vision tower, or the tower of a different model.
    """
    path = checkpoint.path
    tower = model.tower
    names = [name for name in checkpoint.tensors if name.endswith(f"visual.{PATCHES}")]
    if not names or tower is None:
        raise CheckpointError(
            f"{path} has no vision tower, which prompts with images need. Pass {model.files} to "
            f"{model.option}.",
            path,
        )
    prefix = names[0].removesuffix(PATCHES)
    network = checkpoint.without_prefix(prefix, ignored_prefixes=("",))  # all other tensors are left out
    sources = list_tensor_sources(network)
    other_tower = CheckpointError(
        f"{path}: its vision tower is not that of {tower.name}. Pass {model.files} with its config.json.",
        path,
    )
    sizes = _read_sizes(tower, network, sources, error=other_tower)
    config_json = read_network_config(
        path, "vision_config", kind=tower.kind, dim=sizes["hidden_size"], defaults={}
    )
    shapes = {name: info.shape for name, info in network.tensors.items()}
    settings = tower.read(sizes, config_json, shapes)
    if settings is None:
        raise other_tower
    return LoadPlan(VisionConfig(tower, {**sizes, **settings}), network, sources)


def _read_sizes(
    tower: VisionTower, network: Checkpoint, sources: Mapping[str, TensorSource], error: CheckpointError
) -> dict[str, int]:
    """Return the tower's settings that its tensor shapes determine, under transformers' names."""
    shape = make_shape_reader(network, sources, error)
    dim, _, frames, patch_height, patch_width = shape(PATCHES, 5)
    # the merger joins the channels of merge x merge patches, and projects them to one token
    first_layer, last_layer = tower.merger
    merged_dim = shape(first_layer, 2)[1]
    out_dim = shape(last_layer, 2)[0]
    merge = math.isqrt(merged_dim // dim)
    if patch_height != patch_width or merge < 1 or merge**2 * dim != merged_dim:
        raise error
    return {
        "depth": count(sources, r"blocks\.\d+"),
        "hidden_size": dim,
        "intermediate_size": shape(tower.feed, 2)[0],
        "patch_size": patch_height,
        "temporal_patch_size": frames,
        "spatial_merge_size": merge,
        "out_hidden_size": out_dim,
    }


def build_vision_tower(config: VisionConfig) -> nn.Module:
    """Build the vision tower, a transformers model; call this inside `on_meta_device`."""
    kind = config.tower
    module = importlib.import_module(f"transformers.models.{kind.module}.modeling_{kind.module}")
    # names of the classes in transformers
    config_class, tower_class = kind.classes
    transformers_config = getattr(module, config_class)(**config.settings, attn_implementation="sdpa")
    tower: Any = getattr(module, tower_class)(transformers_config)
    # rotary frequencies are not in checkpoints: compute them on the CPU, not on the meta device
    rotary_class = type(tower.rotary_pos_emb)
    with torch.device("cpu"):
        try:
            tower.rotary_pos_emb = rotary_class(transformers_config)
        except TypeError:  # transformers 4 takes half the width of a head
            head_dim = transformers_config.hidden_size // transformers_config.num_heads
            tower.rotary_pos_emb = rotary_class(head_dim // 2)
    tower.colors = kind.colors  # `read_images` normalizes pixels with them
    return cast(nn.Module, tower)


def load_vision_tower(
    path: Path, model: LanguageModel, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Load the vision tower of a language model; fp8 weights are dequantized."""
    with open_checkpoint(path) as checkpoint:
        plan = read_vision_tower(checkpoint, model)
        what = f"the vision tower ({model.option})"
        tower = load_planned(plan, build_vision_tower, device=device, dtype=dtype, label=what)
    angles: Any = tower.rotary_pos_emb
    angles.to(device)
    return tower


def _reject_narrow(images: Sequence[Tensor], prompt_format: ImagePromptFormat) -> None:
    """Raise MediaError if the aspect ratio of an image is above MAX_RATIO."""
    for image in images:
        height, width = image.shape[:2]
        if max(height, width) > MAX_RATIO * min(height, width):
            raise MediaError(
                f"an image of {width}x{height} is too long and narrow for {prompt_format.token}. Crop it."
            )


def read_images(
    tower: nn.Module,
    images: Sequence[Tensor],
    prompt_format: ImagePromptFormat,
    colors: Mapping[str, Sequence[float]] | None = None,
) -> PatchedImages:
    """Resize images to multiples of a token's size, normalize their colors, and cut them into patches.

    transformers' image processor does this, with the limits of the family's prompt format.

    Args:
        tower: The vision tower.
        images: Images, each H W 3 uint8 RGB.
        prompt_format: How the family puts images into prompts.
        colors: Replaces the mean and standard deviation of the tower (`VisionTower.colors`).

    Raises:
        MediaError: If the aspect ratio of an image is above MAX_RATIO.
    """
    from PIL import Image

    config: Any = tower.config
    merge = config.spatial_merge_size  # a token stands for merge x merge patches
    patch_size = config.patch_size
    frames_per_patch = config.temporal_patch_size
    processor_class = _import_processor()
    if not images:
        values_per_patch = 3 * frames_per_patch * patch_size**2  # of three colors
        return PatchedImages(torch.zeros(0, values_per_patch))
    _reject_narrow(images, prompt_format)
    tower_colors: Any = tower.colors
    processor = processor_class(
        patch_size=patch_size,
        temporal_patch_size=frames_per_patch,
        merge_size=merge,
        min_pixels=prompt_format.min_pixels,
        max_pixels=prompt_format.max_pixels,
        **{**tower_colors, **(colors or {})},
    )
    inputs = processor(images=[Image.fromarray(image.numpy()) for image in images], return_tensors="pt")
    token_grids = []
    for _, patch_rows, patch_columns in inputs["image_grid_thw"]:
        token_grids.append((int(patch_rows) // merge, int(patch_columns) // merge))
    return PatchedImages(inputs["pixel_values"], tuple(token_grids))


def _import_processor() -> Any:
    """Import and return transformers' Qwen2-VL image processor that works without torchvision."""
    try:  # in transformers 5, the class with the older name needs torchvision
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        return Qwen2VLImageProcessor


class PromptEmbeddings(NamedTuple):
    """Prompt embeddings in which image features replace the image placeholder tokens."""

    embeddings: Tensor  # B L C
    # time, row and column of each token, 3 B L int64, or 1 L for all prompts; None: 0, 1, 2, ...
    position_ids: Tensor | None
    # DeepStack: image features to add to the outputs of the first layers, each B L C, 0 for text tokens
    layer_additions: list[Tensor]


def embed_images(
    vision_tower: nn.Module,
    embeddings: Tensor,
    ids: Tensor,
    images: Sequence[PatchedImages],
    placeholder: int,
) -> PromptEmbeddings:
    """Replace the embeddings of placeholder tokens with the vision tower's image features.

    Args:
        vision_tower: The vision tower.
        embeddings: Embeddings of all tokens, B L C.
        ids: Token ids, B L, on the CPU.
        images: Images of each prompt.
        placeholder: Id of the placeholder token, which stands for one token of an image.
    """
    prompts_with_images = [prompt for prompt in images if prompt.token_grids]
    features, deep_features = _run_tower(vision_tower, prompts_with_images)
    has_images = torch.tensor([bool(prompt.token_grids) for prompt in images])
    # in a prompt without images, a placeholder token is text that the user typed
    ids = ids.masked_fill(~has_images[:, None], -1)
    position_ids = []
    for prompt_ids, prompt in zip(ids.tolist(), images, strict=True):
        position_ids.append(image_position_ids(prompt_ids, prompt.token_grids, placeholder))
    is_image = (ids == placeholder).to(embeddings.device)[..., None]  # B L 1
    layer_additions = []
    for deep in deep_features:
        layer_additions.append(torch.zeros_like(embeddings).masked_scatter(is_image, deep.to(embeddings)))
    return PromptEmbeddings(
        embeddings=embeddings.masked_scatter(is_image, features.to(embeddings)),
        position_ids=torch.stack(position_ids, dim=1),
        layer_additions=layer_additions,
    )


def _run_tower(tower: nn.Module, prompts: Sequence[PatchedImages]) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the features of all image tokens, and features to add after the first layers (DeepStack)."""
    weight = tower.get_parameter(PATCHES)
    merge: int = tower.config.spatial_merge_size  # type: ignore[union-attr,assignment]
    patch_grids = []  # frames, rows and columns of patches of each image
    for prompt in prompts:
        for rows, columns in prompt.token_grids:
            patch_grids.append((1, rows * merge, columns * merge))
    patches = torch.cat([prompt.patches for prompt in prompts]).to(weight)
    output = tower(patches, grid_thw=torch.tensor(patch_grids, device=weight.device))
    if isinstance(output, tuple):  # transformers 4, a tower with DeepStack
        features, deep_features = output
        return features, deep_features or ()
    if isinstance(output, Tensor):  # transformers 4, other towers
        return output, ()
    # transformers 5
    return output.pooler_output, getattr(output, "deepstack_features", None) or ()


def image_position_ids(ids: Sequence[int], token_grids: Sequence[tuple[int, int]], token: int) -> Tensor:
    """Return the positions of a prompt's tokens in time, rows and columns: 3 L int64.

    Each text token advances all three positions by one. The tokens of an image have the same time and form a
    grid; the next text token follows after the longer side of the grid.

    Args:
        ids: Token ids, L.
        token_grids: For each image, its rows and columns of tokens.
        token: Id of the placeholder token of images.
    """
    remaining_grids = list(token_grids)
    next_position = 0
    position_ids: list[Tensor] = []
    for is_image, run in groupby(ids, lambda token_id: token_id == token):
        num_tokens = len(list(run))
        if not is_image:
            text_positions = torch.arange(next_position, next_position + num_tokens)
            position_ids.append(text_positions.expand(3, -1))
            next_position += num_tokens
            continue
        while num_tokens:  # a run of placeholders may stand for several images
            rows, columns = remaining_grids.pop(0)
            same_time = torch.zeros(1, dtype=torch.int64)
            grid = torch.cartesian_prod(same_time, torch.arange(rows), torch.arange(columns))
            position_ids.append(grid.T + next_position)
            next_position += max(rows, columns)
            num_tokens -= rows * columns
    return torch.cat(position_ids, dim=1)
