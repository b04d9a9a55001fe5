"""Check that each image has its control image, and each control image its image."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from dataset.listing import find_sources
from dataset.sources.folders import ControlFolder
from dataset.sources.media_source import MediaSource
from dataset.table import DatasetConfig
from modules.console import format_count
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError
from modules.media.reading import image_size
from modules.option_values import format_shape

logger = logging.getLogger(__name__)

SHAPE_SLACK = 0.02  # relative difference of the aspect ratios that is allowed; rounding causes less
SHOWN = 3  # maximum number of file names in a message


def _log_warning(warning: str) -> None:
    """Log a warning with control codes (from file names) made visible."""
    logger.warning("%s", escape_control_codes(warning))


def check_pairs(config: DatasetConfig, network_name: str, warn: Callable[[str], None] = _log_warning) -> None:
    """Check the control images of all tables before anything is loaded.

    Tables whose images are not on this machine, because only caches were copied, are skipped.

    Args:
        config: The dataset file.
        network_name: Name of the network that sees the control images, for messages.
        warn: Called with each warning.

    Raises:
        DatasetError: If a table has no control images, an image has none, or a control image has no image.
    """
    by_folder: dict[Path, list[MediaSource]] = {}  # tables may share a folder of control images
    for table in config.datasets:
        folder = table.references.control_directory
        if folder is None:
            raise DatasetError(
                f"{table.name}: {network_name} learns from pairs of an image and its control image. Set "
                "conditioning_data_dir, a folder of control images with the names of the images"
            )
        if table.source.directory is None or table.source.directory.is_dir():
            by_folder.setdefault(folder, []).extend(find_sources(table))
    for folder, sources in by_folder.items():
        # every control image belongs to an image
        unmatched = ControlFolder(folder, {source.stem for source in sources}).unmatched
        if unmatched:
            names = ", ".join(path.name for path in unmatched[:SHOWN])
            more = " ..." if len(unmatched) > SHOWN else ""
            count = format_count(len(unmatched), "control image")
            raise DatasetError(
                f"{folder}: {count} without an image of the same name: "
                f"{names}{more}. Rename them, or move them away"
            )
        shape_warning = describe_shapes(folder, sources)
        if shape_warning:
            warn(shape_warning)


def describe_shapes(folder: Path, sources: Sequence[MediaSource]) -> str:
    """Return a warning about control images whose aspect ratio differs from their image's; otherwise ""."""
    mismatched = []
    for source in sources:
        width, height = image_size(source.path)
        control_width, control_height = image_size(source.control[0])
        relative_aspect_ratio = width * control_height / (height * control_width)
        if abs(relative_aspect_ratio - 1) > SHAPE_SLACK:
            sizes = f"{format_shape((control_width, control_height))} and {format_shape((width, height))}"
            mismatched.append(f"{source.control[0].name} ({sizes})")
    if not mismatched:
        return ""
    more = " ..." if len(mismatched) > SHOWN else ""
    return (
        f"{folder}: {format_count(len(mismatched), 'control image')} with a different aspect ratio than the "
        f"image, so their contents do not line up: {', '.join(mismatched[:SHOWN])}{more}"
    )
