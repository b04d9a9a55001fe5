"""Prepare images and clips for the vision tower of MiniMax-H3's text encoder.

Limits of sizes and colors are those of the preprocessor files in the model's folder, else the released ones.
Source: the image and video processors of Qwen3-VL in transformers, and the released preprocessor files.
"""
# Letters: F frames, T pairs of frames, H W pixels, P patches, K numbers of a patch

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
PARTS = {IMAGE_FILE: "image_processor", CLIP_FILE: "video_processor"}
COLOURS = ("image_mean", "image_std")
MAX_PIXELS = 1 << 40  # largest valid limit in a preprocessor file
MAX_ENLARGED = 1 << 24  # largest valid size in a preprocessor file to which small images are enlarged


@dataclass(frozen=True)
class Limits:
    """Limits for resizing and normalizing images, or clips, for the vision tower."""

    fewest: int  # pixels of an image, or of all frames of a clip; smaller ones are enlarged
    maximum: int  # larger ones are reduced
    colors: Mapping[str, Sequence[float]] = field(default_factory=dict)  # {}: the tower's own
    tokens_of_frame: int = 0  # maximum number of tokens per frame; 0 if only the entire clip is limited


@dataclass(frozen=True)
class Preprocessing:
    """Size limits for the images and the clips that the text encoder sees."""

    pictures: Limits
    clips: Limits


# preprocessor_config.json and video_preprocessor_config.json of the release
RELEASED = Preprocessing(pictures=Limits(65536, 16777216), clips=Limits(4096, 25165824))


def read_preprocessing(folders: Iterable[Path]) -> Preprocessing:
    """Return the size limits from the first folder that has each preprocessor file, or the released limits.

    Raises CheckpointError if a file cannot be read.
    """
    looked_in = tuple(folders)
    return Preprocessing(
        pictures=_read_limits(_read_settings(looked_in, IMAGE_FILE), RELEASED.pictures),
        clips=_read_limits(_read_settings(looked_in, CLIP_FILE), RELEASED.clips),
    )


def _read_settings(folders: Sequence[Path], name: str) -> tuple[Path, Mapping[str, Any]]:
    """Return the first preprocessor file for images or clips, and its settings; {} without any file."""
    for folder in folders:
        for file, part in ((folder / name, None), (folder / BOTH_FILE, PARTS[name])):
            if not file.is_file():
                continue
            try:
                content = parse_json(read_text(file))
            except (OSError, ValueError) as error:
                raise _make_error(file, str(error)) from error
            # the shared file has a section for each; a file of its own has the settings at the top
            settings = content.get(part) if part and isinstance(content, dict) else content
            # the shared file lacks this section: look in the next file
            if part and settings is None:
                continue
            if not isinstance(settings, dict):
                raise _make_error(file, "it is no object")
            return file, settings
    return Path(), {}


def _read_limits(source: tuple[Path, Mapping[str, Any]], released: Limits) -> Limits:
    """Return the size limits and colors in a preprocessor's settings; missing ones are as released.

    `source` is the settings file with its content. Raises an error for unusable values.
    """
    file, settings = source
    sizes = settings.get("size") or {}
    if not isinstance(sizes, dict):
        raise _make_error(file, '"size" is no object')
    fewest = sizes.get("shortest_edge", settings.get("min_pixels", released.fewest))
    maximum = sizes.get("longest_edge", settings.get("max_pixels", released.maximum))
    are_integers = type(fewest) is int and type(maximum) is int
    if not are_integers or not 0 < fewest <= maximum <= MAX_PIXELS or fewest > MAX_ENLARGED:
        raise _make_error(file, f"sizes of {fewest} to {maximum} pixels")
    # 768: the released processor's default
    # 0: no limit for the tokens of a frame
    tokens = settings.get("max_video_tokens", 768) if settings.get("cap_pixels_per_frame") is True else 0
    if type(tokens) is not int or not 0 <= tokens <= MAX_PIXELS:
        raise _make_error(file, f'"max_video_tokens" is {tokens!r}')
    colors = {name: settings[name] for name in COLOURS if settings.get(name) is not None}
    for name, values in colors.items():
        if not _are_colors(values, above=0 if name == "image_std" else -math.inf):
            raise _make_error(file, f'"{name}" is {values!r}')
    return replace(released, fewest=fewest, maximum=maximum, colors=colors, tokens_of_frame=tokens)


