"""Reference images: control images of a family that takes several of them in different sizes."""

import contextlib
import filecmp
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset.sources.fetching import fetch
from dataset.sources.media_source import Fault, MediaSource
from dataset.table import DatasetTable
from modules.errors import DatasetError, MediaError
from modules.media.augmenting import mirror
from modules.media.buckets import (
    Fit,
    Size,
    bucket_sizes,
    fit_cover,
    fit_to_area,
    fit_within,
    select_bucket,
)
from modules.media.reading import Frame, add_alpha, fit_frame, image_size, read_image

logger = logging.getLogger(__name__)

_bucket_sizes = functools.cache(bucket_sizes)


def lack_references(tables: Sequence[DatasetTable], sources: Iterable[MediaSource]) -> bool:
    """Return whether a model that learns image edits has images without any reference image.

    Only tables with `learns_edits` count: other models are often trained on captions alone.
    """
    editing = {table.index for table in tables if table.learns_edits}
    images = [source for source in sources if source.table.index in editing]
    return bool(images) and not any(source.control for source in images)


def find_equal_references(sources: Iterable[MediaSource]) -> list[Fault]:
    """Return a warning for each image whose reference image is the image itself or a copy of it."""
    kind = "have a reference image that is equal to the image: an edit that changes nothing is learned"
    return [
        Fault(kind, str(source.path), source.stem)
        for source in sources
        if not source.remote_or_packed and source.table.references.rules is not None and _is_equal(source)
    ]


def _is_equal(source: MediaSource) -> bool:
    """Return whether one of an image's reference images has the same bytes as the image."""
    with contextlib.suppress(OSError):  # errors are reported when the file is read
        size_bytes = source.path.stat().st_size
        for path in source.control:
            if path.stat().st_size == size_bytes and filecmp.cmp(path, source.path, shallow=False):
                return True
    return False


def limit_references(table: DatasetTable, sources: list[MediaSource]) -> list[MediaSource]:
    """Limit the reference images of each item to the number that the model accepts.

    Logs a warning about items with more, and about items without any if other items have some.
    """
    assert table.references.rules is not None
    if not any(source.control for source in sources):  # none has references: nothing to limit or to miss
        return sources
    maximum = table.references.rules.max_references
    num_sources = len(sources)
    with_surplus = [source for source in sources if len(source.control) > maximum]
    if with_surplus:
        logger.warning(
            "%s: %d of %d images have more reference images than the %d that this model takes; the others "
            "are left out. The first: %s has %d",
            table.name,
            len(with_surplus),
            num_sources,
            maximum,
            with_surplus[0].path,
            len(with_surplus[0].control),
        )
        sources = [_without_surplus(source, maximum) for source in sources]
    without_any = [source for source in sources if not source.control]
    if without_any:
        logger.warning(
            "%s: %d of %d images have no reference image and are trained without one, such as %s. If that is "
            "not intended, add it, or move the image to a table of its own",
            table.name,
            len(without_any),
            num_sources,
            without_any[0].path,
        )
    return sources


def _without_surplus(source: MediaSource, maximum: int) -> MediaSource:
    """Return a copy of a source with only its first `maximum` reference images."""
    if len(source.control) <= maximum:
        return source
    # the image's origin comes first; those of its control images follow
    controls_end = 1 + len(source.control)
    remote_or_packed = source.remote_or_packed[: 1 + maximum] + source.remote_or_packed[controls_end:]
    return replace(source, control=source.control[:maximum], remote_or_packed=remote_or_packed)


