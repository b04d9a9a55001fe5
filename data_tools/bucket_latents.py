"""Cache the latents of the images of a metadata file, and write the sizes of their buckets into the file.

The caches are npz files next to the images, which --cache_latents_to_disk of the scripts of Stable Diffusion
1.x and 2.x reads. The caching loop makes them.
"""

import logging
from dataclasses import replace
from pathlib import Path

from data_tools.metadata import check_name, read_metadata, write_metadata
from dataset.caching.loop import cache_media
from dataset.caching.prefetch import conclude
from dataset.config import DatasetConfig, for_family
from dataset.forms.metadata_listing import SIZE_KEY, find_image
from dataset.options import MAX_AT_ONCE, CachingOptions
from dataset.sources.frames import find_bucket
from dataset.subset_options import MAX_SIDE, SubsetOptions
from dataset.subsets import folders_config
from modules.console import format_count
from modules.errors import MediaError
from modules.media.reading import image_size
from modules.options import Options, not_needed, option
from protocols.families import FAMILIES

logger = logging.getLogger(__name__)
_FAMILY = FAMILIES["sd1"]


class BucketLatentOptions(Options, title="what to do"):
    """Options of finetune/prepare_buckets_latents.py."""

    train_data_dir: Path = option("folder of the images", positional=True, place="folder")
    in_json: Path = option("metadata file that names the images", positional=True, place="file")
    out_json: Path = option("metadata file to write; it may be the same one", positional=True)
    model_name_or_path: Path = option(
        "checkpoint of Stable Diffusion 1.x or 2.x, a file or a folder in the layout of diffusers",
        positional=True,
        place="there",
    )
    batch_size: int = option("images to encode at once", default=1, minimum=1, maximum=MAX_AT_ONCE)
    max_resolution: str = option("size in pixels: 512, or WIDTH,HEIGHT", default="512,512")
    min_bucket_reso: int = option(
        "shortest side of a bucket, pixels", default=256, minimum=1, maximum=MAX_SIDE
    )
    max_bucket_reso: int = option(
        "longest side of a bucket, pixels", default=1024, minimum=1, maximum=MAX_SIDE
    )
    bucket_reso_steps: int = option("sides are multiples of this", default=64, minimum=1)
    bucket_no_upscale: bool = option("create buckets that do not enlarge images")
    flip_aug: bool = option("also store the latents of the flipped images")
    alpha_mask: bool = option("also store which parts of images are transparent, which are not learned")
    skip_existing: bool = option("also keep files made by other programs if their size is right")
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")
    full_path = not_needed("keys of the metadata file may be whole paths or names in the folder")
    recursive = not_needed("the images are those that the metadata file names")
    max_data_loader_n_workers = not_needed("files are always read ahead", nargs="?")
    mixed_precision = not_needed("the VAE computes in float32", type=str)
    v2 = not_needed("it is read from the file")

    def __post_init__(self) -> None:
        check_name(self.out_json)


def prepare_bucket_latents(options: BucketLatentOptions) -> None:
    """Cache the latents of the images in a metadata file, and write the file with their bucket sizes.

    Raises:
        UserError: If the file or the checkpoint cannot be used, or if an image failed; entries of the other
            images are written.
    """
    entry_by_key = read_metadata(options.in_json)
    options_class = _FAMILY.options_record("LatentCaching")
    family = _FAMILY.make_family(
        "latent_caching", options_class.from_defaults(ckpt=options.model_name_or_path)
    )
    config = for_family(_make_dataset(options), family)
    # `_make_dataset` writes one table
    (table,) = config.datasets
    caching = CachingOptions.from_defaults(
        dataset_config=options.in_json,
        batch_size=options.batch_size,
        device=options.device,
        skip_existing=options.skip_existing,
        keep_cache=True,  # the folder may have caches of other metadata files
    )
    report = cache_media(family, config, caching)
    # the bucket (width, height) of each readable image; unreadable ones are reported by caching
    paths_by_folder: dict[Path, dict[str, Path]] = {}  # filled by `find_image`, which lists each folder once
    buckets = {}
    for key in entry_by_key:
        image = find_image(key, options.train_data_dir, paths_by_folder)
        try:
            size = image_size(image)
        except MediaError:
            continue
        buckets[key] = find_bucket(table, size, family.latent.pixel_step, image)
    entries_with_size = {}
    for key, entry in entry_by_key.items():
        entries_with_size[key] = {**entry, SIZE_KEY: list(buckets[key])} if key in buckets else dict(entry)
    write_metadata(options.out_json, entries_with_size)
    logger.info("wrote %s: %s of %s", options.out_json, SIZE_KEY, format_count(len(buckets), "image"))
    conclude(report)


def _make_dataset(options: BucketLatentOptions) -> DatasetConfig:
    """Return the dataset of a metadata file, with caches in npz files next to the images."""
    subset = SubsetOptions.from_defaults(
        train_data_dir=options.train_data_dir,
        in_json=options.in_json,
        resolution=options.max_resolution,
        enable_bucket=True,
        min_bucket_reso=options.min_bucket_reso,
        max_bucket_reso=options.max_bucket_reso,
        bucket_reso_steps=options.bucket_reso_steps,
        bucket_no_upscale=options.bucket_no_upscale,
        flip_aug=options.flip_aug,
        alpha_mask=options.alpha_mask,
    )
    config = folders_config(subset)
    tables = [
        replace(table, cache_format="npz", cache_directory=table.source.base_folder)
        for table in config.datasets
    ]
    return replace(config, datasets=tuple(tables))
