"""Prepare a data set: captions, then clips, then the lists that name them; a rerun continues.

Every file is complete or missing. An item is skipped if all its files are there; lists are written last, by
the first of several processes, in the order of the input.
"""

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.cache.records import difference
from dataset.caching.loop import Share, join_processes
from dataset.caching.reports import Failure, failure_error
from dataset.cogvideox.captions import UNFINISHED, encode_captions, write_captions
from dataset.cogvideox.clips import prepare_clips
from dataset.cogvideox.items import FOLDERS, PreparedItem, list_texts, name_items
from dataset.cogvideox.options import PrepareOptions, ShapeOptions
from dataset.sources.cogvideox import CogData, missing_clips, read_rows
from dataset.sources.faults import Fault, raise_faults
from dataset.sources.prepared import PreparedFolder, read_prepared, write_prepared
from modules.atomic_write import make_folder, remove_leftovers, write_text
from modules.console import count_of, show_box
from modules.contract.family import MomentsMaker
from modules.devices import choose_device, free_memory
from modules.errors import DatasetError, OptionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareReport:
    """Results of a run. Counts are of items."""

    items: int  # in the lists that were written
    prepared: int  # by this run
    failures: tuple[Failure, ...]  # sources that could not be read
    is_main: bool = True  # whether this process reports for all


def prepare(options: PrepareOptions, maker: MomentsMaker | None) -> PrepareReport:
    """Prepare missing files, and write the lists.

    maker: None if only clips and captions are written. A clip that cannot be read becomes a failure of the
    report and does not stop the others. Raises DatasetError if the data cannot be used, OptionError if the
    folder was made with other settings, CheckpointError if a model cannot be loaded, OutputError if a file
    cannot be written.
    """
    folder = options.output_dir
    options = dataclasses.replace(options, shape=usable_shape(options.shape, maker))
    items = _find_items(options)
    make_folder(folder, "--output_dir")
    wants_latents, wants_images = maker is not None, options.encoding.save_image_latents
    with join_processes() as share:
        if share.is_main:
            _settle(options, maker)
            for name in FOLDERS:
                (folder / name).mkdir(exist_ok=True)
        share.gather(None)  # the others wait until the folder is known to fit
        mine = share.of(items)
        untexted = [item for item in mine if not item.has_texts(wants_latents)]
        unmade = [item for item in mine if not item.has_media(wants_latents, wants_images)]
        if share.is_main:
            _show_start(options, share, len(items), len({item.name for item in [*untexted, *unmade]}))
        failures = _prepare_share(options, maker, share, untexted, unmade)
        gathered = share.gather((len({item.name for item in [*untexted, *unmade]}), failures))
        reports = [failure for _, found in gathered for failure in found]
        listed = _write_lists(options, items, wants_latents) if share.is_main else 0
        prepared = sum(count for count, _ in gathered) - len(reports)
        return PrepareReport(
            listed, prepared, tuple(sorted(reports, key=lambda one: str(one.path))), share.is_main
        )


def conclude(report: PrepareReport, output_dir: Path) -> None:
    """Show the results.

    Raises DatasetError if a source failed; in processes other than the main one, SystemExit with its code.
    """
    if not report.is_main:
        if report.failures:
            raise SystemExit(DatasetError.exit_code)
        return
    rows = [
        ("items", f"{report.items}, {report.prepared} of them prepared by this run"),
        ("lists", f"prompts.txt, videos.txt, data.jsonl in {output_dir}"),
    ]
    show_box("Preparing is finished", rows)
    if report.failures:
        raise failure_error(report.failures, "clips")


