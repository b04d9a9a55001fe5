"""A single image from image-to-video models: one latent frame next to those of its control images.

Each latent frame has an index in time, which is its rotary position, and the frames are sorted by it. A
control image is known (mask 1); in place of the target image the model sees gray (mask 0), as for the unknown
frames of a video. All frames are noised, denoised and learned; only the target is decoded. Source:
musubi-tuner's page on one frame with Wan2.1 (wan_1f), whose caches and noise draws are reproduced here.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import CacheError, DatasetError, OptionError
from modules.media.pixels import image_pixels, to_pixels
from protocols.data import (
    FRAME_INDICES,
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
)
from protocols.one_frame import parse_one_frame, semicolon_hint
from protocols.requests import (
    Prepared,
    Request,
    check_opens,
    check_size,
    get_size,
    keep_usable_media,
    resolve_request,
)
from protocols.rules import Expert
from wan.configs import (
    FIRST_LAST_NEGATIVE_PROMPT,
    NEGATIVE_PROMPT,
    WanConfig,
    WanTask,
    default_flow_shift,
)
from wan.inputs import FRAMES_PER_LATENT, encode_features
from wan.options import ONE_FRAME, check_one_frame

logger = logging.getLogger(__name__)

MAX_FEATURES = 2  # images whose features the released models take: the first and the last frame
DEFAULT_TARGET, DEFAULT_CONTROL = 1, 0
CACHE_AGAIN = "wan_cache_latents.py --one_frame and --clip, of Wan2.2 --i2v"


@dataclass(frozen=True)
class FrameOrder:
    """Order of the latent frames of a single image: control images and target, sorted by index in time."""

    frame_positions: tuple[int, ...]
    image_indices: tuple[int, ...]  # index of each frame's control image; -1 for the target image

    @property
    def target_index(self) -> int:
        """Position of the target image among the frames."""
        return self.image_indices.index(-1)


def order_frames(controls: Sequence[int], target: int | None) -> FrameOrder:
    """Sort the image to generate and its control images by their time indices, by default 1 and 0.

    Raises ValueError if the generated image has the time index of a control image.
    """
    controls = controls or (DEFAULT_CONTROL,)
    target = DEFAULT_TARGET if target is None else target
    if target in controls:
        raise ValueError(f"the image and a control image are both at {target}. Give the image another index")
    # (index in time, index of the control image); -1 marks the target
    pairs = sorted([*zip(controls, range(len(controls)), strict=True), (target, -1)])
    return FrameOrder(tuple(position for position, _ in pairs), tuple(image for _, image in pairs))


def prepare(
    task: WanTask,
    request: Request,
    defaults: SamplingDefaults,
    latent: LatentSpec,
    experts: Sequence[Expert],
) -> Prepared:
    """Resolve a request for a single image, with its `FrameOrder` as `Prepared.family_settings`.

    Raises OptionError if an image or an index is missing or not valid.
    """
    check_one_frame(task)
    option = f"--one_frame_inference {request.extra[ONE_FRAME]!r}"
    request = _keep_used_images(task, request, option)
    order = _read_order(request, option)
    width, height, frames = get_size(request, defaults)
    if frames not in (1, defaults.frames):
        logger.warning("--video_length %d is ignored because a single image is generated", frames)
    check_size((width, height, len(order.frame_positions)), latent)
    flow_shift = default_flow_shift(task, width, height) if request.flow_shift is None else request.flow_shift
    negative = FIRST_LAST_NEGATIVE_PROMPT if task.kind == "flf2v" else NEGATIVE_PROMPT
    request = replace(request, negative_prompt=request.negative_prompt or None)
    prepared = resolve_request(
        request,
        defaults,
        size=(width, height, 1),
        flow_shift=flow_shift,
        default_negative=negative,
        experts=experts,
    )
    return replace(prepared, family_settings=order, extra_metadata={ONE_FRAME: request.extra[ONE_FRAME]})


def _read_order(request: Request, option: str) -> FrameOrder:
    """Read the indices of the target and of the control images from --one_frame_inference."""
    settings = parse_one_frame(request.extra[ONE_FRAME])
    images = request.control_images
    if not (settings.has_post and settings.has_2x and settings.has_4x):
        logger.warning(
            "%s: no_post, no_2x and no_4x are ignored because only FramePack has such frames", option
        )
    if len(settings.control_indices or (DEFAULT_CONTROL,)) != len(images):
        raise OptionError(
            f"{option}: {len(images)} control images. Pass as many positions, as in control_index=0+2 for two"
        )
    try:
        return order_frames(settings.control_indices, settings.target_index)
    except ValueError as error:
        raise OptionError(f"{option}: {error}") from None


def _keep_used_images(task: WanTask, request: Request, option: str) -> Request:
    """Return the request with only the images that the task takes. Raises OptionError if one is missing."""
    if request.source is not None:
        raise OptionError(
            f"--{request.source.option} {request.source.path} and {option}: a single image is generated "
            "from --control_image_path. Omit one of them"
        )
    usable = {
        "image_path": task.uses_clip_features,
        "end_image_path": task.uses_clip_features,
        "control_path": False,
        "control_images": True,
    }
    request = keep_usable_media(request, usable, f"a single image of --task {task.name} does not take it")
    if not request.control_images:
        hint = semicolon_hint(request.extra.get(ONE_FRAME, ""))
        raise OptionError(
            f"{option}: pass the images that the image is generated from to --control_image_path{hint}"
        )
    for path in request.control_images:
        check_opens("control_image_path", path, is_image=True)
    if task.kind == "flf2v" and len(_list_feature_images(request)) != MAX_FEATURES:
        raise OptionError(
            f"{option}: --task {task.name} needs two images. Pass --image_path and --end_image_path, or two "
            "control images without these"
        )
    return request


def _list_feature_images(request: Request) -> list[Path]:
    """Return the images for the image encoder: start and end image, else the first control images."""
    named = [path for path in (request.image_path, request.end_image_path) if path is not None]
    return named or [*request.control_images[:MAX_FEATURES]]


def encode_request(
    encoders: MediaEncoders, prepared: Prepared, task: WanTask
) -> dict[str, Tensor | list[Tensor]]:
    """Return the conditions of a request: its control images, the F frame indices, and CLIP features.

    Control images are in `condition_latents`, 1 20 F h w; features are only for tasks that have them. All are
    on the CPU. Control images are scaled to cover the target's size and cropped.
    """
    request = prepared.request
    order = prepared.family_settings
    assert isinstance(order, FrameOrder)
    vae = encoders.vae
    pixels = [image_pixels(path, prepared.width, prepared.height) for path in request.control_images]
    gray = vae.encode(torch.zeros_like(pixels[0])).cpu()
    controls = [vae.encode(image).cpu() for image in pixels]
    conditions = dict[str, Tensor | list[Tensor]]()
    if task.uses_clip_features:
        conditions["clip"] = encode_features(encoders, _list_feature_images(request))
    conditions[FRAME_INDICES] = torch.tensor([order.frame_positions])
    conditions["condition_latents"] = _make_channel_condition(order, controls, gray)
    return conditions


def _make_channel_condition(order: FrameOrder, controls: Sequence[Tensor], grey: Tensor) -> Tensor:
    """Return a single image's mask and latents for the condition channels, B 20 F h w."""
    # `controls` are latents of control images, B 16 1 h w each; `grey` takes the target's place.
    frames = [*controls, grey]  # index -1, the target image, is the last: gray
    mask = grey[:, :FRAMES_PER_LATENT]
    masks = [torch.full_like(mask, float(image >= 0)) for image in order.image_indices]
    latents = [frames[image] for image in order.image_indices]
    return torch.cat([torch.cat(masks, dim=2), torch.cat(latents, dim=2)], dim=1)


