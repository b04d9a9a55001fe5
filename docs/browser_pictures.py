"""Make docs/browser_*.png, the page for all runs in two sizes, light and dark.

    python docs/browser_pictures.py

Its runs and samples are drawn. It is photographed in a headless Chromium, as tests/chromium.py finds it.
"""

import math
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from modules.media.reading import Frame  # noqa: E402
from modules.media.writing import write_video  # noqa: E402
from modules.parser import Parser  # noqa: E402
from tests.browser.serving import serve_runs  # noqa: E402
from tests.chromium import open_page, wait_until  # noqa: E402
from tests.data_tools.cutting.films import landscape  # noqa: E402
from tests.pictures import picture  # noqa: E402
from training.reports.history import HIGHEST, PREDICTED, History, describe_process, history_path  # noqa: E402

RUNS = (  # name, family, seed, step, total steps, how it ended
    ("paper_harbour", "wan", 3, 1240, 2000, None),
    ("green_hills", "wan", 5, 1600, 1600, ("finished", "good")),
    ("rain_market", "hunyuan_video", 8, 900, 900, ("finished", "good")),
    ("night_square", "flux_2", 13, 700, 1200, ("stopped after step 700", "")),
    ("winter_coast", "wan", 21, 310, 1600, ("ended by an error after step 310: the loss is nan", "bad")),
)
PROMPTS = (
    "the camera moves slowly to the right",
    "seen from a train, low sun",
    "at night, lights in the windows",
)
SHOWN = (("list", 1440, "light"), ("run", 1440, "dark"), ("list", 360, "dark"), ("run", 360, "light"))
COLOURS = 200


def main() -> None:
    Parser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        for run in reversed(RUNS):  # the newest is the first
            write_run(Path(name) / run[0], *run)
        with serve_runs(Path(name)) as served:
            for place, width, scheme in SHOWN:
                address = "/" if place == "list" else served.of(RUNS[0][0])
                height = 1000 if width > 1000 else 760
                with open_page(served.url + address, width, height, color_scheme=scheme) as page:
                    wait_until(page, "seen.size && [...seen].every(clip => clip.currentTime > 0)")
                    page.screenshot(path=Path(name) / "page.png")
                shown = Image.open(Path(name) / "page.png").convert("RGB")
                shown.quantize(COLOURS, dither=Image.Dither.NONE).save(
                    ROOT / "docs" / f"browser_{place}_{width}_{scheme}.png", optimize=True
                )


def write_run(
    folder: Path, name: str, model: str, seed: int, step: int, total: int, end: tuple[str, str] | None
) -> None:
    """Write the history and the samples of a run whose pictures become sharper."""
    history, generator = History(history_path(folder, name), 1), np.random.default_rng(seed)
    (folder / "sample").mkdir(parents=True)
    told = {"model": model, "total_steps": total, "changed": [], "unchanged": [], "listens": True}
    history.add(0, started={**told, "process": describe_process()})
    history.add(0, memory=[[PREDICTED, "14.6 GiB"], [HIGHEST, "15.1 GiB"]])
    for each in range(0, step + 1, 10):
        learned = math.exp(-each / 500)
        if each:
            rates = {"lr/unet": 1e-4 * (1 + math.cos(math.pi * each / total)) / 2}
            loss = 0.09 + 0.08 * learned + float(generator.normal(0, 0.012))
            history.add(each, loss=loss, rates=rates, seconds=3.1 + float(generator.normal(0, 0.05)))
        if each % 50 == 0:
            history.add(each, validation={"validation/loss": 0.1 + 0.07 * learned})
        if each % 300 == 0:
            files = {str(index): f"{name}_{each:06d}_{index:02d}.mp4" for index in range(len(PROMPTS))}
            for index, file in files.items():
                frames = draw_clip(seed + int(index), 24 * learned)
                write_video(folder / "sample" / file, iter(frames), 16, crf=20, preset="veryfast")
            history.add(
                each, samples=f"{each:06d}", files=files, prompts=dict(zip(files, PROMPTS, strict=True))
            )
    if end:
        history.add(step, ended=end[0], kind=end[1])
    history.flush()


def draw_clip(seed: int, blur: float, frames: int = 17, width: int = 320, height: int = 240) -> list[Frame]:
    """A camera that moves over a drawn landscape, out of focus by `blur` pixels."""
    size = (width + 4 * frames, height)
    colours = cv2.resize(landscape(seed) * 255, size, interpolation=cv2.INTER_CUBIC)
    wide = 0.7 * colours + 0.3 * picture(seed, size)
    wide = cv2.GaussianBlur(wide, (0, 0), blur + 0.01).clip(0, 255).astype(np.uint8)
    return [np.ascontiguousarray(wide[:, 4 * index : 4 * index + width]) for index in range(frames)]


if __name__ == "__main__":
    main()