def _are_colors(numbers: Any, above: float) -> bool:
    is_row = isinstance(numbers, list) and len(numbers) == 3
    return is_row and all(type(value) in (int, float) and above < value < math.inf for value in numbers)


def _make_error(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read as the settings of a preprocessor ({why}).", file)


def cut_image(tower: nn.Module, picture: Tensor, limits: Limits, use: ImagePromptFormat) -> PatchedImages:
    """Cut an image, H W 3 uint8, into patches; raise MediaError if its aspect ratio is too extreme."""
    use = replace(use, min_pixels=limits.fewest, max_pixels=limits.maximum)
    return read_images(tower, [picture], use, limits.colors)


def cut_clip(tower: nn.Module, frames: Tensor, limits: Limits) -> PatchedImages:
    """Cut a clip, F H W 3 uint8, into the vision tower's patches, which cover two frames each.

    Each pair counts as an image: its tokens follow its time in the prompt. The last frame may be repeated.
    Raises MediaError if frames are too long and narrow.
    """
    config: Any = tower.config
    merge = config.spatial_merge_size
    step = config.patch_size * merge
    patch_frames = config.temporal_patch_size
    size = (frames.shape[1], frames.shape[2])
    height, width = resized_sides(len(frames), size, limits=limits, step=step, at_once=patch_frames)
    pixels = rearrange(frames, "f h w c -> f c h w").contiguous()
    if (height, width) != tuple(pixels.shape[2:]):
        pixels = functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    colors = {**_read_tower_colors(tower), **limits.colors}
    by_channel = [torch.tensor(colors[name], dtype=torch.float32) for name in COLOURS]
    mean, std = (values.view(3, 1, 1) for values in by_channel)
    normalized = (pixels.float() - mean * 255) / (std * 255)
    # the last frame is repeated until the last patch is complete
    missing = -len(normalized) % patch_frames
    normalized = torch.cat([normalized, normalized[-1:].expand(missing, -1, -1, -1)])
    patches = rearrange(
        normalized,
        "(t ft) c (h mh ph) (w mw pw) -> (t h w mh mw) (c ft ph pw)",
        ft=patch_frames,
        mh=merge,
        mw=merge,
        ph=config.patch_size,
        pw=config.patch_size,
    )
    num_images = len(normalized) // patch_frames
    sides = (height // step, width // step)
    return PatchedImages(patches, (sides,) * num_images)


def _read_tower_colors(tower: nn.Module) -> Mapping[str, Sequence[float]]:
    colors: Any = tower.colors
    return colors


def resized_sides(
    frames: int, sides: tuple[int, int], limits: Limits, step: int, at_once: int
) -> tuple[int, int]:
    """Return the height and width to which frames are resized for the vision tower, in multiples of `step`.

    `frames` and `sides` (height, width) are the clip's. `at_once` frames are merged into one token, and the
    number of frames is rounded to a multiple of it. Raises MediaError if the sides differ too much.
    """
    height, width = sides
    # enlarge clips that are smaller than one token
    if min(sides) < step:
        scale = max(step / height, step / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_RATIO * min(height, width):
        raise MediaError(
            f"frames of {width}x{height} are too long and narrow for the text encoder. Crop them."
        )

    # the limits are numbers of pixels of the whole clip
    max_pixels = limits.maximum
    if limits.tokens_of_frame:
        pixels_of_frame = min(limits.tokens_of_frame * step**2, limits.maximum // frames)
        # the released processor keeps the upper limit 5 % above the lower one
        pixels_of_frame = max(pixels_of_frame, int(limits.fewest * 1.05))
        max_pixels = pixels_of_frame * frames

    # the rounded sides are compared with the limits, but the scale is computed from the original sides
    rounded_frames = round(frames / at_once) * at_once
    rounded_height = round(height / step) * step
    rounded_width = round(width / step) * step
    rounded_pixels = rounded_frames * rounded_height * rounded_width
    pixels = frames * height * width
    if rounded_pixels > max_pixels:
        scale = math.sqrt(pixels / max_pixels)
        lower_height = math.floor(height / scale / step) * step
        lower_width = math.floor(width / scale / step) * step
        return max(step, lower_height), max(step, lower_width)
    if rounded_pixels < limits.fewest:
        scale = math.sqrt(limits.fewest / pixels)
        upper_height = math.ceil(height * scale / step) * step
        upper_width = math.ceil(width * scale / step) * step
        return upper_height, upper_width
    return rounded_height, rounded_width
