"""Draw the pictures of docs/post.md with the tools themselves.

    python docs/post_pictures.py [NAME ...]

No released weights are needed. The upscaler is a small network that learns here, for a minute or two, on the
shapes of the pocket model. The detector is that of the tests, to which something red is a face. Interpolation
only shows times, since its weights are random.
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from torch.nn.functional import interpolate, l1_loss  # noqa: E402

from blissful_tuner import upscaler, yolo_blur  # noqa: E402
from checkpoints.writing import save_tensors  # noqa: E402
from modules.media.encoding import OutputFrame  # noqa: E402
from modules.media.reading import Frame, read_image, video_frames  # noqa: E402
from modules.media.writing import write_png, write_video  # noqa: E402
from modules.parser import Parser  # noqa: E402
from pocket import drawing  # noqa: E402
from postprocessing.chain_options import parse_tool  # noqa: E402
from postprocessing.contract import Clip, to_pixels, to_tensor  # noqa: E402
from postprocessing.interpolation.stage import make_interpolation  # noqa: E402
from postprocessing.upscaling.rrdb import RrdbConfig, RRDBNet  # noqa: E402
from tests.tiny.post_faces import write_red_detector  # noqa: E402
from tests.tiny.post_interpolation import write_gimm_r  # noqa: E402

logger = logging.getLogger(__name__)

FOLDER = ROOT / "docs" / "features"
GAP = 4  # pixels between pictures
CPU = torch.device("cpu")

# the upscaler that learns here
RRDB = RrdbConfig(features=16, growth=8, blocks=1, doublings=1, unshuffle=1, has_shortcuts=False)
STEPS, BATCH, RATE = 700, 6, 2e-3
FORMS = 12  # in a picture that it learns from
COLOURS = 3
UNSEEN = (("star", "yellow"), ("ring", "red"), ("cross", "white"), ("diamond", "green"))  # it learns others
SHOWN = 4  # how much larger the picture shows its pixels

# the clip with a face
WIDTH, HEIGHT, COUNT = 96, 64, 24
FACE, BOX = 24, 30  # width in pixels: of the face, and of what the detector finds around it
MISSED = (9, 10, 11, 12, 13)  # frames in which it is too pale to be found
FRAMES = (4, 7, 10, 12, 15, 18)  # in the picture

# the clip with a cut
SIDE, RATE_OF_CLIP, FACTOR, CUT = 128, 12, 3, 3  # CUT: number of the first picture of the second scene


def main() -> None:
    """Draw the pictures that the command line names, all of them if it names none."""
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(IMAGES))
    names = parser.parse_args().names
    FOLDER.mkdir(exist_ok=True)
    for name in names or IMAGES:
        with tempfile.TemporaryDirectory() as folder:
            IMAGES[name](Path(folder), FOLDER / f"{name}.png")


def draw_upscaling(folder: Path, path: Path) -> None:
    """Write the same picture enlarged by repeating pixels, bicubic, by the network; and how it was."""
    model = folder / "learned.safetensors"
    save_tensors(model, learned_upscaler().state_dict())
    truth = unseen_forms()
    small = halved(truth)
    write_png(folder / "small.png", small)
    words = ["--mode", "esrgan", "--scale", "2", "--device", "cpu"]
    upscaler.main(
        ["--input", str(folder / "small.png"), "--output", str(folder / "made.png"), "--model", str(model)]
        + words
    )
    size = truth.shape[1], truth.shape[0]
    ways = [cv2.resize(small, size, interpolation=how) for how in (cv2.INTER_NEAREST, cv2.INTER_CUBIC)]
    panels = [*ways, read_image(folder / "made.png"), truth]
    for name, panel in zip(("repeated", "bicubic", "network"), panels, strict=False):
        error = np.square(panel.astype(float) - truth).mean()
        logger.info("%s: %.1f dB", name, 10 * np.log10(255**2 / error))
    write_png(path, row([larger(panel, SHOWN) for panel in panels]))


def learned_upscaler() -> RRDBNet:
    """Return a network that has learned to undo the halving of pictures with circles, squares, triangles."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    network = repeating(RRDBNet(RRDB))
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, cycle_momentum=False)
    for _ in range(STEPS):
        frames = [crowded(random) for _ in range(BATCH)]
        large = torch.cat([to_tensor(frame, CPU) for frame in frames])
        small = torch.cat([to_tensor(halved(frame), CPU) for frame in frames])
        optimizer.zero_grad()
        l1_loss(network(small), large).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def crowded(random: np.random.Generator) -> Frame:
    """Return a picture with many forms of the pocket model, which hide each other in part."""
    side = drawing.SIZE
    fine = np.empty((side * drawing.FINE, side * drawing.FINE, 3), np.uint8)
    fine[:] = drawing.GROUNDS[drawing.pick(random, tuple(drawing.GROUNDS))]
    for _ in range(FORMS):
        color = drawing.near(random, drawing.COLOURS[drawing.pick(random, tuple(drawing.COLOURS))], 40)
        x, y = random.uniform(0, side, 2)
        form = drawing.pick(random, drawing.SHAPES)
        drawing.paint(fine, form, (x, y), random.uniform(6, 26), color)
    return cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA)


