"""Draw the figures of these pages from the functions that they explain.

python docs/figures.py
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from dataset.config import DatasetTable, load_dataset_config  # noqa: E402
from dataset.sources.frames import spans  # noqa: E402
from modules.flow.schedule import make_schedule, shift_sigmas  # noqa: E402
from modules.media.buckets import Size, bucket_sizes, fit_cover, select_bucket  # noqa: E402
from modules.media.edges import draw_edges  # noqa: E402
from modules.media.options import EDGE_THRESHOLDS  # noqa: E402
from modules.media.reading import Frame  # noqa: E402
from modules.parser import Parser  # noqa: E402
from pocket.drawing import COLOURS, FINE, GROUNDS, SIZE, paint  # noqa: E402

KEPT = 40  # frames of the clip in the figure of frame extraction
MODES = (
    ("head", "target_frames = [1, 17, 33]"),
    ("chunk", "target_frames = [9, 17]"),
    ("slide", "target_frames = [17]\nframe_stride = 8"),
    ("uniform", "target_frames = [9, 25]\nframe_sample = 4"),
    ("full", "max_frames = 129"),
)
RESOLUTION = (960, 544)
SOURCES = ((1920, 1080), (1080, 1920), (1024, 1024), (3000, 1000))
LEARNED = (("circle", (20.0, 24.0), 26.0), ("square", (45.0, 42.0), 20.0))  # form, center, width
ASKED = (("triangle", (22.0, 40.0), 28.0), ("ring", (45.0, 20.0), 24.0))
SHIFTS = (1.0, 3.0, 5.0, 7.0, 14.5)


def main() -> None:
    """Draw every figure and save it as PNG in docs/, without the drawing library's version inside."""
    Parser(description=__doc__).parse_args()
    for name, figure in (
        ("frame_extraction", draw_extraction()),
        ("buckets", draw_buckets()),
        ("flow_shift", draw_shifts()),
        ("control", draw_control()),
    ):
        figure.savefig(ROOT / "docs" / f"{name}.png", dpi=90, metadata={"Software": None})


def draw_extraction() -> Figure:
    """Draw the spans that each mode cuts from one clip."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.add_subplot()
    row, ticks = 0, []
    for number, (mode, keys) in enumerate(MODES):
        begin = row
        for start, length in spans(_table(mode, keys), KEPT):
            axes.add_patch(Rectangle((start, row + 0.15), length, 0.7, color=f"C{number}", alpha=0.75))
            row += 1
        ticks.append(((begin + row) / 2, f'"{mode}"\n{keys}'))
        row += 1
    axes.set_xlim(0, KEPT)
    axes.set_ylim(row - 1, 0)
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    axes.set_xlabel(f"frame of a clip of {KEPT} frames; each bar is one item")
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_buckets() -> Figure:
    """Draw what is kept of pictures of different shapes, without and with buckets."""
    width, height = RESOLUTION
    sizes = bucket_sizes(width, height, 16)
    figure = Figure(figsize=(9, 5), layout="constrained")
    rows = figure.subfigures(2, 1)
    for row, enabled in zip(rows, (False, True), strict=True):
        row.suptitle(f"enable_bucket = {str(enabled).lower()}", fontsize=11)
        for axes, source in zip(row.subplots(1, len(SOURCES)), SOURCES, strict=True):
            bucket = RESOLUTION
            if enabled:
                bucket = select_bucket(source, sizes, width * height, 16, no_upscale=False)
            fit = fit_cover(source, bucket)
            _draw_image(axes, fit.resized, fit.crop, bucket)
            axes.set_title(f"{source[0]}x{source[1]} becomes {bucket[0]}x{bucket[1]}", fontsize=8)
    return figure


def draw_shifts() -> Figure:
    """Draw how a shift moves noise levels, in training and over the steps of a generation."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    training, steps = figure.subplots(1, 2)
    drawn = torch.linspace(0, 1, 201)
    for shift in SHIFTS:
        training.plot(drawn, shift_sigmas(drawn, shift), label=f"shift {shift:g}")
        steps.plot(make_schedule("euler", 20, shift).sigmas, marker=".", label=f"shift {shift:g}")
    training.set_xlabel("number drawn, uniform in 0..1")
    training.set_ylabel("share of noise trained at")
    training.set_title("--timestep_sampling shift --discrete_flow_shift")
    steps.set_xticks(range(0, 21, 5))
    steps.set_xlabel("step of 20")
    steps.set_ylabel("share of noise left")
    steps.set_title("--flow_shift")
    for axes in (training, steps):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_control() -> Figure:
    """Draw what a ControlNet learns from, and what it is for. All pictures are drawn, none is generated."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    training, generation = figure.subfigures(1, 2, width_ratios=(2, 3), wspace=0.03)
    for part, title in ((training, "training: many such pairs"), (generation, "generation")):
        part.suptitle(title, fontsize=11)
        part.set_facecolor("#f4f6f8")
    learned = _paint(LEARNED, ("red", "yellow"), "navy")
    panels = (
        (learned, "picture", "caption: a red circle and\na yellow square on navy"),
        (draw_edges(learned, *EDGE_THRESHOLDS), "control picture", "its edges, by the tool"),
    )
    for axes, panel in zip(training.subplots(1, 2), panels, strict=True):
        _show(axes, *panel)
    first, second = _paint(ASKED, ("green", "white"), "grey"), _paint(ASKED, ("yellow", "blue"), "brown")
    panels = (
        (draw_edges(first, *EDGE_THRESHOLDS), "control picture", "says where"),
        (first, "picture", "prompt: a green triangle\nand a white ring on gray"),
        (second, "picture", "prompt: a yellow triangle\nand a blue ring on brown"),
    )
    for axes, panel in zip(generation.subplots(1, 3), panels, strict=True):
        _show(axes, *panel)
    return figure


def _paint(
    forms: Sequence[tuple[str, tuple[float, float], float]], colors: Sequence[str], ground: str
) -> Frame:
    """Return a picture of forms on a ground: H W 3."""
    pixels = np.full((SIZE * FINE, SIZE * FINE, 3), GROUNDS[ground], np.uint8)
    for (form, center, width), color in zip(forms, colors, strict=True):
        paint(pixels, form, center, width, COLOURS[color])
    return pixels


def _show(axes: Axes, pixels: Frame, title: str, below: str) -> None:
    axes.imshow(pixels)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(below, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_image(axes: Axes, resized: Size, crop: Size, bucket: Size) -> None:
    axes.add_patch(Rectangle((0, 0), *resized, color="tab:red", alpha=0.8))
    axes.add_patch(Rectangle(crop, *bucket, facecolor="#cfe2f3", edgecolor="#1f4e79"))
    axes.set_xlim(-30, max(resized) + 30)
    axes.set_ylim(max(resized) + 30, -30)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _table(mode: str, keys: str) -> DatasetTable:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dataset.toml"
        path.write_text(
            f'[[datasets]]\nvideo_directory = "clips"\nframe_extraction = "{mode}"\n{keys}\n',
            encoding="utf-8",
        )
        return load_dataset_config(path).datasets[0]


if __name__ == "__main__":
    main()
