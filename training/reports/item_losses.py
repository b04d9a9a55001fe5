"""Losses of each image and clip of a run: read them, compare the items, and show them on the page.

`OUTPUT_NAME-items.jsonl` has a line for each use of an item in training; other processes write
`OUTPUT_NAME-items-1.jsonl` and so on. A loss depends on the noise level more than on the item. So each loss
is compared with the mean of all items at its level:

    hardness of an item = sum of its losses / sum of the mean losses of all items at the same levels

Levels are compared in NUM_LEVEL_BINS equal ranges. 1 is usual, 2 is twice the loss of other items.
"""

import base64
import functools
import io
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image

from modules.atomic_write import replace_surrogates
from modules.limits import MAX_LINE_CHARACTERS
from modules.media.colors import Frame
from modules.pages.language import say, say_count
from modules.pages.page import reduce_frame
from modules.text_files import parse_json, read_text, require_regular_file
from training.reports.history import RunHistory
from training.reports.sections import PageSection, images_path, is_section_file, items_path

logger = logging.getLogger(__name__)

VERSION = 1
NUM_LEVEL_BINS = 10  # ranges of noise levels that are compared
MAX_BYTES = 256 << 20  # only this many bytes at the end of a file are read
MAX_HARD, MAX_EASY = 20, 5  # items on the page
SIDE = 96  # pixels of a small image
MAX_IMAGE = 64 << 10  # characters of one image
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}", re.ASCII)


class ItemDraw(NamedTuple):
    """Loss and noise level of one item in one training step."""

    step: int
    batch: int  # number of the micro-batch in the run
    key: str  # key of the item: the name of its cache
    level: float  # share of noise, 0..1
    loss: float


@dataclass(frozen=True)
class ItemLoss:
    """Losses of one item, compared with the losses of all items."""

    key: str
    draws: int
    mean: float  # mean of the item's losses
    hardness: float  # see the description of this module
    error: float | None  # standard error of the hardness; None if there is only one loss


@dataclass(frozen=True)
class ItemImage:
    """Name and JPEG thumbnail of an item."""

    name: str  # name of the item's file
    jpeg_base64: str  # JPEG in base64

    @classmethod
    def of(cls, name: str, frame: Frame) -> "ItemImage":
        """Make a JPEG thumbnail of a frame, at most SIDE pixels on each side."""
        file = io.BytesIO()
        Image.fromarray(reduce_frame(frame, SIDE)).save(file, format="JPEG", quality=80)
        return cls(replace_surrogates(name), base64.b64encode(file.getvalue()).decode())

    @property
    def tag(self) -> Markup:
        """HTML `<img>` element with the JPEG data embedded."""
        return Markup('<img src="data:image/jpeg;base64,{}" alt="{}">').format(self.jpeg_base64, self.name)


def _list_files(folder: Path, name: str) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if path.suffix == ".jsonl" and is_section_file(path.name, name))


def read_draws(folder: Path, name: str) -> list[ItemDraw]:
    """Return the recorded losses of a run from all its processes, without unreadable lines."""
    draws: dict[tuple[int, str], ItemDraw] = {}
    for path in _list_files(folder, name):
        try:
            session = _read_session(items_path(folder, name))
            draws |= {(draw.batch, draw.key): draw for draw in read_file_draws(path, session)}
        except OSError as error:
            logger.warning("%s cannot be read: %s", path, error.strerror or error)
    return sorted(draws.values())


def _read_session(path: Path) -> int | None:
    require_regular_file(path)
    with path.open("rb") as file:
        values = _parse(file.readline(MAX_LINE_CHARACTERS))
    return values.get("session")


def read_file_draws(path: Path, session: int | None) -> Iterator[ItemDraw]:
    """Yield the recorded draws of a file if it belongs to this run. Raises OSError if it cannot be read."""
    size = require_regular_file(path)
    if session is None or _read_session(path) != session:
        return
    with path.open("rb") as file:
        if size > MAX_BYTES:  # read the newest draws only
            file.seek(size - MAX_BYTES)
            file.readline(MAX_LINE_CHARACTERS)  # skip the rest of a line
        for line in iter(lambda: file.readline(MAX_LINE_CHARACTERS), b""):
            values = _parse(line)
            try:
                draw = ItemDraw(
                    int(values["step"]),
                    int(values["batch"]),
                    str(values["key"]),
                    float(values["level"]),
                    float(values["loss"]),
                )
            except (LookupError, TypeError, ValueError, OverflowError):
                continue
            if math.isfinite(draw.loss) and 0 <= draw.level <= 1:
                yield draw


