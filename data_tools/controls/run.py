"""Write the control images that a folder lacks, after the options of tools/control_pictures.py are read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_tools.controls.depth import load_depth_model
from data_tools.folders import find_equal_stems, list_images
from dataset.caching.prefetch import Failure, failure_error
from modules.atomic_write import make_folder
from modules.bars import track
from modules.console import Row, format_count, list_some, show_box
from modules.errors import DatasetError, MediaError, OptionError
from modules.media.edges import draw_edges
from modules.media.labels import find_stem_label
from modules.media.options import EDGE_THRESHOLDS
from modules.media.reading import Frame, read_image, read_tags
from modules.media.writing import write_png
from modules.options import Options, option
from modules.text_files import real_path

logger = logging.getLogger(__name__)

METHOD_TEXT = "control_picture"  # key of a PNG text entry, which says how the image was made
FOLDER_NAME = "conditioning"  # of the control images, in the folder of the images


class ControlImageOptions(Options, title="what to make"):
    """Which images get control images, of which kind, and where they are written."""

    folder: Path = option("folder of images", positional=True, place="folder")
    canny: tuple[int, ...] | None = option(
        "draw edges; behind the folder. Two numbers are Canny's thresholds, low and high; default: "
        f"{EDGE_THRESHOLDS[0]} {EDGE_THRESHOLDS[1]}, as --control_net_preps canny of gen_img.py",
        nargs="*",
        metavar="LOW HIGH",
        minimum=0,
        maximum=99_999,
        excludes="depth",
    )
    depth: Path | None = option(
        "draw depth maps, white is near, with the model in this folder, which transformers must be able to "
        "load for depth estimation, such as Depth Anything V2 or DPT. Code in the folder is never executed",
        place="folder",
        hint="the folder of such a model; python tools/download.py --family tools --task "
        "depth_anything_v2_small --to models downloads one, after its size and license",
    )
    output: Path | None = option(
        f"folder for the control images; default: {FOLDER_NAME}, in the folder of images",
        place="new folder",
    )
    overwrite: bool = option("make again what this program has made; files of other programs always stay")
    device: str | None = option(
        "of --depth: cuda, cuda:1, mps or cpu; default: the best one available", ignored_without="depth"
    )

    def __post_init__(self) -> None:
        if self.canny is None and self.depth is None:
            raise OptionError("Say what to draw: --canny for edges, or --depth FOLDER with a model of depth")
        if self.canny is not None and len(self.canny) not in (0, 2):
            raise OptionError(f"--canny requires two numbers, LOW and HIGH, or none, not {len(self.canny)}")
        if self.canny and self.canny[0] > self.canny[1]:
            raise OptionError(f"--canny {self.canny[0]} {self.canny[1]}: the first is the lower threshold")

    @property
    def thresholds(self) -> tuple[int, int]:
        """Return the low and the high threshold of Canny's edge detector."""
        if not self.canny:
            return EDGE_THRESHOLDS
        low, high = self.canny
        return low, high


@dataclass
class ControlPlan:
    """Which images of a folder get a control image, and which existing ones stay."""

    to_draw: dict[Path, Path] = field(default_factory=dict)  # image -> its control image to write
    up_to_date: list[Path] = field(default_factory=list)  # made before, in the same way
    made_with_other_options: list[Path] = field(default_factory=list)  # made before by this program
    made_by_other_programs: list[Path] = field(default_factory=list)


