"""Write smaller copies of the images of a folder."""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.folders import find_equal_stems, list_images
from dataset.caching.prefetch import Failure, failure_error
from modules.atomic_write import atomic_path, make_folder
from modules.bars import track
from modules.console import Row, format_count, show_box
from modules.errors import DatasetError, MediaError, OptionError
from modules.limits import MAX_SIDE
from modules.media.buckets import Fit, Size, fit_within
from modules.media.reading import Frame, is_single_image, read_image, resize_frame
from modules.media.writing import write_still
from modules.options import Options, option
from modules.text_files import real_path

logger = logging.getLogger(__name__)

DEFAULT_SIZES = "512x512,384x384,256x256,128x128"
METHODS = ("area", "cubic", "bicubic", "linear", "bilinear", "lanczos4", "lanczos", "box", "nearest")
_SIZE = re.compile(r"\s*(\d{1,6})[xX](\d{1,6})\s*")


class ResizeImagesOptions(Options, title="what to do"):
    """Options for reducing images to smaller sizes."""

    src_img_folder: Path = option(
        "folder of images", positional=True, place="folder", metavar="SRC_IMG_FOLDER"
    )
    dst_img_folder: Path = option(
        "folder to write to", positional=True, place="new folder", metavar="DST_IMG_FOLDER"
    )
    max_resolution: str = option(
        "sizes with commas. For each of them every image gets a copy of at most its area, in the image's own "
        "proportions; smaller images keep their size",
        default=DEFAULT_SIZES,
        metavar="WxH,WxH",
    )
    divisible_by: int = option("crop the sides to multiples of this", default=1, minimum=1, maximum=MAX_SIDE)
    interpolation: str = option("how images are made smaller", default="area", choices=METHODS)
    save_as_png: bool = option("write PNG, with transparency, and not JPEG")
    copy_associated_files: bool = option(
        "copy files with the name of an image, such as captions, under its new name"
    )

    def __post_init__(self) -> None:
        if not self.sizes:
            raise OptionError(f"--max_resolution is empty: use sizes such as {DEFAULT_SIZES}")
        for width, height in self.sizes:
            if width * height < self.divisible_by**2:
                raise OptionError(
                    f"--max_resolution {width}x{height} has no room for sides that are multiples of "
                    f"--divisible_by {self.divisible_by}"
                )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Return the (width, height) pairs in --max_resolution, without duplicates.

        Raises:
            OptionError: If one of them is not WIDTHxHEIGHT.
        """
        sizes = []
        for text in self.max_resolution.split(","):
            if not text.strip():
                continue  # a comma at the end
            match = _SIZE.fullmatch(text)
            size = (int(match[1]), int(match[2])) if match else (0, 0)
            if not 0 < min(size) <= max(size) <= MAX_SIDE:
                raise OptionError(
                    f"--max_resolution {text.strip()[:40]}: use width and height in pixels with an x "
                    f"between them, such as 512x512, up to {MAX_SIDE}"
                )
            sizes.append(size)
        return tuple(dict.fromkeys(sizes))


@dataclass
class _Counts:
    """Numbers of written and existing files, and the failures."""

    written: int = 0
    existing: int = 0  # copies that an earlier run has written
    companions: int = 0  # captions and similar files
    failures: list[Failure] = field(default_factory=list)


def resize_images(options: ResizeImagesOptions) -> None:
    """Write reduced copies of all images in a folder, one for each size; existing copies are kept.

    Raises:
        DatasetError: If the folder has no images; at the end, if images could not be read.
        OptionError: If the copies would be written among the images.
    """
    source = real_path(options.src_img_folder)
    target = real_path(options.dst_img_folder)
    if source == target:
        raise OptionError(
            f"{options.dst_img_folder} is the folder of the images, where the next run would make its copies "
            "smaller too. Pass another folder"
        )
    images = list_images(source)
    if not images:
        raise DatasetError(f"{options.src_img_folder} has no images. Subfolders are not searched")
    _reject_equal_stems(images)
    companions = _list_companions(source, images) if options.copy_associated_files else {}
    make_folder(target, "the folder to write to")
    counts = _Counts()
    for path in track(images, "Smaller images", len(images), unit="image"):
        if not is_single_image(path):
            counts.failures.append(
                Failure(path, reason=f"{path} is an animation, not an image", table=0, stem=path.stem)
            )
            continue
        try:
            _write_copies(path, target, options, counts)
        except MediaError as error:
            counts.failures.append(Failure(path, reason=str(error), table=0, stem=path.stem))
            continue
        counts.companions += _copy_companions(companions.get(path.stem, ()), target, options.sizes)
    _show_results(counts, options)
    if counts.failures:
        raise failure_error(counts.failures, format_count(len(images), "image"))


def _show_results(counts: _Counts, options: ResizeImagesOptions) -> None:
    """Show how many copies were written or existed before, and where they are."""
    existing_text = f"{counts.existing} existed before"
    if counts.existing:
        existing_text += "; delete them to make them again"
    rows: list[Row] = [
        ("written", f"{format_count(counts.written, 'image')}, {existing_text}"),
        ("folder", str(options.dst_img_folder)),
    ]
    if options.copy_associated_files:
        rows.insert(1, ("copied", format_count(counts.companions, "file")))
    show_box("Smaller images", rows)


def _reject_equal_stems(images: Sequence[Path]) -> None:
    """Raise DatasetError if copies of two images would have the same file name."""
    pair = find_equal_stems(images)
    if pair is not None:
        first, second = pair
        raise DatasetError(f"{first} and {second.name} would have copies of one name. Rename one of them")


def _name_copy(stem: str, size: Size, suffix: str) -> str:
    return f"{stem}+{size[0]}x{size[1]}{suffix}"


def _write_copies(path: Path, folder: Path, options: ResizeImagesOptions, counts: _Counts) -> None:
    """Write the resized copies of an image that do not exist yet."""
    suffix = ".png" if options.save_as_png else ".jpg"
    targets = {size: folder / _name_copy(path.stem, size, suffix) for size in options.sizes}
    missing = {size: target for size, target in targets.items() if not target.exists()}
    counts.existing += len(targets) - len(missing)
    if not missing:
        return
    image = read_image(path, alpha=options.save_as_png)
    for size, target in missing.items():
        write_still(target, _shrink(path, image, size, options))
        counts.written += 1


def _shrink(path: Path, image: Frame, size: Size, options: ResizeImagesOptions) -> Frame:
    """Reduce an image to the area of `size` if it is larger."""
    # Crop its sides to multiples of --divisible_by.
    step = options.divisible_by
    height, width = image.shape[:2]
    if min(height, width) < step:
        raise MediaError(f"{path} has {width}x{height} pixels: a side is shorter than --divisible_by {step}")
    fit: Fit = fit_within((width, height), size[0] * size[1], step)
    reduced = (
        image if fit.resized == (width, height) else resize_frame(image, fit.resized, options.interpolation)
    )
    # cut off what exceeds a multiple of the step
    left, top = fit.crop
    return reduced[top : top + fit.bucket[1], left : left + fit.bucket[0]].copy()


def _list_companions(folder: Path, images: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of a folder that are not images, such as captions, grouped by stem."""
    companions: dict[str, list[Path]] = {}
    for path in sorted(set(folder.iterdir()).difference(images)):
        if path.is_file():
            companions.setdefault(path.stem, []).append(path)
    return companions


def _copy_companions(companions: Sequence[Path], folder: Path, sizes: Sequence[Size]) -> int:
    """Copy an image's companion files under the names of its resized copies; return how many are new."""
    num_copied = 0
    for companion in companions:
        for size in sizes:
            target = folder / _name_copy(companion.stem, size, companion.suffix)
            if not target.exists():
                with atomic_path(target, companion.stat().st_size) as temporary:
                    shutil.copyfile(companion, temporary)
                num_copied += 1
    return num_copied