def read_reference(
    path: Path,
    source: MediaSource,
    bucket: Size,
    fit_image: Callable[[Frame], Frame],
    is_mirrored: bool,
    has_alpha: bool = False,
) -> NDArray[np.uint8]:
    """Read the reference image of an image, 1 H W 3, or 1 H W 4 with `has_alpha`.

    Args:
        path: The reference.
        source: The image.
        bucket: Size of the image's bucket.
        fit_image: Resizes, crops and mirrors a reference like the image.
        is_mirrored: Whether the image was mirrored; then a reference with a size of its own is mirrored, too.
        has_alpha: Whether the result has alpha as a fourth channel.

    Raises:
        MediaError: If the reference cannot be used.
    """
    try:
        image = read_image(path, has_alpha)
        size = image.shape[1], image.shape[0]
        fit = fit_reference(source.table, size, path, bucket, count=len(source.control))
    except MediaError as error:
        raise explain_reference(source, error) from error
    if fit is None:  # it has no size of its own
        fitted = fit_image(image)
    else:
        fitted = fit_frame(image, fit)
        if is_mirrored:
            fitted = mirror(fitted)
    return (add_alpha(fitted) if has_alpha else fitted)[None]


@contextlib.contextmanager
def hold_references(source: MediaSource) -> Iterator[tuple[Path, ...]]:
    """Yield local files of an item's reference images, which exist until the block ends.

    Raises:
        MediaError: If a reference is missing, or too small according to its header.
    """
    with fetch(source) as local:
        for path in local.control:
            fit_reference(source.table, image_size(path), path)
        yield local.control


def reference_buckets(source: MediaSource, bucket: Size) -> tuple[Size, ...]:
    """Return the sizes to which an image's references are resized, according to their headers.

    `bucket` is the bucket of the image.

    Returns:
        The sizes; () if the files are not on disk.

    Raises:
        MediaError: If a reference cannot be used.
    """
    if source.remote_or_packed:
        return ()
    try:
        count = len(source.control)
        fits = [
            fit_reference(source.table, image_size(path), path, bucket, count=count)
            for path in source.control
        ]
    except MediaError as error:
        raise explain_reference(source, error) from error
    return tuple(bucket if fit is None else fit.bucket for fit in fits)


def explain_reference(source: MediaSource, error: Exception) -> MediaError:
    """Return the error for a reference image that cannot be used."""
    text = f"a reference image of {source.path.name} cannot be used: {error}"
    return MediaError(f"{text.rstrip('.')}. Replace it, or remove it")


def fit_reference(
    table: DatasetTable, size: Size, path: Path, bucket: Size | None = None, count: int = 1
) -> Fit | None:
    """Return how a reference of this size is resized and cropped; None if it is treated like its image.

    1. With no_resize_control, a reference of at most control_resolution keeps its size, and is only cropped
       to a multiple of the step, on the right and at the bottom, as in caches of other trainers.
    2. Without control_resolution, the rules of the model decide.
    3. Otherwise it gets a bucket of control_resolution.

    `bucket` is the bucket of the image, or None if it is unknown yet. `count` is the number of references
    of the image.

    Raises:
        MediaError: If the reference is too small.
        DatasetError: If control_resolution is too small.
    """
    rules = table.references.rules
    assert rules is not None
    width, height = size
    step = rules.step
    resolution = table.references.control_resolution
    if min(size) < step:
        raise MediaError(f"{path} has {width}x{height} pixels, each side needs at least {step}")
    is_small = resolution is None or width * height <= resolution[0] * resolution[1]
    if table.references.no_resize_control and is_small:
        cropped = (width // step * step, height // step * step)
        return Fit(size, (0, 0), cropped, "none")
    if resolution is None:
        # the model's rules, which keep the aspect ratio
        side = None if bucket is None else rules.find_side(count, bucket)
        if side is not None:
            return fit_to_area(size, side, step)
        if not rules.keeps_aspect_ratio or bucket is None:
            return None
        area = bucket[0] * bucket[1] if rules.max_area is None else rules.max_area
        return fit_within(size, area, rules.step)
    try:
        sizes = _bucket_sizes(*resolution, step)
    except ValueError as error:
        raise DatasetError(f"{table.name}: control_resolution: {error}. Enlarge it.") from None
    chosen = select_bucket(size, sizes, resolution[0] * resolution[1], step, no_upscale=False)
    return fit_cover(size, chosen)
