"""FramePack's latent caches: a file for each section of a clip, or for each image with control images.

A section is what the network learns in one step: its true latents, and the network's other inputs when it
generates that section (`sections.py`). The clip's own latents take the place of latents generated before.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from encoders.tiles import posterior_generator
from frame_pack.inputs import apply_masks
from frame_pack.one_frame import one_frame_indices
from frame_pack.sections import LATENT_STRIDE, GenerationOrder, Indices, count_window_sections, video_frames
from hunyuan_model.spec import LATENT as VAE_LATENT
from modules.errors import DatasetError, MediaError
from modules.media.pixels import byte_clips, to_pixels
from protocols.data import CacheEntry, MediaBatch, MediaEncoders, MediaTable
from protocols.one_frame import OneFrame

logger = logging.getLogger(__name__)


# frames that are encoded at once: clips of up to six seconds are not split, as in other trainers; longer
# clips need no more memory
FULL_FRAMES = 192


NO_MOMENTS = (
    "FramePack learns sections of clips, whose conditions (the first frame's features, the past) are made "
    "from frames. Omit load_tensors"
)


# Checks of tables


def check_table(table: MediaTable, one_frame: bool) -> None:
    """Raise DatasetError if a dataset table has the wrong kind of items, or clips shorter than a section.

    `one_frame` is --one_frame. Warns about clips whose last frames do not fill a section.
    """
    if one_frame:
        _check_images(table)
        return
    if table.kind != "video":
        raise DatasetError(
            f"{table.name}: FramePack learns from clips, but these are images. Set video_directory or "
            "video_jsonl_file, or pass --one_frame to learn how to make an image from its control images."
        )
    table.reject_control("FramePack")
    # Raise DatasetError if clips are shorter than a section; warn if their last frames do not fill one
    minimum = _count_least_frames(table)
    if table.max_frames is not None and table.max_frames < minimum:
        raise DatasetError(
            f"{table.name}: max_frames = {table.max_frames} is less than a section needs: {minimum}, 4 x "
            f"{table.window} (fp_latent_window_size) + 1. Set max_frames = {video_frames(4, table.window)} "
            "for up to 4 sections."
        )
    too_short = [frames for frames in table.target_frames if frames < minimum]
    if too_short:
        raise DatasetError(
            f"{table.name}: target_frames = {list(table.target_frames)}, but clips of "
            f"{', '.join(map(str, too_short))} frames are too short: a section needs {minimum}, 4 x "
            f"{table.window} (fp_latent_window_size) + 1. Use target_frames of 4 x {table.window} x n + 1, "
            f"such as [{video_frames(4, table.window)}], or frame_extraction = "
            '"full".'
        )
    for frames in table.target_frames:
        used = video_frames(_count_full_sections(table, frames), table.window)
        if used < frames:
            logger.warning(
                "%s: the last %d of %d frames of a clip are not used, because %d fill whole sections",
                table.name,
                frames - used,
                frames,
                used,
            )


def _check_images(table: MediaTable) -> None:
    if table.kind != "image":
        raise DatasetError(
            f"{table.name}: --one_frame caches images that have control images, but these are videos. Omit "
            "--one_frame, or set image_directory or image_jsonl_file."
        )
    if not table.has_control:
        raise DatasetError(
            f"{table.name}: --one_frame needs control images, from which each image is generated. Set "
            "control_directory, or control_path in every line of the list."
        )


def count_sections(table: MediaTable, frames: int) -> int:
    """Return how many full sections, the parts of a video made one after another, a clip has.

    Raises MediaError if it is too short for one section.
    """
    sections = _count_full_sections(table, frames)
    if sections == 0:
        raise MediaError(
            f"{frames} usable frames (4 n + 1 of the clip's) are too few: a section needs "
            f"{_count_least_frames(table)}, 4 x {table.window} (fp_latent_window_size) + 1. Use a longer "
            "clip, or take this one out"
        )
    return sections


def _count_full_sections(table: MediaTable, frames: int) -> int:
    return count_window_sections((frames - 1) // LATENT_STRIDE + 1, table.window)


def _count_least_frames(table: MediaTable) -> int:
    return video_frames(1, table.window)


# Clips


def clip_entries(
    encoders: MediaEncoders, media: MediaBatch, order: GenerationOrder
) -> list[list[CacheEntry]]:
    """Encode clips; return a cache entry for each section of each clip, with its number as `section`.

    Tensors have the VAE's dtype and are on the CPU. A clip is encoded as a whole, as a posterior sample
    seeded by its name; its first frame serves as the start image.
    """
    window = media.table.window
    frames = video_frames(count_sections(media.table, media.frames.shape[1]), window)
    latents = _encode(encoders, media.keys, [media.frames[:, :frames]])[0]
    features = _encode_features(encoders, media.frames[:, :1])
    entries = []
    for clip_latents, clip_features in zip(latents.split(1), features, strict=True):
        entries.append(clip_sections(clip_latents, clip_features, order, window))
    return entries


def clip_sections(latents: Tensor, features: Tensor, order: GenerationOrder, window: int) -> list[CacheEntry]:
    """Return a cache entry for each section of a clip, with the sections generated before it as history.

    Args:
        latents: 1 C F h w, the start frame and full sections.
        features: Image features of the first frame.
        order: Order of generation.
        window: Latent frames of a section.
    """
    start = latents[:, :, :1]
    targets = latents[:, :, 1:].split(window, dim=2)
    history = order.start_history(start, None)  # what precedes a section in the order of generation
    entries = []
    for plan in order.plan_sections(len(targets), window, ()):
        target = targets[plan.index]
        clean = order.clean_latents(start, history)
        batched = {"latents": target, **clean.by_name()}
        # copied, because a view would keep the whole history in memory
        tensors = {name: latents[0].clone() for name, latents in batched.items()}
        entry = _make_entry(tensors, plan.indices, features, section=plan.index)
        # the section's first latent frame in the clip, whose start image comes before all sections
        entries.append(replace(entry, start=start.shape[2] + plan.index * window))
        history = order.add_to_history(history, target)
    return entries


# Images


def image_entries(
    encoders: MediaEncoders, media: MediaBatch, black_frames: OneFrame
) -> list[list[CacheEntry]]:
    """Return a cache entry for each image: its latents as the target, and those of its control images.

    Each image is encoded alone. Latents are 0 where their image is transparent. `black_frames` sets which
    black frames are added to the clean ones; the frame indices of all images come from the dataset's table.
    """
    table = media.table
    # the run sets which black frames are added, the dataset's table everything else
    settings = replace(
        black_frames,
        target_index=table.target_index,
        control_indices=table.clean_indices,
        has_post=table.has_post,
    )
    indices = one_frame_indices(settings, len(media.control), table.window)
    target, *controls = _encode(encoders, media.keys, [media.frames, *media.control])
    target = apply_masks(target, media.alpha)
    clean_frames = []
    for latents, frames in zip(controls, media.control, strict=True):
        # frames are B F H W C; a fourth channel is the alpha of the control image
        alpha = frames[:, 0, :, :, 3] if frames.shape[-1] == 4 else None
        clean_frames.append(apply_masks(latents, alpha))
    # the remaining indices belong to black frames, whose latents are 0
    num_black = len(indices.clean) - len(clean_frames)
    clean_frames += [torch.zeros_like(target)] * num_black
    clean = torch.cat(clean_frames, dim=2)
    features = _encode_features(encoders, media.control[0])  # of the first control image only
    entries = []
    for item in range(len(media.keys)):
        tensors = {"latents": target[item], "latents_clean": clean[item]}
        entries.append([_make_entry(tensors, indices, features[item])])
    return entries


# Both


def _encode(encoders: MediaEncoders, keys: Sequence[str], clips: Sequence[Tensor]) -> list[Tensor]:
    """Encode each of `clips`, B F H W C uint8, as B C F h w in model space, VAE's dtype, on the CPU."""
    vae = encoders.vae
    # one generator per item, which draws for its clips in turn
    generators = [posterior_generator(key) for key in keys]
    return [
        vae.encode(byte_clips(clip), generators).mul_(VAE_LATENT.scale).to("cpu", vae.dtype) for clip in clips
    ]


def _encode_features(encoders: MediaEncoders, frames: Tensor) -> Tensor:
    """Encode the first frames, B H W C of B F H W C uint8, as image features B L C on the CPU."""
    return encoders.image_encoder.encode(to_pixels(frames[:, :1]).squeeze(2)).to("cpu", encoders.vae.dtype)


def _make_entry(
    tensors: dict[str, Tensor], indices: Indices, features: Tensor, section: int | None = None
) -> CacheEntry:
    """Build a cache entry from tensors C F h w; `latents` is the target, whose size names the file."""
    all_tensors = dict(tensors)
    for name, numbers in indices.by_name().items():
        all_tensors[name] = torch.tensor(numbers)
    all_tensors["image_embeddings"] = features
    frames, height, width = tensors["latents"].shape[1:]
    return CacheEntry(all_tensors, section, grid=(frames, height, width))
