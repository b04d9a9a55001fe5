"""Prepare a data set: captions, then clips, then the lists that name them; a rerun continues.

Every file is complete or missing. An item is skipped if all its files are there; lists are written last, by
the first of several processes, in the order of the input.
"""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from data_tools.cogvideox import clips
from data_tools.cogvideox.models import PipelineNetworks, find_maker
from data_tools.cogvideox.options import PrepareOptions, ShapeOptions
from dataset.cache.records import difference
from dataset.caching.loop import Share, join_processes
from dataset.caching.prefetch import Failure, failure_error, write_behind
from dataset.caching.texts import warn_cut_captions
from dataset.sources.cogvideox import PreparedFolder, read_prepared, write_prepared
from dataset.sources.media_source import EMBEDS
from modules.atomic_write import make_folder, remove_leftovers, write_text
from modules.bars import Bar
from modules.checkpoints.containers import load_pickled
from modules.console import count_of, show_box
from modules.contract.data import Conditions
from modules.contract.requests import Prompt
from modules.devices import free_memory
from modules.errors import DatasetError, OptionError

logger = logging.getLogger(__name__)


def prepare(options: PrepareOptions) -> None:
    """Prepare missing files, write the lists, and show the results.

    A clip that cannot be read does not stop the others; it is reported at the end. Raises DatasetError if the
    data cannot be used or a clip failed, OptionError if the folder was made with other settings,
    CheckpointError if a model cannot be loaded, OutputError if a file cannot be written; in processes other
    than the main one, SystemExit if a clip failed.
    """
    encoding, folder = options.encoding, options.output_dir
    maker = find_maker(encoding) if encoding.save_latents_and_embeddings else None
    if maker is None and encoding.model_id is not None:
        logger.info(
            "--model_id %s is not loaded: without --save_latents_and_embeddings nothing is encoded",
            encoding.model_id,
        )
    options = dataclasses.replace(options, shape=usable_shape(options.shape, maker))
    items = clips.find_items(options.source, folder, options.shape.seed)
    make_folder(folder, "--output_dir")
    wants_latents, wants_images = maker is not None, encoding.save_image_latents
    with join_processes(encoding.device) as share:
        is_main = share.rank == 0
        if is_main:
            _settle(options, maker)
            for name in clips.FOLDERS:
                (folder / name).mkdir(exist_ok=True)
        share.gather(None)  # the others wait until the folder is known to fit
        mine = items[share.rank :: share.count]
        untexted = [item for item in mine if not item.has_texts(wants_latents)]
        unmade = [item for item in mine if not item.has_media(wants_latents, wants_images)]
        to_do = len({item.name for item in [*untexted, *unmade]})
        if is_main:
            who = "clips" if share.count == 1 else f"clips, process 1 of {share.count}"
            where = f"{options.source.data_root} -> {folder}"
            show_box(
                "Preparing",
                [("data", where), (who, f"{count_of(len(items), 'clip')}, {to_do} of them to do")],
            )
        gathered = share.gather((to_do, _prepare_share(options, maker, share, untexted, unmade)))
        failures = [failure for _, found in gathered for failure in found]
        if not is_main:
            if failures:
                raise SystemExit(DatasetError.exit_code)
            return
        done = [item for item in items if item.has_texts(wants_latents)]
        done = [item for item in done if item.has_media(wants_latents, wants_images)]
        for name, text in clips.list_texts([(item, item.read_facts()) for item in done]).items():
            write_text(folder / name, text)
        logger.info("%s in the lists of %s", count_of(len(done), "item"), folder)
    prepared = sum(count for count, _ in gathered) - len(failures)
    rows = [
        ("items", f"{len(done)}, {prepared} of them prepared by this run"),
        ("lists", f"prompts.txt, videos.txt, data.jsonl in {folder}"),
    ]
    show_box("Preparing is finished", rows)
    if failures:
        raise failure_error(sorted(failures, key=lambda one: str(one.path)), "clips")


def usable_shape(shape: ShapeOptions, maker: PipelineNetworks | None) -> ShapeOptions:
    """Return the options with frame buckets rounded down, with a warning, to numbers that the VAE takes.

    Raises OptionError if it does not take a height or width.
    """
    if maker is None:
        return shape
    step = maker.latent.pixel_step
    for name in ("height_buckets", "width_buckets"):
        wrong = [str(side) for side in getattr(shape, name) if side % step]
        if wrong:
            raise OptionError(f"--{name} {', '.join(wrong)}: the model takes multiples of {step}")
    rounded = tuple(dict.fromkeys(maker.usable_frames(frames) for frames in shape.frame_buckets))
    if rounded != tuple(dict.fromkeys(shape.frame_buckets)):
        logger.warning(
            "--frame_buckets %s become %s, which the VAE takes",
            " ".join(map(str, shape.frame_buckets)),
            " ".join(map(str, rounded)),
        )
    return dataclasses.replace(shape, frame_buckets=rounded)


