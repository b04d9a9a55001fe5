"""Prepare images and clips for the vision tower of MiniMax-H3's text encoder.

Limits of sizes and colors are those of the preprocessor files in the model's folder, else the released ones.
Source: the image and video processors of Qwen3-VL in transformers, and the released preprocessor files.
"""
# Letters: F frames, T pairs of frames, H W pixels, P patches, K values in a patch

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from encoders.picture_prompts import MAX_RATIO, ImagePromptFormat, PatchedImages, read_images
from modules.errors import CheckpointError, MediaError
from modules.text_files import parse_json, read_text

IMAGE_FILE, CLIP_FILE = "preprocessor_config.json", "video_preprocessor_config.json"
BOTH_FILE = "processor_config.json"  # written by transformers 5, with settings for images and for clips
SECTIONS = {IMAGE_FILE: "image_processor", CLIP_FILE: "video_processor"}
COLOR_SETTINGS = ("image_mean", "image_std")
MAX_PIXELS = 1 << 40  # largest valid limit in a preprocessor file
MAX_ENLARGED = 1 << 24  # largest valid size in a preprocessor file to which small images are enlarged


@dataclass(frozen=True)
class Limits:
    """Limits for resizing and normalizing images, or clips, for the vision tower."""

    min_pixels: int  # of an image, or of all frames of a clip; smaller ones are enlarged
    max_pixels: int  # larger ones are reduced
    colors: Mapping[str, Sequence[float]] = field(default_factory=dict)  # {}: the tower's own
    max_tokens_per_frame: int = 0  # 0 if only the entire clip is limited


@dataclass(frozen=True)
class Preprocessing:
    """Size limits for the images and the clips that the text encoder sees."""

    images: Limits
    clips: Limits


# preprocessor_config.json and video_preprocessor_config.json of the release
RELEASED = Preprocessing(images=Limits(65536, 16777216), clips=Limits(4096, 25165824))


def read_preprocessing(folders: Iterable[Path]) -> Preprocessing:
    """Return the size limits from the first folder that has each preprocessor file, or the released limits.

    Raises CheckpointError if a file cannot be read.
    """
    looked_in = tuple(folders)
    return Preprocessing(
        images=_read_limits(_read_settings(looked_in, IMAGE_FILE), RELEASED.images),
        clips=_read_limits(_read_settings(looked_in, CLIP_FILE), RELEASED.clips),
    )


def _read_settings(folders: Sequence[Path], name: str) -> tuple[Path, Mapping[str, Any]]:
    """Return the first preprocessor file for images or clips, and its settings; {} without any file."""
    # In each folder, the file `name` is tried first, then the section for it in a file for both.
    for folder in folders:
        file = folder / name
        if file.is_file():
            return file, _require_object(file, _read_json(file))
        file = folder / BOTH_FILE
        if file.is_file():
            section = _require_object(file, _read_json(file)).get(SECTIONS[name])
            if section is not None:
                return file, _require_object(file, section)
    return Path(), {}


def _read_json(file: Path) -> Any:
    try:
        return parse_json(read_text(file))
    except (OSError, ValueError) as error:
        raise _make_error(file, str(error)) from error


def _require_object(file: Path, content: Any) -> Mapping[str, Any]:
    """Return a JSON object read from a file; raise CheckpointError if it is something else."""
    if not isinstance(content, dict):
        raise _make_error(file, "it is not an object")
    return content


def _read_limits(source: tuple[Path, Mapping[str, Any]], released: Limits) -> Limits:
    """Return the size limits and color statistics of a preprocessor; missing ones are as released."""
    # `source` is the path of the settings file, and its content.
    file, settings = source
    sizes = settings.get("size") or {}
    if not isinstance(sizes, dict):
        raise _make_error(file, '"size" is not an object')
    min_pixels = sizes.get("shortest_edge", settings.get("min_pixels", released.min_pixels))
    max_pixels = sizes.get("longest_edge", settings.get("max_pixels", released.max_pixels))
    are_integers = type(min_pixels) is int and type(max_pixels) is int
    if not are_integers or not 0 < min_pixels <= max_pixels <= MAX_PIXELS or min_pixels > MAX_ENLARGED:
        raise _make_error(file, f"sizes of {min_pixels} to {max_pixels} pixels")
    return replace(
        released,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_tokens_per_frame=_read_max_tokens(file, settings),
        colors=_read_colors(file, settings),
    )


def _read_max_tokens(file: Path, settings: Mapping[str, Any]) -> int:
    """Return the maximum number of tokens of a frame; 0 means no limit."""
    if settings.get("cap_pixels_per_frame") is not True:
        return 0
    max_tokens = settings.get("max_video_tokens", 768)  # the released processor's default
    if type(max_tokens) is not int or not 0 <= max_tokens <= MAX_PIXELS:
        raise _make_error(file, f'"max_video_tokens" is {max_tokens!r}')
    return max_tokens