def check_table(table: MediaTable, has_features: bool) -> None:
    """Raise DatasetError unless a table can be trained with --one_frame: images with control images.

    `has_features` says whether CLIP features are cached, which limits the number of control images.
    """
    if table.kind != "image" or not table.has_control:
        raise DatasetError(
            f"{table.name}: --one_frame trains on images with control images. Set image_directory and "
            "control_directory, or control_path in every line of a list."
        )
    if has_features and len(table.clean_indices) > MAX_FEATURES:
        raise DatasetError(
            f"{table.name}: fp_1f_clean_indices asks for {len(table.clean_indices)} control images, but "
            f"with image features (--clip) Wan2.1 supports at most {MAX_FEATURES}."
        )
    if not table.has_post:
        logger.info("%s: fp_1f_no_post is ignored because only FramePack has that frame", table.name)
    try:
        order_frames(table.clean_indices, table.target_index)
    except ValueError as error:
        raise DatasetError(f"{table.name}: fp_1f_target_index: {error}.") from None


def encode_items(encoders: MediaEncoders, media: MediaBatch, store: torch.dtype) -> list[CacheEntry]:
    """Encode training images and their control images, each as a clip of one frame, for a cache.

    Returns an entry for each item of the batch. `store` is the dtype of stored latents.
    """
    vae = encoders.vae
    table = media.table
    order = order_frames(table.clean_indices, table.target_index)  # which image is at which time
    controls = [to_pixels(frames.to(vae.device)) for frames in media.control]
    target = to_pixels(media.frames.to(vae.device))
    control_latents = [vae.encode(image) for image in controls]
    latents = [*control_latents, vae.encode(target)]
    gray = vae.encode(torch.zeros_like(controls[0]))  # the condition where no control image is
    tensors = {
        # `latents` ends with the target, so that its index -1 in `order.image_indices` selects it
        "latents": torch.cat([latents[image] for image in order.image_indices], dim=2).to(store),
        "latents_image": _make_channel_condition(order, control_latents, gray).to(store),
    }
    if encoders.image_encoder is not None:
        features = [encoders.image_encoder.encode(image[:, :, 0]) for image in controls]
        tensors["clip"] = torch.cat(features, dim=1).to(torch.float16)
    frame_positions = torch.tensor(order.frame_positions, dtype=torch.int32)
    return [_make_entry(tensors, item, frame_positions) for item in range(len(media.keys))]


