"""Encode the captions of items, one text encoder after the other, and write their files."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataset.caching.prefetch import WriteBehind
from dataset.caching.texts import warn_cut_captions
from dataset.cogvideox.artifacts import save_pickled, write_texts
from dataset.cogvideox.items import PreparedItem
from dataset.sources.media_source import EMBEDS
from modules.bars import Bar
from modules.checkpoints.containers import load_pickled
from modules.contract.data import Conditions
from modules.contract.family import MomentsMaker, TextEncoder
from modules.contract.requests import Prompt

UNFINISHED = ".unfinished-"  # in front of a process's number: a folder of what earlier encoders gave


def write_captions(items: Sequence[PreparedItem], threads: int, show_progress: bool) -> None:
    """Write the captions alone."""
    with (
        WriteBehind(threads) as writer,
        Bar(len(items), "Writing captions", "caption", show_progress) as bar,
    ):
        for item in items:
            writer.submit(partial(write_texts, item, "", {}, {}))
            bar.update()


def encode_captions(
    items: Sequence[PreparedItem],
    maker: MomentsMaker,
    device: torch.device,
    batch_size: int,
    threads: int,
    show_progress: bool,
    rank: int,
) -> None:
    """Encode and write the captions of `items`. Of several encoders, all but the last write to files aside.

    rank: of this process, for a folder of its own. Raises CheckpointError if an encoder cannot be loaded.
    """
    if not items:
        return
    encoders = maker.text_encoders
    identities = {encoder.name: dict(encoder.identity) for encoder in encoders}
    aside = items[0].folder / EMBEDS / f"{UNFINISHED}{rank}"
    for encoder in encoders:
        is_last = encoder is encoders[-1]
        encoder.load(device)
        warn_cut_captions(encoder, [(item.source, item.caption) for item in items])
        try:
            with (
                WriteBehind(threads) as writer,
                torch.no_grad(),
                Bar(len(items), f"Encoding with {encoder.name}", "caption", show_progress) as bar,
            ):
                for start in range(0, len(items), batch_size):
                    batch = items[start : start + batch_size]
                    for item, tensors in zip(batch, _encode(encoder, batch), strict=True):
                        if not is_last:
                            writer.submit(partial(save_pickled, _part(aside, item, encoder), tensors))
                            continue
                        for earlier in encoders[:-1]:
                            tensors |= load_pickled(_part(aside, item, earlier))
                        writer.submit(partial(write_texts, item, maker.architecture, identities, tensors))
                    bar.update(len(batch))
        finally:
            encoder.free()
    shutil.rmtree(aside, ignore_errors=True)


def _encode(encoder: TextEncoder, items: Sequence[PreparedItem]) -> list[dict[str, Tensor]]:
    encoded = encoder.encode([Prompt(item.caption) for item in items])
    return [_alone(conditions) for conditions in encoded]


def _alone(conditions: Conditions) -> dict[str, Tensor]:
    """Return one caption's tensors, on the CPU, each in memory of its own: a view would be stored whole."""
    found: Mapping[str, Tensor] = {
        key: value[0] if isinstance(value, list) else value for key, value in conditions.items()
    }
    return {key: tensor.detach().cpu().clone() for key, tensor in found.items()}


def _part(aside: Path, item: PreparedItem, encoder: TextEncoder) -> Path:
    return aside / f"{item.name}.{encoder.name}.pt"
