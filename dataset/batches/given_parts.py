"""Parts of clips that training keeps clean: a region of the frame, spans of the audio, guide images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dataset.batches.items import TrainingItem
from dataset.cache_files import parse_latent_name
from modules.errors import DatasetError
from modules.text_files import parse_json, read_text
from protocols import data
from protocols.steps import FULLY_CLEAN

Spans = tuple[tuple[float, float], ...]
KEYS = ("audio_cond_mask_intervals", "cond_mask_intervals", "intervals")  # keys of a JSON file of spans


def add_clean_conditions(batch: data.Batch, items: Sequence[TrainingItem]) -> data.Batch:
    """Add conditions to a batch: the parts of clips that training may keep clean (free of noise).

    These are a region of the frame, spans of the audio, and images that guide the clip. The items' tables
    name them.

    Raises:
        DatasetError: If a file of spans cannot be read or has no pairs of seconds, or if caches lack guides.
    """
    regions = tuple(item.table.references.spatial_crop_region for item in items)
    rates = batch.tensors.get(data.FPS)  # B, in thousandths of a frame per second
    clean_audio_spans = []
    for index, item in enumerate(items):
        fps = float(rates[index]) / 1000 if isinstance(rates, Tensor) else None
        clean_audio_spans.append(read_clean_audio_spans(item, fps))
    tensors = dict(batch.tensors)
    if items[0].table.references.guides:  # all items of a batch have the same table
        # index and strength of each guide image, B G 2
        table = items[0].table
        starts = (data.KEYFRAME_LATENTS, data.LATENT_GUIDE)
        num_cached = sum(name.startswith(starts) for name in batch.tensors)
        if num_cached != len(table.references.guides):
            raise DatasetError(
                f"{batch.keys[0]}: its cache has {num_cached} guides, but {table.name} has "
                f"{len(table.references.guides)}. Cache again"
            )
        # strengths 0..1 become integers 0..FULLY_CLEAN, which keep their values when a batch is cast
        indices_and_strengths = [
            [guide.index, round(FULLY_CLEAN * guide.strength)] for guide in table.references.guides
        ]
        tensors[data.GUIDES] = torch.tensor(indices_and_strengths).expand(len(batch), -1, -1)
    return replace(
        batch,
        tensors=tensors,
        crop_regions=regions if any(regions) else (),
        clean_times=tuple(clean_audio_spans) if any(spans is not None for spans in clean_audio_spans) else (),
    )


def read_clean_audio_spans(item: TrainingItem, fps: float | None) -> Spans | None:
    """Return the spans of an item's audio that stay clean: start and end in seconds of its clip.

    Returns None if the item has no file of spans: STEM.json or STEM.txt in the table's
    audio_cond_mask_directory.

    Args:
        item: A training item.
        fps: Frames per second of its clip; None if unknown.

    Raises:
        DatasetError: If the file cannot be read, or contains anything other than pairs of seconds.
    """
    folder = item.table.references.audio_cond_mask_directory
    if folder is None:
        return None
    paths = [folder / f"{item.source_stem}{suffix}" for suffix in (".json", ".txt")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    # times in the file count from the start of the original clip; the item may begin later in it
    name = parse_latent_name(item.file_name, item.cache_info.tag, "video")
    if name is None or name.span is None or fps is None:
        item_start = 0.0
    else:
        first_frame, _ = name.span
        item_start = first_frame / fps
    return tuple((start - item_start, end - item_start) for start, end in _read_spans(path))


def _read_spans(path: Path) -> Spans:
    """Read pairs of seconds: a JSON list, possibly under one of KEYS, or lines of text with a pair each."""
    try:
        text = read_text(path)
        content = parse_json(text) if path.suffix == ".json" else [line.split() for line in text.splitlines()]
        if isinstance(content, dict):
            content = next(content[key] for key in KEYS if key in content)
        pairs = [pair for pair in content if pair]  # without empty lines
        spans = tuple((float(start), float(end)) for start, end in pairs)
        if not all(0 <= start < end < float("inf") for start, end in spans):
            raise ValueError  # reported below, like text that is not a number
    except (OSError, ValueError, TypeError, StopIteration):
        raise DatasetError(
            f"{path}: not a list of pairs of seconds. Write lines such as 0.5 1.25 in a .txt file, or "
            f'{{"intervals": [[0.5, 1.25]]}} in a .json file'
        ) from None
    return spans