def _settle(options: PrepareOptions, maker: PipelineNetworks | None) -> None:
    """Record the settings of the folder. Raises OptionError if it was begun with others."""
    settings: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options.shape).items()
    }
    earlier = read_prepared(options.output_dir)
    now = PreparedFolder(None, {}, settings)
    if maker is not None:
        now = PreparedFolder(maker.architecture, maker.identity, settings)
    if earlier is not None:
        changed = difference(earlier.settings, now.settings)
        if changed is None and earlier.architecture is not None:
            if maker is None:
                now = dataclasses.replace(now, architecture=earlier.architecture, vae=earlier.vae)
            models = ({"architecture": one.architecture, **one.vae} for one in (earlier, now))
            changed = difference(*models)
        if changed is not None:
            raise OptionError(
                f"--output_dir {options.output_dir} was begun with other settings: {changed}. Use the same "
                "ones to continue, or another folder."
            )
    write_prepared(options.output_dir, now)
    for name in clips.FOLDERS:  # left by killed runs; no other process has begun
        if (options.output_dir / name).is_dir():
            remove_leftovers(options.output_dir / name, lambda _: True, older_seconds=0)


def _prepare_share(
    options: PrepareOptions,
    maker: PipelineNetworks | None,
    share: Share,
    untexted: Sequence[clips.PreparedItem],
    unmade: Sequence[clips.PreparedItem],
) -> list[Failure]:
    """Process this process's share of the items; models are loaded only if needed."""
    device, is_main = share.device, share.rank == 0
    threads = options.workers.num_artifact_workers
    if maker is None:
        bar = Bar(len(untexted), "Writing captions", "caption", is_main)
        with write_behind(threads) as write, bar:
            for item in untexted:
                write(partial(clips.write_texts, item, "", {}, {}))
                bar.update()
    elif untexted:
        _encode_captions(untexted, maker, device, options.encoding.batch_size, threads, is_main)
    encode = None if maker is None or not unmade else maker.load(device)
    failures = clips.prepare_clips(unmade, encode, device, options, is_main)
    if encode is not None:
        free_memory(device)
    return failures


def _encode_captions(
    items: Sequence[clips.PreparedItem],
    maker: PipelineNetworks,
    device: torch.device,
    batch_size: int,
    threads: int,
    show_progress: bool,
) -> None:
    """Encode the captions of `items`, one text encoder after the other, and write their files.

    Captions are written last, when all encoders have added to the file. Raises CheckpointError if an encoder
    cannot be loaded.
    """
    identities = {encoder.name: dict(encoder.identity) for encoder in maker.text_encoders}
    for number, encoder in enumerate(maker.text_encoders, 1):

        def write(item: clips.PreparedItem, conditions: Conditions, number: int = number) -> None:
            # cloned: a view would be stored with its whole base
            alone = {key: one[0] if isinstance(one, list) else one for key, one in conditions.items()}
            tensors = {key: tensor.detach().cpu().clone() for key, tensor in alone.items()}
            if number > 1:
                earlier = load_pickled(item.file(EMBEDS))
                tensors |= {key: tensor.clone() for key, tensor in earlier.items()}
            if number == len(maker.text_encoders):
                clips.write_texts(item, maker.architecture, identities, tensors)
            else:
                item.file(clips.PROMPTS).unlink(missing_ok=True)
                clips.save_pickled(item.file(EMBEDS), tensors)

        encoder.load(device)
        warn_cut_captions(encoder, [(item.source, item.caption) for item in items])
        try:
            with (
                write_behind(threads) as behind,
                torch.no_grad(),
                Bar(len(items), f"Encoding with {encoder.name}", "caption", show_progress) as bar,
            ):
                for start in range(0, len(items), batch_size):
                    batch = items[start : start + batch_size]
                    encoded = encoder.encode([Prompt(item.caption) for item in batch])
                    for item, conditions in zip(batch, encoded, strict=True):
                        behind(partial(write, item, conditions))
                    bar.update(len(batch))
        finally:
            encoder.free()