def make_control_images(options: ControlImageOptions) -> None:
    """Draw a control image for each image in a folder that does not have one yet.

    Files are written atomically, so the same command continues an interrupted run.

    Raises:
        UserError: If an option or the folder cannot be used.
        DatasetError: At the end, if images could not be read.
    """
    folder = real_path(options.folder)
    output = folder / FOLDER_NAME if options.output is None else real_path(options.output)
    if output == folder:
        raise OptionError(f"{options.folder}: control images need a folder of their own. Pass --output")
    images = _find_images(folder)
    if not images:
        raise DatasetError(f"{options.folder} has no images. Subfolders are not searched")
    _reject_equal_stems(images)
    # the method is stored in each image, so that the next run recognizes images made with other options
    method = _describe_method(options)
    plan = _make_plan(images, output, method, options.overwrite)
    _warn_of_remaining_images(plan)
    failures: list[Failure] = []
    if plan.to_draw:
        make_folder(output, "--output")
        draw = _select_drawing(options)
        for path, target in track(plan.to_draw.items(), "Control images", len(plan.to_draw), unit="image"):
            try:
                image = read_image(path)
            except MediaError as error:
                failures.append(Failure(path, reason=str(error), table=0, stem=path.stem))
                continue
            write_png(target, draw(image), {METHOD_TEXT: method})
    num_kept = len(plan.up_to_date) + len(plan.made_with_other_options) + len(plan.made_by_other_programs)
    num_made = len(plan.to_draw) - len(failures)
    rows: list[Row] = [
        ("made", f"{format_count(num_made, 'control image')}, {num_kept} existed before"),
        ("by", method),
        ("use", f'conditioning_data_dir = "{output.as_posix()}"'),
    ]
    show_box("Control images", rows)
    if failures:
        raise failure_error(failures, format_count(len(plan.to_draw), "image"))


def _find_images(folder: Path) -> list[Path]:
    """Return the visible images of a folder, sorted, without masks and condition images."""
    return [path for path in list_images(folder) if find_stem_label(path.stem) is None]


def _reject_equal_stems(images: Sequence[Path]) -> None:
    """Raise DatasetError if two images would share one control image."""
    pair = find_equal_stems(images)
    if pair is not None:
        first, second = pair
        raise DatasetError(f"{first} and {second.name} would have the same control image. Rename one of them")


def _describe_method(options: ControlImageOptions) -> str:
    """Return the description of how control images are made, which is stored in their files."""
    if options.depth is not None:
        return f"depth {real_path(options.depth).name}"
    return "canny {} {}".format(*options.thresholds)


def _select_drawing(options: ControlImageOptions) -> Callable[[Frame], Frame]:
    """Return the function that draws the control image of an image, both H W 3."""
    if options.depth is not None:
        return load_depth_model(options.depth, options.device).draw
    low, high = options.thresholds
    return partial(draw_edges, low=low, high=high)


def _make_plan(images: Sequence[Path], output: Path, method: str, overwrite: bool) -> ControlPlan:
    """Decide for each image whether its control image is made, and list existing ones that stay."""
    # With `overwrite`, control images that this program has made are made again, even if nothing has changed.
    control_images_by_stem: dict[str, Path] = {}
    if output.is_dir():
        # file systems of Windows and macOS ignore case
        control_images_by_stem = {path.stem.casefold(): path for path in _find_images(output)}
    plan = ControlPlan()
    for image in images:
        target = control_images_by_stem.get(image.stem.casefold())
        recorded_method = None if target is None else _read_method(target)
        if target is None:
            plan.to_draw[image] = output / f"{image.stem}.png"
        elif recorded_method is None:
            plan.made_by_other_programs.append(target)
        elif overwrite:
            plan.to_draw[image] = target
        elif recorded_method == method:
            plan.up_to_date.append(target)
        else:
            plan.made_with_other_options.append(target)
    return plan


def _read_method(path: Path) -> str | None:
    """Return the recorded method by which this program made a control image; None for any other image."""
    try:
        return read_tags(path).get(METHOD_TEXT)
    except MediaError:  # another program's file, which the training reports
        return None


def _warn_of_remaining_images(plan: ControlPlan) -> None:
    """Warn about existing control images that stay, although this run would draw them differently."""
    outdated = plan.made_with_other_options
    if outdated:
        logger.warning(
            "%s kept, made with other options. --overwrite makes them again: %s",
            format_count(len(outdated), "control image"),
            list_some([path.name for path in outdated]),
        )
    foreign = plan.made_by_other_programs
    if foreign:
        logger.warning(
            "%s kept, not made by this program. Move them away, or pass another --output, to replace them: "
            "%s",
            format_count(len(foreign), "control image"),
            list_some([path.name for path in foreign]),
        )