def _make_entry(tensors: Mapping[str, Tensor], item: int, frame_positions: Tensor) -> CacheEntry:
    item_tensors = {name: tensor[item] for name, tensor in tensors.items()}
    return CacheEntry({**item_tensors, FRAME_INDICES: frame_positions})


def batch_conditions(task: WanTask, config: WanConfig, batch: Batch) -> Conditions:
    """Return a batch's text, frame positions, `condition_latents` and, if the task uses them, CLIP features.

    Raises CacheError if a tensor is missing or does not fit the others.
    """
    try:
        check_one_frame(task)
    except OptionError as error:
        raise CacheError(f"{batch.keys[0]}: cached with --one_frame. {error}") from None
    needed = {"t5": "a text cache", "latents_image": CACHE_AGAIN}
    if task.uses_clip_features:
        needed["clip"] = CACHE_AGAIN
    batch.check(needed, f"--task {task.name}")
    frame_positions = batch.tensor(FRAME_INDICES)
    image = batch.tensor("latents_image").float()
    _check_frame_positions(batch, frame_positions, num_frames=image.shape[2])
    conditions: dict[str, Tensor | list[Tensor]] = {
        "t5": batch.tensors["t5"],
        FRAME_INDICES: frame_positions,
        "condition_latents": image,
    }
    if task.uses_clip_features:
        conditions["clip"] = _read_features(batch, task, config.image_positions)
    return conditions


def _check_frame_positions(batch: Batch, frame_positions: Tensor, num_frames: int) -> None:
    """Raise CacheError if frame positions, B F, do not fit the latents, or differ between items."""
    if frame_positions.is_floating_point() or frame_positions.shape != (len(batch), num_frames):
        raise CacheError(
            f"{batch.keys[0]}: its {FRAME_INDICES} do not fit its latents. Cache again with {CACHE_AGAIN}."
        )
    if bool((frame_positions != frame_positions[:1]).any()):
        raise CacheError(
            f"{batch.keys[0]} and {batch.keys[-1]}: their images have different positions "
            "(fp_1f_clean_indices, fp_1f_target_index) but are in one batch. Set batch_size = 1."
        )


def _read_features(batch: Batch, task: WanTask, positions: int) -> Tensor:
    """Return CLIP features, B T D. Raises CacheError if the network has another number of positions."""
    features = batch.tensor("clip")
    if features.ndim == 4:  # B images T D, as other tuners cache them
        features = features.flatten(1, 2)
    if positions and features.shape[1] != positions:
        raise CacheError(
            f"{batch.keys[0]}: the cached CLIP features have {features.shape[1]} rows, --task {task.name} "
            f"needs {positions}, of two images. Set fp_1f_clean_indices for two control images, as in "
            f"[0, 2], and cache again with {CACHE_AGAIN}."
        )
    return features


@lru_cache  # once, not with every batch
def warn_about_cached_videos() -> None:
    """Warn that --one_frame is given although the caches contain videos."""
    logger.warning(
        "--one_frame is given, but the caches do not contain single images: videos are learned, but "
        "samples are images. Cache again with %s, or omit --one_frame",
        CACHE_AGAIN,
    )