def _read_colors(file: Path, settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the mean and standard deviation of colors by name of the setting, as far as they are set."""
    colors = {name: settings[name] for name in COLOR_SETTINGS if settings.get(name) is not None}
    for name, values in colors.items():
        if not _are_channel_values(values, above=0 if name == "image_std" else -math.inf):
            raise _make_error(file, f'"{name}" is {values!r}')
    return colors


def _are_channel_values(numbers: Any, above: float) -> bool:
    is_row = isinstance(numbers, list) and len(numbers) == 3
    return is_row and all(type(value) in (int, float) and above < value < math.inf for value in numbers)


def _make_error(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read as the settings of a preprocessor ({why}).", file)


def cut_image(tower: nn.Module, image: Tensor, limits: Limits, use: ImagePromptFormat) -> PatchedImages:
    """Cut an image, H W 3 uint8, into patches; raise MediaError if its aspect ratio is too extreme."""
    use = replace(use, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
    return read_images(tower, [image], use, limits.colors)


def cut_clip(tower: nn.Module, frames: Tensor, limits: Limits) -> PatchedImages:
    """Cut a clip, F H W 3 uint8, into the vision tower's patches, which cover two frames each.

    Each pair counts as an image: its tokens follow its time in the prompt. The last frame may be repeated.
    Raises MediaError if frames are too elongated.
    """
    config: Any = tower.config
    merge_size = config.spatial_merge_size
    token_size = config.patch_size * merge_size
    group_size = config.temporal_patch_size
    size = (frames.shape[1], frames.shape[2])
    height, width = resized_sides(
        len(frames), size, limits=limits, token_size=token_size, group_size=group_size
    )
    pixels = rearrange(frames, "f h w c -> f c h w").contiguous()
    if (height, width) != tuple(pixels.shape[2:]):
        pixels = functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    normalized = _normalize_colors(pixels, {**_read_tower_colors(tower), **limits.colors})
    # the last frame is repeated until the last patch is complete
    num_missing = -len(normalized) % group_size
    normalized = torch.cat([normalized, normalized[-1:].expand(num_missing, -1, -1, -1)])
    patches = rearrange(
        normalized,
        "(t ft) c (h mh ph) (w mw pw) -> (t h w mh mw) (c ft ph pw)",
        ft=group_size,
        mh=merge_size,
        mw=merge_size,
        ph=config.patch_size,
        pw=config.patch_size,
    )
    num_images = len(normalized) // group_size
    token_grid = (height // token_size, width // token_size)
    return PatchedImages(patches, (token_grid,) * num_images)


def _normalize_colors(pixels: Tensor, colors: Mapping[str, Sequence[float]]) -> Tensor:
    """Normalize pixels 0..255, F 3 H W, with a mean and a standard deviation of colors in 0..1."""
    by_channel = [torch.tensor(colors[name], dtype=torch.float32) for name in COLOR_SETTINGS]
    mean, std = (values.view(3, 1, 1) for values in by_channel)
    return (pixels.float() - mean * 255) / (std * 255)


def _read_tower_colors(tower: nn.Module) -> Mapping[str, Sequence[float]]:
    colors: Any = tower.colors
    return colors


def resized_sides(
    num_frames: int, sides: tuple[int, int], limits: Limits, token_size: int, group_size: int
) -> tuple[int, int]:
    """Return the height and width to which frames are resized for the vision tower.

    1. The sides are rounded to multiples of `token_size`, the frames to multiples of `group_size`, the number
       of frames in a token.
    2. If the number of pixels is then outside the limits, the original sides are scaled to the limit instead.
    3. Scaled sides are rounded to multiples of `token_size`: down at the maximum, up at the minimum.

    `num_frames` and `sides` (height, width) are the clip's. Raises MediaError if the sides differ too much.
    """
    height, width = _enlarge_to_token(sides, token_size)
    if max(height, width) > MAX_RATIO * min(height, width):
        raise MediaError(f"frames of {width}x{height} are too elongated for the text encoder. Crop them.")
    max_pixels = _limit_pixels(num_frames, limits, token_size)
    pixels = num_frames * height * width
    rounded_frames = round(num_frames / group_size) * group_size
    rounded_height = round(height / token_size) * token_size
    rounded_width = round(width / token_size) * token_size
    rounded_pixels = rounded_frames * rounded_height * rounded_width
    if rounded_pixels > max_pixels:
        scale = math.sqrt(pixels / max_pixels)
        lower_height = math.floor(height / scale / token_size) * token_size
        lower_width = math.floor(width / scale / token_size) * token_size
        return max(token_size, lower_height), max(token_size, lower_width)
    if rounded_pixels < limits.min_pixels:
        scale = math.sqrt(limits.min_pixels / pixels)
        upper_height = math.ceil(height * scale / token_size) * token_size
        upper_width = math.ceil(width * scale / token_size) * token_size
        return upper_height, upper_width
    return rounded_height, rounded_width


def _enlarge_to_token(sides: tuple[int, int], token_size: int) -> tuple[int, int]:
    """Return the sides, scaled so that both are at least those of one token."""
    height, width = sides
    if min(sides) >= token_size:
        return sides
    scale = max(token_size / height, token_size / width)
    return int(height * scale), int(width * scale)


def _limit_pixels(num_frames: int, limits: Limits, token_size: int) -> int:
    """Return the maximum number of pixels of a whole clip, even if the limits are for single frames."""
    if not limits.max_tokens_per_frame:
        return limits.max_pixels
    pixels_per_frame = min(limits.max_tokens_per_frame * token_size**2, limits.max_pixels // num_frames)
    # the released processor keeps the upper limit 5 % above the lower one
    pixels_per_frame = max(pixels_per_frame, int(limits.min_pixels * 1.05))
    return pixels_per_frame * num_frames