def repeating(network: RRDBNet) -> RRDBNet:
    """Let a network begin by repeating pixels, next to random features: what is missing is learned faster."""
    with torch.no_grad():
        for convolution in (network.conv_first, network.conv_up1, network.conv_hr):
            passed = torch.nn.init.dirac_(torch.empty_like(convolution.weight))
            convolution.weight[:COLOURS] = passed[:COLOURS]
            convolution.bias[:COLOURS] = 0
        network.conv_body.weight[:COLOURS] = 0
        network.conv_body.bias[:COLOURS] = 0
        torch.nn.init.dirac_(network.conv_last.weight)
        network.conv_last.bias.zero_()
    return network


def unseen_forms() -> Frame:
    """Return a picture of forms that the network has not learned."""
    side = 32
    fine = np.empty((side * drawing.FINE * 2, side * drawing.FINE * 2, 3), np.uint8)
    fine[:] = drawing.GROUNDS["navy"]
    for index, (form, color) in enumerate(UNSEEN):
        center = (index % 2 + 0.5) * side, (index // 2 + 0.5) * side
        drawing.paint(fine, form, center, 0.75 * side, drawing.COLOURS[color])
    return cv2.resize(fine, (2 * side, 2 * side), interpolation=cv2.INTER_AREA)


def halved(frame: Frame) -> Frame:
    """Return a frame at half its size, bicubic."""
    image = interpolate(to_tensor(frame, CPU), scale_factor=0.5, mode="bicubic", antialias=True)
    made = to_pixels(image.clamp(0, 1), False)
    assert made.dtype == np.uint8
    return made.astype(np.uint8)


def draw_blur(folder: Path, path: Path) -> None:
    """Write frames in which a face is missed: above only what is found is blurred, below as the tool does."""
    detector = write_red_detector(folder / "red.safetensors", BOX)
    clip = folder / "clip.mkv"
    write_video(clip, [clown(index) for index in range(COUNT)], 12, "prores")
    rows = []
    for name, held in (("found", ["--hold", "0", "--lookback", "0"]), ("held", [])):
        files = ["--input", str(clip), "--output", str(folder / f"{name}.mkv")]
        yolo_blur.main([*files, "--model", str(detector), "--device", "cpu", *held])
        frames = list(video_frames(folder / f"{name}.mkv"))
        rows.append(row([larger(frames[index], 2) for index in FRAMES]))
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    write_png(path, np.concatenate([rows[0], gap, rows[1]]))


def clown(index: int) -> Frame:
    """Return a frame of a face with a red nose, by which the tests' detector finds it; sometimes too pale."""
    pixels = np.full((HEIGHT, WIDTH, 3), (62, 74, 92), np.uint8)
    pixels[::8], pixels[:, ::8] = (70, 84, 104), (70, 84, 104)
    x, y = 20 + 2 * index, 32
    skin, dark, red = (236, 198, 150), (60, 40, 30), (255, 0, 0)
    if index in MISSED:
        red = (170, 60, 60)
    cv2.circle(pixels, (x, y), FACE // 2, skin, cv2.FILLED, cv2.LINE_AA)
    for side in (-1, 1):
        cv2.circle(pixels, (x + 6 * side, y - 5), 2, dark, cv2.FILLED, cv2.LINE_AA)
    cv2.ellipse(pixels, (x, y + 6), (6, 3), 0, 0, 180, dark, 1, cv2.LINE_AA)
    pixels[y - 4 : y + 4, x - 4 : x + 4] = red
    return pixels


@dataclass(frozen=True)
class Shown:
    """A picture of a result: when, in seconds, and what it is: kept, made or repeated."""

    start: float
    what: str
    scene: int


def draw_times(folder: Path, path: Path) -> None:
    """Write the times of the pictures of a clip before and after, and what they are at a cut."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.add_subplot()
    given = list(two_scenes())
    before = [Shown(float(each.start), "kept", index >= CUT) for index, each in enumerate(given)]
    after = interpolated(folder, given, "0.25")
    rows = (("the clip", before), (f"--factor {FACTOR}", after))
    for number, (_, images) in enumerate(rows):
        _draw_row(axes, images, -number)
    axes.set_yticks([0, -1], [name for name, _ in rows])
    axes.set_ylim(-1.6, 0.6)
    axes.set_xlabel("seconds")
    axes.axvline(CUT / RATE_OF_CLIP, color="grey", linestyle="--", linewidth=1)
    axes.annotate("cut", (CUT / RATE_OF_CLIP, 0.42), textcoords="offset points", xytext=(4, 0))
    marks = [Patch(fc=face, ec="black", hatch=hatch, label=what) for what, (face, hatch) in LOOKS.items()]
    axes.legend(handles=marks, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=90, metadata={"Software": None})


LOOKS = {
    "a picture of the clip": ("C0", ""),
    "made in between": ("white", ""),
    "repeated": ("C0", "////"),
}
NAMES = dict(zip(("kept", "made", "repeated"), LOOKS, strict=True))


def _draw_row(axes: Axes, pictures: Sequence[Shown], level: int) -> None:
    width = 0.8 * min(b.start - a.start for a, b in zip(pictures, pictures[1:], strict=False))
    for each in pictures:
        face, hatch = LOOKS[NAMES[each.what]]
        shown = "C1" if each.scene and face == "C0" else face
        axes.bar(
            each.start + width * 0.625, 0.6, width, level - 0.3, color=shown, edgecolor="black", hatch=hatch
        )


def two_scenes() -> Iterator[OutputFrame]:
    """Yield the pictures of a clip with a cut."""
    for index in range(2 * CUT):
        random = np.random.default_rng(int(index >= CUT))
        scene = drawing.scene(random, two=1)
        frame = drawing.draw(scene, index, 1)[0]
        pixels = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        yield OutputFrame(pixels, Fraction(index, RATE_OF_CLIP), Fraction(1, RATE_OF_CLIP))


def interpolated(folder: Path, given: Sequence[OutputFrame], threshold: str) -> list[Shown]:
    """Return the pictures that the tool makes of given ones, each marked as kept, repeated or made."""
    words = ["GIMMVFI", "--model", str(write_gimm_r(folder / "gimm")), "--mode", "gimmvfi_r"]
    words += ["--factor", str(FACTOR), "--scene_threshold", threshold]
    stage = make_interpolation(parse_tool(words, "--then")[1], CPU)
    clip = Clip(Path("clip.mkv"), SIDE, SIDE, Fraction(RATE_OF_CLIP), len(given), False)
    starts = {each.start for each in given}
    shown = []
    for made in stage.run(iter(given), clip):
        is_one = any(np.array_equal(made.pixels, each.pixels) for each in given)
        what = "kept" if made.start in starts else "repeated" if is_one else "made"
        shown.append(Shown(float(made.start), what, made.start >= Fraction(CUT, RATE_OF_CLIP)))
    return shown


def larger(frame: Frame, times: int) -> Frame:
    """Return a frame with each pixel as a square of so many."""
    return frame.repeat(times, 0).repeat(times, 1)


def row(frames: Sequence[Frame]) -> Frame:
    """Return frames side by side."""
    gap = np.full((frames[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for frame in frames for part in (frame, gap)][:-1], axis=1)


IMAGES: dict[str, Callable[[Path, Path], None]] = {
    "upscaling": draw_upscaling,
    "face_blur": draw_blur,
    "interpolation": draw_times,
}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