def usable_shape(shape: ShapeOptions, maker: MomentsMaker | None) -> ShapeOptions:
    """Return frame buckets that the VAE takes, rounded down, with a warning.

    Raises OptionError if it does not take a height or width.
    """
    if maker is None:
        return shape
    step = maker.latent.pixel_step
    for option, sides in (
        ("--height_buckets", shape.height_buckets),
        ("--width_buckets", shape.width_buckets),
    ):
        wrong = [str(side) for side in sides if side % step]
        if wrong:
            raise OptionError(f"{option} {', '.join(wrong)}: the model takes multiples of {step}")
    rounded = tuple(dict.fromkeys(maker.usable_frames(frames) for frames in shape.frame_buckets))
    if rounded != tuple(dict.fromkeys(shape.frame_buckets)):
        logger.warning(
            "--frame_buckets %s become %s, which the VAE takes",
            " ".join(map(str, shape.frame_buckets)),
            " ".join(map(str, rounded)),
        )
    return dataclasses.replace(shape, frame_buckets=rounded)


def _find_items(options: PrepareOptions) -> list[PreparedItem]:
    """List the clips. Raises DatasetError with all that is wrong: every clip must be there."""
    given = options.source
    data = CogData(
        f"--data_root {given.data_root}",
        given.data_root,
        given.dataset_file,
        given.caption_column,
        given.video_column,
        (given.id_token or "").strip(),
    )
    faults: list[Fault] = []
    rows = list(read_rows(data, faults))
    raise_faults([*faults, *missing_clips(data, rows)])
    if not rows:
        raise DatasetError(f"{data.name} has no clips")
    return name_items(rows, given.data_root, options.output_dir, options.shape.seed)


def _settle(options: PrepareOptions, maker: MomentsMaker | None) -> None:
    """Write down how the folder is made. Raises OptionError if it was begun in another way."""
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
            changed = difference(_model_of(earlier), _model_of(now))
        if changed is not None:
            raise OptionError(
                f"--output_dir {options.output_dir} was begun with other settings: {changed}. Use the same "
                "ones to continue, or another folder."
            )
    write_prepared(options.output_dir, now)
    for name in FOLDERS:  # of runs that were killed; no other process has begun
        folder = options.output_dir / name
        if folder.is_dir():
            remove_leftovers(folder, lambda _: True, older_seconds=0)
            for aside in folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(aside, ignore_errors=True)


def _model_of(prepared: PreparedFolder) -> Mapping[str, Any]:
    return {"architecture": prepared.architecture, **prepared.vae}


def _show_start(options: PrepareOptions, share: Share, items: int, mine: int) -> None:
    who = "clips" if share.count == 1 else f"clips, process 1 of {share.count}"
    where = f"{options.source.data_root} -> {options.output_dir}"
    show_box("Preparing", [("data", where), (who, f"{items} clips, {mine} of them to do")])


def _prepare_share(
    options: PrepareOptions,
    maker: MomentsMaker | None,
    share: Share,
    untexted: list[PreparedItem],
    unmade: list[PreparedItem],
) -> list[Failure]:
    """Do this process's share; models are loaded only if there is work for them."""
    threads, batch_size = options.workers.num_artifact_workers, options.encoding.batch_size
    device = choose_device(share.device_name(options.encoding.device))
    if maker is None:
        write_captions(untexted, threads, share.is_main)
        return prepare_clips(unmade, None, device, options, share.is_main)
    encode_captions(untexted, maker, device, batch_size, threads, share.is_main, share.rank)
    if not unmade:
        return []
    failures = prepare_clips(unmade, maker.load(device), device, options, share.is_main)
    free_memory(device)
    return failures


def _write_lists(options: PrepareOptions, items: list[PreparedItem], latents: bool) -> int:
    """Write the lists of all items that are done; return how many they are."""
    images = options.encoding.save_image_latents
    done = [
        (item, item.read_facts())
        for item in items
        if item.has_texts(latents) and item.has_media(latents, images)
    ]
    for name, text in list_texts(done).items():
        write_text(options.output_dir / name, text)
    logger.info("%s in the lists of %s", count_of(len(done), "item"), options.output_dir)
    return len(done)
