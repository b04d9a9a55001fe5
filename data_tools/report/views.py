"""Show the frames that the model will see, as images, clips or colored text, without encoding them."""

import contextlib
import logging
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from data_tools.report.looks import select_evenly
from dataset.batches.order import changed_caption
from dataset.caching.prefetch import CacheReport, Failure, read_ahead
from dataset.config import DatasetConfig, DatasetTable
from dataset.listing import find_sources
from dataset.options import COLORS, DebugOptions
from dataset.sources.decoding import DecodedMedia, decode_source
from dataset.sources.media_source import MediaSource
from modules.bars import Bar
from modules.media.reading import Frame, resize_frame
from modules.media.writing import write_png, write_video
from modules.screen import has_display
from modules.seeds import derive_seed
from protocols.data import LatentSpec
from protocols.family import Described

logger = logging.getLogger(__name__)

SHEET_FRAMES = 8  # frames of a clip in one image
WINDOW_WIDTH = 1600  # pixels
CONSOLE_FRAMES = 4
SHADES = " .:-=+*#%@"  # dark to light, for text on a background

NEXT, NEXT_DATASET, QUIT = "next", "next dataset", "quit"  # the user's answers to a shown item
WINDOW = "window"  # another way of showing, besides the values of --debug_mode


def show_datasets(family: Described, config: DatasetConfig, debug: DebugOptions, workers: int) -> CacheReport:
    """Display all items of a dataset as --debug_mode selects; return unreadable and unused media files."""
    folder = config.path.absolute().parent / "debug_views"
    display = _select_display(debug, folder)
    viewer = _Viewer(family.latent, family.defaults.fps, folder, display, debug)
    for table in config.datasets:
        logger.info("%s", table.name)
        if viewer.show_table(table, workers) == QUIT:
            break
    return CacheReport(failures=tuple(viewer.failures), dropped=tuple(viewer.dropped))


@dataclass(frozen=True)
class _Viewer:
    """Displays the items of tables, and collects sources that are unreadable or yield no item."""

    latent: LatentSpec
    fps: float
    folder: Path  # for written images and clips
    display: str  # a value of --debug_mode, or WINDOW
    debug: DebugOptions
    failures: list[Failure] = field(default_factory=list)  # sources that cannot be read
    dropped: list[Failure] = field(default_factory=list)  # readable sources without items

    def show_table(self, table: DatasetTable, workers: int) -> str:
        """Display the items of a table, until the user stops or the console's limit is reached.

        Returns the user's last answer; NEXT also at the end of the table.
        """
        # only the console limits the number of items
        num_left = self.debug.console_num_images if self.display == "console" else None
        sources = find_sources(table)
        decoding = read_ahead(
            sources,
            get_source=lambda source: source,
            work=self._decode,
            workers=workers,
            bar=Bar(len(sources), "Decoding", "source", shown=False),
            decodes=True,
        )
        with contextlib.closing(decoding) as decoded:
            for source, result in decoded:
                if isinstance(result, Failure):
                    self.failures.append(result)
                    continue
                if result.reason is not None:  # why the source gives no item
                    self.dropped.append(Failure.of(source, result.reason))
                answer = self._show_items(result, num_left)
                if answer != NEXT:
                    return answer
                if num_left is not None:
                    num_left -= len(result.spans)
                    if num_left <= 0:
                        break
        return NEXT

    def _decode(self, source: MediaSource) -> DecodedMedia:
        """Decode a media file as caching does; an image with random changes gets one fixed variant."""
        return decode_source(
            source,
            self.fps,
            self.latent.pixel_step,
            self.latent.lengths,
            rng=_make_rng(source),
            keeps_alpha=self.latent.keeps_alpha,
            has_alpha=self.latent.has_alpha,
        )

    def _show_items(self, media: DecodedMedia, maximum: int | None) -> str:
        """Show at most `maximum` training items of a media file; return the user's last answer."""
        # Any answer other than NEXT ends the loop.
        for span in media.spans[:maximum]:
            width, height = media.bucket
            size = f"{media.size[0]}x{media.size[1]}"
            frames_text = f"{span[1]} frames of " if media.source.table.kind == "video" else ""
            # as one training step might use it, after its random changes
            caption_text = changed_caption(
                media.source.caption or "",
                media.source.table,
                step=1,
                total_steps=1,
                generator=_make_rng(media.source),
            )
            caption = caption_text or "(no caption)"
            logger.info("%s, %s%dx%d from %s: %s", media.key(span), frames_text, width, height, size, caption)
            file = self.folder / f"{media.source.table.index}_{media.key(span)}"
            frames = side_by_side(media.cut(span))
            answer = _show(self.display, file, frames, fps=self.fps, debug=self.debug)
            if answer != NEXT:
                return answer
        return NEXT


