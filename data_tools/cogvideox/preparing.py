"""Prepare a dataset: captions, then clips, then the lists that name them; a rerun continues.

Every file is complete or missing. An item is skipped if all its files exist; lists are written last, by
the first of several processes, in the order of the input.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from checkpoints.containers import load_pickled
from data_tools.cogvideox import clips
from data_tools.cogvideox.clips import PrepareOptions, ShapeOptions
from data_tools.cogvideox.models import PipelineNetworks, describe_networks
from dataset.cache.records import difference
from dataset.caching.loop import Share, join_processes
from dataset.caching.prefetch import Failure, failure_error, write_behind
from dataset.forms.cogvideox_lists import EMBEDS
from dataset.sources.moments import PreparedFolder, read_prepared, write_prepared
from dataset.sources.remarks import warn_cut_captions
from modules.atomic_write import make_folder, remove_leftovers, write_text
from modules.bars import Bar
from modules.console import Row, format_count, show_box
from modules.devices import free_memory
from modules.errors import DatasetError, OptionError
from protocols.data import Conditions
from protocols.family import TextEncoder
from protocols.requests import Prompt

logger = logging.getLogger(__name__)


def prepare(options: PrepareOptions) -> None:
    """Prepare a dataset for CogVideoX trainers: encode missing files, and write the lists of all files.

    Each process encodes a share of the clips. Unreadable clips do not stop the run; they are reported at the
    end.

    Raises:
        DatasetError: If the data cannot be used or a clip failed.
        OptionError: If the folder was made with other settings.
        CheckpointError: If a model cannot be loaded.
        OutputError: If a file cannot be written.
        SystemExit: If a clip failed, in processes other than the main one.
    """
    # the networks that encode; None if only captions and clips are written
    if options.encoding.save_latents_and_embeddings:
        networks = describe_networks(options.encoding)
    else:
        if options.encoding.model_id is not None:
            logger.info(
                "--model_id %s is not loaded: without --save_latents_and_embeddings nothing is encoded",
                options.encoding.model_id,
            )
        networks = None
    options = dataclasses.replace(options, shape=round_frame_buckets(options.shape, networks))
    folder = options.output_dir
    items = clips.find_items(options.source, folder, options.shape.seed)
    make_folder(folder, "--output_dir")
    with join_processes(options.encoding.device) as process:
        is_main = process.rank == 0
        if is_main:
            _begin_folder(options, networks)
        # called only to make the others wait until the main process has checked the folder
        process.gather(None)
        # each process takes every n-th item
        missing_files = _find_missing_files(items[process.rank :: process.num_processes], options, networks)
        if is_main:
            _show_start(options, process, num_items=len(items), num_to_do=missing_files.num_items)
        process_failures = _prepare_items(options, networks, process, missing_files)
        gathered = process.gather((missing_files.num_items, process_failures))
    failures = [failure for _, failures in gathered for failure in failures]
    num_prepared = sum(num_items for num_items, _ in gathered) - len(failures)
    if is_main:
        _conclude(options, networks, items, num_prepared)
        if failures:
            raise failure_error(sorted(failures, key=lambda failure: str(failure.path)), "clips")
    elif failures:
        raise SystemExit(DatasetError.exit_code)


def _conclude(
    options: PrepareOptions,
    networks: PipelineNetworks | None,
    items: Sequence[clips.PreparedItem],
    num_prepared: int,
) -> None:
    """Write the lists of all items that are complete, and show the results; this run made `num_prepared`."""
    # items whose files all exist now, from this run or earlier ones
    complete = [item for item in items if _find_missing_files([item], options, networks).num_items == 0]
    for name, text in clips.make_list_contents([(item, item.read_info()) for item in complete]).items():
        write_text(options.output_dir / name, text)
    logger.info("%s in the lists of %s", format_count(len(complete), "item"), options.output_dir)
    rows: list[Row] = [
        ("items", f"{len(complete)}, {num_prepared} of them prepared by this run"),
        ("lists", f"prompts.txt, videos.txt, data.jsonl in {options.output_dir}"),
    ]
    show_box("Preparing is finished", rows)


def _begin_folder(options: PrepareOptions, networks: PipelineNetworks | None) -> None:
    """Record the settings of the output folder, remove unfinished files, and make the folders in it."""
    # all runs into a folder share its settings and encoders
    # the same types as when the record is read from JSON
    settings = dataclasses.asdict(options.shape)
    for option, value in settings.items():
        if isinstance(value, tuple):
            settings[option] = list(value)
    if networks is None:
        record = PreparedFolder(None, {}, settings)
    else:
        record = PreparedFolder(networks.architecture, networks.vae_identity, settings)
    earlier = read_prepared(options.output_dir)
    if earlier is not None:
        if networks is None and earlier.architecture is not None:
            # a run that encodes nothing keeps the record of the encoders
            record = dataclasses.replace(record, architecture=earlier.architecture, vae=earlier.vae)
        # the first setting, else encoder, that changed
        changed = difference(earlier.settings, record.settings)
        if changed is None and earlier.architecture is not None:
            changed = difference(_describe_encoders(earlier), _describe_encoders(record))
        if changed is not None:
            raise OptionError(
                f"--output_dir {options.output_dir} was begun with other settings: {changed}. Use the same "
                "ones to continue, or another folder."
            )
    write_prepared(options.output_dir, record)
    for name in clips.FOLDERS:
        folder = options.output_dir / name
        if folder.is_dir():
            remove_leftovers(folder, lambda _: True, older_seconds=0)
    for name in clips.FOLDERS:
        (options.output_dir / name).mkdir(exist_ok=True)


def _show_start(options: PrepareOptions, process: Share, num_items: int, num_to_do: int) -> None:
    """Print how many clips will be prepared, from where and to where, and how many are not done yet."""
    who = "clips" if process.num_processes == 1 else f"clips, process 1 of {process.num_processes}"
    where = f"{options.source.data_root} -> {options.output_dir}"
    counts = f"{format_count(num_items, 'clip')}, {num_to_do} of them to do"
    show_box("Preparing", [("data", where), (who, counts)])


@dataclass(frozen=True)
class _MissingFiles:
    """The items of one process that lack files."""

    without_texts: Sequence[clips.PreparedItem]
    without_media: Sequence[clips.PreparedItem]

    @property
    def num_items(self) -> int:
        """Number of clips that lack text or media files."""
        return len({item.name for item in [*self.without_texts, *self.without_media]})


def _find_missing_files(
    items: Sequence[clips.PreparedItem], options: PrepareOptions, networks: PipelineNetworks | None
) -> _MissingFiles:
    """Return the clips whose text or media files are missing."""
    saves_latents = networks is not None
    saves_images = options.encoding.save_image_latents
    without_texts = [item for item in items if not item.has_caption_files(saves_latents)]
    without_media = [item for item in items if not item.has_media_files(saves_latents, saves_images)]
    return _MissingFiles(without_texts, without_media)


def round_frame_buckets(shape: ShapeOptions, networks: PipelineNetworks | None) -> ShapeOptions:
    """Return the options with frame buckets rounded down, with a warning, to lengths that the VAE accepts.

    Raises:
        OptionError: If the VAE does not accept a height or width.
    """
    if networks is None:
        return shape
    step = networks.latent.pixel_step
    for name in ("height_buckets", "width_buckets"):
        invalid_sides = [str(side) for side in getattr(shape, name) if side % step]
        if invalid_sides:
            raise OptionError(f"--{name} {', '.join(invalid_sides)}: the model requires multiples of {step}")
    # the order is kept, and lengths that are equal after rounding appear once
    distinct = tuple(dict.fromkeys(shape.frame_buckets))
    rounded = tuple(dict.fromkeys(map(networks.round_down_frames, shape.frame_buckets)))
    if rounded != distinct:
        logger.warning(
            "--frame_buckets %s become %s, which the VAE accepts",
            " ".join(map(str, shape.frame_buckets)),
            " ".join(map(str, rounded)),
        )
    return dataclasses.replace(shape, frame_buckets=rounded)


def _describe_encoders(record: PreparedFolder) -> dict[str, Any]:
    """Return the model and VAE of a record; encoding runs that share a folder must have the same ones."""
    return {"architecture": record.architecture, **record.vae}


def _prepare_items(
    options: PrepareOptions, networks: PipelineNetworks | None, process: Share, missing: _MissingFiles
) -> list[Failure]:
    """Prepare the items of this process; networks are loaded only if there is something to encode."""
    device = process.device
    is_main = process.rank == 0
    if networks is None:
        # without embeddings
        items = missing.without_texts
        bar = Bar(len(items), "Writing captions", "caption", is_main)
        with write_behind(options.workers.num_artifact_workers) as write, bar:
            for item in items:
                write(partial(clips.write_caption_files, item, architecture="", identities={}, tensors={}))
                bar.update()
    elif missing.without_texts:
        _encode_captions(missing.without_texts, networks, device, options, show_progress=is_main)
    # after the captions, whose text encoders are freed by now
    encode = None if networks is None or not missing.without_media else networks.load_vae(device)
    failures = clips.prepare_clips(
        missing.without_media, encode, device, options=options, show_progress=is_main
    )
    if encode is not None:
        free_memory(device)
    return failures


def _encode_captions(
    items: Sequence[clips.PreparedItem],
    networks: PipelineNetworks,
    device: torch.device,
    options: PrepareOptions,
    show_progress: bool,
) -> None:
    """Encode the captions of `items`, one text encoder after the other, and write their files."""
    # The text of a caption is written last, when all encoders have added their embeddings to its file.
    identities = {encoder.name: dict(encoder.identity) for encoder in networks.text_encoders}
    batch_size = options.encoding.batch_size
    for encoder in networks.text_encoders:
        encoder.load(device)
        warn_cut_captions(encoder, [(item.source, item.caption) for item in items])
        try:
            with (
                write_behind(options.workers.num_artifact_workers) as write,
                torch.no_grad(),
                Bar(len(items), f"Encoding with {encoder.name}", "caption", show_progress) as bar,
            ):
                for start in range(0, len(items), batch_size):
                    batch = items[start : start + batch_size]
                    encoded = encoder.encode([Prompt(item.caption) for item in batch])
                    for item, conditions in zip(batch, encoded, strict=True):
                        write(partial(_add_embeddings, item, conditions, encoder, networks, identities))
                    bar.update(len(batch))
        finally:
            encoder.free()


def _add_embeddings(
    item: clips.PreparedItem,
    conditions: Conditions,
    encoder: TextEncoder,
    networks: PipelineNetworks,
    identities: Mapping[str, Mapping[str, str]],
) -> None:
    """Add one encoder's embeddings to a caption's file; after the last encoder, write the caption itself."""
    is_first = encoder is networks.text_encoders[0]
    is_last = encoder is networks.text_encoders[-1]
    tensors = {key: _copy_to_cpu(tensor) for key, tensor in conditions.items()}
    if not is_first:
        earlier_tensors = load_pickled(item.get_path(EMBEDS))
        # a copy, because the file that is read here is replaced
        tensors |= {key: tensor.clone() for key, tensor in earlier_tensors.items()}
    if is_last:
        clips.write_caption_files(item, networks.architecture, identities, tensors)
    else:
        # without its caption file, an item counts as unfinished and is encoded again
        item.get_path(clips.PROMPTS).unlink(missing_ok=True)
        clips.save_pickled(item.get_path(EMBEDS), tensors)


def _copy_to_cpu(tensor: Tensor | list[Tensor]) -> Tensor:
    """Copy a tensor, or a list's only tensor, to the CPU; a view would be saved with its whole base."""
    if isinstance(tensor, list):
        tensor = tensor[0]
    return tensor.detach().cpu().clone()
