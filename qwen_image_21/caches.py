"""Caches of latents and texts: hashes of reference images, and whether the two belong together.

A text's states have seen the reference images, and the images' latents are inserted where the text encoder
saw them. So both caches hold the hashes of the images as these were encoded, under the names of musubi-tuner.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from encoders.language_encoder import PRE_NORM
from modules.errors import CacheError
from protocols.data import Batch, CacheEntry, CacheOrigin, MediaBatch
from qwen_image_21.options import NAME

SLOTS, SIZES = "image_slots", "reference_grids"  # places of references in a text, and their latents' sides
HASHES = "reference_hashes"  # in caches of latents: n 32 uint8
SEEN_HASHES = "vlm_reference_hashes"  # in caches of texts, of the images that the text encoder saw
HASH_BYTES = 32
TEXTS_AGAIN = "qwen_image_21_cache_text_encoder_outputs.py"
LATENTS_AGAIN = "qwen_image_21_cache_latents.py"
BOTH_AGAIN = f"Cache again with {LATENTS_AGAIN} and {TEXTS_AGAIN}"


def hash_images(images: Sequence[Tensor]) -> Tensor:
    """Return the SHA-256 of each image, n 32 uint8, in their order.

    `images` are H W 4 or H W 3 uint8 each, in the size that is encoded; three channels count as opaque. The
    hash covers `{W}x{H}:` and the bytes of the RGBA image.
    """
    digests = []
    for image in images:
        height, width, channels = image.shape
        if channels == 3:
            image = torch.cat([image, torch.full_like(image[..., :1], 255)], dim=-1)
        content = f"{width}x{height}:".encode() + image.contiguous().numpy().tobytes()
        digests.append(list(hashlib.sha256(content).digest()))
    return torch.tensor(digests, dtype=torch.uint8).view(-1, HASH_BYTES)


def add_hashes(entries: Sequence[Sequence[CacheEntry]], media: MediaBatch) -> list[list[CacheEntry]]:
    """Return the cache entries of a batch's images, each with the hashes of its control images."""
    hashed = []
    for index, (entry,) in enumerate(entries):
        hashes = hash_images([frames[index, 0] for frames in media.control])
        tensors = {**entry.tensors, HASHES: hashes}
        hashed.append([replace(entry, tensors=tensors, variable=frozenset({HASHES}))])
    return hashed


def check_states(cache: CacheOrigin, part: str) -> None:
    """Raise CacheError if a caption's states were taken after the final norm instead of before it.

    `part` is the text encoder's name in cache records. Caches of other programs have no records.
    """
    if cache.part != part or not cache.encoder:
        return
    if PRE_NORM not in cache.encoder.get(f"{part}_state", ""):
        version = cache.encoder.get(f"{part}_transformers")
        by = "" if version is None else f" by transformers {version}"
        raise CacheError(
            f"{cache.path}: its states were read{by} after the final norm of the text encoder, but {NAME} "
            f"takes those before it ({PRE_NORM}). Cache again with {TEXTS_AGAIN}: it replaces them."
        )


def check_references(batch: Batch, references: Mapping[str, Tensor]) -> None:
    """Raise CacheError if captions were encoded with different reference images than the cached ones.

    `references` are the cached latents by name, in order, B C 1 h w each.
    """
    sizes = [tuple(latents.shape[-2:]) for latents in references.values()]
    for index, key in enumerate(batch.keys):
        # a slot is the position of a reference among the caption's tokens
        num_slots = len(batch.tensors[SLOTS][index])
        if num_slots != len(sizes):
            raise CacheError(
                f"{key}: its caption was encoded with {num_slots} reference images, and its latents have "
                f"{len(sizes)}. {BOTH_AGAIN}."
            )
        if SIZES in batch.tensors:
            seen_sizes = [tuple(size) for size in batch.tensors[SIZES][index].tolist()]
            if seen_sizes != sizes:
                raise CacheError(
                    f"{key}: its caption was encoded with references of {seen_sizes} latent pixels, and its "
                    f"latents have {sizes}. {BOTH_AGAIN}."
                )
        if sizes:
            _check_hashes(batch, index, len(sizes))


def _check_hashes(batch: Batch, index: int, count: int) -> None:
    """Raise CacheError unless a caption was encoded with the same reference images, in the same order."""
    key = batch.keys[index]
    for name, made_by in ((HASHES, LATENTS_AGAIN), (SEEN_HASHES, TEXTS_AGAIN)):
        if name not in batch.tensors:
            raise CacheError(
                f"{key}: its cache has no {name}, the hashes of its reference images. Cache again with "
                f"{made_by}."
            )
        if tuple(batch.tensors[name][index].shape) != (count, HASH_BYTES):
            raise CacheError(
                f"{key}: {name} in its cache is not {count} hashes of {HASH_BYTES} bytes. Cache again with "
                f"{made_by}."
            )
    # hashes of the images that were encoded as latents, and of those the text encoder saw
    encoded = batch.tensors[HASHES][index]
    seen = batch.tensors[SEEN_HASHES][index]
    differing = [number for number in range(count) if not torch.equal(encoded[number], seen[number])]
    if differing:
        numbers = ", ".join(str(number + 1) for number in differing)
        raise CacheError(
            f"{key}: its caption was encoded with different reference images than its latents (number "
            f"{numbers}: different pixels, or a different order). {BOTH_AGAIN}."
        )