def _select_display(debug: DebugOptions, folder: Path) -> str:
    """Return how items are displayed: a value of --debug_mode, or WINDOW if a window can be opened."""
    if debug.debug_mode == "video":
        logger.info("writing clips to %s", folder)
    if debug.debug_mode != "image":
        return str(debug.debug_mode)
    reason = "this machine has no display"
    try:
        # without a display OpenCV would abort the program; its headless build raises an error
        if not sys.platform.startswith("linux") or has_display():
            cv2.namedWindow("dataset")
            logger.info("keys in the window: d for the next dataset, q to quit, any other for the next item")
            return WINDOW
    except cv2.error:
        reason = (
            "opencv-python-headless cannot open any. To get one: pip uninstall opencv-python-headless, then "
            "pip install opencv-python"
        )
    logger.info("images cannot be shown in a window (%s); writing them to %s", reason, folder)
    return "image"


def _show(display: str, file: Path, frames: NDArray[np.uint8], fps: float, debug: DebugOptions) -> str:
    """Show frames, F H W 3, of an item in the chosen way; return what the user wants to see next."""
    # `file` is the path to write, without suffix. Only a window waits for a key: otherwise the result is
    # NEXT.
    if display == "console":
        image = sheet(frames, CONSOLE_FRAMES)
        sys.stdout.write(colored_text(image, debug.console_width, debug.console_back))
        sys.stdout.flush()
    elif display == "video" and len(frames) > 1:
        write_video(file.with_name(f"{file.name}.mp4"), frames, fps)
    elif display == WINDOW:
        image = sheet(frames)
        scale = min(1.0, WINDOW_WIDTH / image.shape[1])
        if scale < 1:
            image = np.asarray(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
        cv2.imshow("dataset", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        return {ord("d"): NEXT_DATASET, ord("q"): QUIT}.get(cv2.waitKey(0) & 0xFF, NEXT)
    else:  # "image", or an item of one frame with "video"
        write_png(file.with_name(f"{file.name}.png"), sheet(frames))
    return NEXT


def _make_rng(source: MediaSource) -> random.Random:
    """Return a random generator that always draws the same variant of an image."""
    return random.Random(derive_seed(0, source.stem))


def side_by_side(item: DecodedMedia) -> NDArray[np.uint8]:
    """Place an item's frames (F H W 3), control media and mask next to each other; transparency is gray."""
    columns = []
    height = item.frames.shape[1]
    for frames in (item.frames, *item.control):
        if frames.shape[-1] != 3:
            alpha = frames[..., 3:].astype(np.float32) / 255
            frames = np.asarray(frames[..., :3] * alpha + 127.5 * (1 - alpha)).round().astype(np.uint8)
        if frames.shape[1] != height:  # reference images may have another height
            size = (max(1, round(frames.shape[2] * height / frames.shape[1])), height)
            frames = np.stack([resize_frame(frame, size, "area") for frame in frames])
        columns.append(frames)
    if item.mask is not None:
        columns.append(np.repeat(item.mask[..., None], 3, axis=3))
    return np.concatenate(columns, axis=2)


def sheet(frames: NDArray[np.uint8], maximum: int = SHEET_FRAMES) -> Frame:
    """Arrange at most `maximum` evenly spaced frames side by side in one image."""
    return np.concatenate(select_evenly(list(frames), maximum), axis=1)


def colored_text(frame: Frame, columns: int, background: str | None) -> str:
    """Return an image as lines for a terminal with 24-bit colors.

    Without a background, a character shows two pixels, one above the other; with one, it is a character of
    SHADES, denser for lighter pixels.
    """
    # a terminal character is twice as tall as wide
    rows = max(round(frame.shape[0] / frame.shape[1] * columns / 2), 1)
    lines = []
    if background is None:
        small = cv2.resize(frame, (columns, 2 * rows), interpolation=cv2.INTER_AREA)
        for upper, lower in zip(small[::2], small[1::2], strict=True):
            lines.append("".join(map(_half_blocks, upper, lower)))
    else:
        small = cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA)
        background_code = 40 + COLORS.index(background.lower())  # ANSI: 40 is black, 47 is white
        for row in small:
            lines.append("".join(_shade_pixel(pixel, background_code) for pixel in row))
    return "".join(f"{line}\033[0m\n" for line in lines)


def _half_blocks(above: NDArray[np.uint8], below: NDArray[np.uint8]) -> str:
    """Return a terminal character that shows two pixels, one above the other."""
    return f"\033[38;2;{_rgb(above)};48;2;{_rgb(below)}m▀"


def _shade_pixel(pixel: NDArray[np.uint8], background_code: int) -> str:
    """Return a terminal character that draws a pixel: its brightness as one of SHADES, in the pixel's color.

    `background_code` is the ANSI code of the background color.
    """
    shade = SHADES[int(pixel.mean()) * len(SHADES) // 256]
    return f"\033[{background_code};38;2;{_rgb(pixel)}m{shade}"


def _rgb(pixel: NDArray[np.uint8]) -> str:
    """Return a pixel's color as an ANSI code: `r;g;b`."""
    return ";".join(str(int(value)) for value in pixel)