def _parse(line: bytes) -> Mapping[str, Any]:
    """Parse a line as a JSON object; {} if it is incomplete or not an object."""
    if not line.endswith(b"\n"):
        return {}
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def compare_items(draws: Sequence[ItemDraw]) -> list[ItemLoss]:
    """Return the mean loss and hardness of each item of a run, hardest first."""
    bin_sums = [0.0] * NUM_LEVEL_BINS
    bin_counts = [0] * NUM_LEVEL_BINS
    draws_by_item: dict[str, list[ItemDraw]] = {}
    for draw in draws:
        bin_sums[_level_bin(draw.level)] += draw.loss
        bin_counts[_level_bin(draw.level)] += 1
        draws_by_item.setdefault(draw.key, []).append(draw)
    bin_means = [total / count if count else 0.0 for total, count in zip(bin_sums, bin_counts, strict=True)]
    items = [_compare_item(key, item_draws, bin_means) for key, item_draws in draws_by_item.items()]
    return sorted(items, key=lambda item: (-item.hardness, item.key))


def _level_bin(level: float) -> int:
    return min(int(level * NUM_LEVEL_BINS), NUM_LEVEL_BINS - 1)


def _compare_item(key: str, draws: Sequence[ItemDraw], bin_means: Sequence[float]) -> ItemLoss:
    """Compute the hardness of an item: its losses relative to all items' means at the same noise levels."""
    total = sum(draw.loss for draw in draws)
    expected = sum(bin_means[_level_bin(draw.level)] for draw in draws)
    hardness = total / expected if expected > 0 else 1.0
    error = None
    if len(draws) > 1 and expected > 0:
        # standard error of a ratio of sums: Cochran 1977, Sampling Techniques, section 2.11
        squares = sum((draw.loss - hardness * bin_means[_level_bin(draw.level)]) ** 2 for draw in draws)
        error = math.sqrt(squares * len(draws) / (len(draws) - 1)) / expected
    return ItemLoss(key, len(draws), total / len(draws), hardness, error)


def select_shown(items: Sequence[ItemLoss]) -> list[ItemLoss]:
    """Return the items for the page: the hardest, then the easiest, without duplicates."""
    hard = list(items[:MAX_HARD])
    return [*hard, *items[max(len(hard), len(items) - MAX_EASY) :]]


def read_images(folder: Path, name: str) -> dict[str, ItemImage]:
    """Return thumbnails of items by key, skipping malformed ones."""
    try:
        values = parse_json(read_text(images_path(folder, name)))
        images = {
            str(key): ItemImage(str(image["name"]), str(image["data"])) for key, image in values.items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {
        key: image
        for key, image in images.items()
        if len(image.jpeg_base64) <= MAX_IMAGE and _BASE64.fullmatch(image.jpeg_base64)
    }


def _make_table_row(item: ItemLoss, image: ItemImage | None) -> tuple[str | Markup, ...]:
    """Return the table cells of an item: thumbnail, name, hardness, number of draws, mean loss."""
    hardness = f"{item.hardness:.2f}" + ("" if item.error is None else f" ± {item.error:.2f}")
    return (
        "" if image is None else image.tag,
        item.key if image is None else image.name,
        hardness,
        f"{item.draws:,}",
        f"{item.mean:.4g}",
    )


@functools.lru_cache(maxsize=16)
def _compare_files(
    folder: Path, name: str, file_versions: tuple[tuple[str, int, int], ...]
) -> list[ItemLoss]:
    """Return the items of a run with their losses. `file_versions` is the cache key."""
    # It contains the name, size and modification time of each file.
    return compare_items(read_draws(folder, name))


def make_section(folder: Path, name: str, run_history: RunHistory) -> PageSection | None:
    """Return the page section about the losses of items; None if none were recorded.

    Args:
        folder: Folder of the history.
        name: Name of the run.
        run_history: Content of the run's history.
    """
    # name, size and time of each file: while these stay equal, the comparison comes from a cache
    file_versions = []
    for path in _list_files(folder, name):
        status = path.stat()
        file_versions.append((path.name, status.st_size, status.st_mtime_ns))
    items = _compare_files(folder, name, tuple(file_versions)) if file_versions else []
    if not items:
        return None
    images = read_images(folder, name)
    rows = [_make_table_row(item, images.get(item.key)) for item in select_shown(items)]
    notes = [
        say(
            "Hardness is the sum of an item's losses, divided by the sum of the mean losses of all items at "
            "the same noise levels: 1 is usual, 2 is twice the loss of others."
        ),
        say(
            "Look at the first items: they often include a wrong caption, or a broken or unusual image. "
            "The last ones may be too simple, or duplicates."
        ),
        say_count(
            len(items),
            "%(n)s image or clip was learned; the %(hard)s hardest and the %(easy)s easiest are shown.",
            "%(n)s images and clips were learned; the %(hard)s hardest and the %(easy)s easiest are shown.",
            hard=min(MAX_HARD, len(items)),
            # `select_shown` takes the hardest ones first
            easy=len(rows) - min(MAX_HARD, len(items)),
        ),
    ]
    return PageSection(
        key="items",
        title=say("Loss of each image"),
        notes=notes,
        headings=(say("image"), say("name"), say("hardness"), say("times learned"), say("mean loss")),
        rows=rows,
    )
