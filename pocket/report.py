"""The quickstart's report: loss curve, clips, contact sheets and the commands that were run, in one HTML file without scripts.

python -m pocket.report FOLDER
"""

import html
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modules.atomic_write import write_text
from modules.errors import UserError
from modules.media import read_image, resize_cover, video_frames, write_png

SHEET_FRAMES = 5
SHEET_TILE = 96
LOSS_WINDOW = 5  # steps averaged at the start and at the end
FALL = 2 / 3  # the loss has to fall by a third
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{background:#f3f3f3;padding:1em;overflow-x:auto}"
)
STYLE += "img,svg,video{max-width:100%}figure{margin:1em 0}.ok{color:#176b2c}"


def write_report(folder: Path) -> Path:
    """Check what the run made and describe it in report.html. Raises UserError where a check fails."""
    losses = read_losses(folder / "logs")
    first, last = (statistics.fmean(part) for part in (losses[:LOSS_WINDOW], losses[-LOSS_WINDOW:]))
    if last > FALL * first:
        raise UserError(
            f"the loss fell only from {first:.3f} to {last:.3f}; at least a third was expected of overfitting three clips"
        )
    pairs = list(zip(sorted((folder / "without").glob("*.mp4")), sorted((folder / "with").glob("*.mp4")), strict=True))
    changes = [change(before, after) for before, after in pairs]
    if not changes or min(changes) == 0:
        raise UserError("the LoRA changed nothing: clips made with and without it are equal")
    sections = [
        f"<p class=ok>The loss fell from {first:.3f} to {last:.3f}. The LoRA changes every clip (mean difference of a pixel value: "
        f"{', '.join(f'{value:.1f}' for value in changes)} of 255).</p>",
        "<h2>Loss</h2>" + loss_curve(losses),
        "<h2>What went in</h2>" + "".join(figure(folder, path) for path in sorted((folder / "clips").glob("*.mp4"))),
        "<h2>Samples while training</h2>" + "".join(figure(folder, path) for path in _samples(folder / "output" / "sample")),
        "<h2>Without and with the LoRA: same prompt, same seed</h2>" + "".join(figure(folder, *pair) for pair in pairs),
        "<h2>The commands</h2><p>Put in the paths of a real model to repeat this.</p>" + _commands(folder),
        "<p>Footage: Big Buck Bunny, (c) Blender Foundation, CC-BY 3.0; bikes and carphone are common test sequences.</p>",
    ]
    title = "Reelsmith: from clips to a LoRA and a video"
    text = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{''.join(sections)}"
    report = folder / "report.html"
    write_text(report, text)
    return report


def read_losses(logs: Path) -> list[float]:
    """The loss of every step, from the TensorBoard files below `logs`."""
    runs = sorted(path.parent for path in logs.rglob("events.out.tfevents.*"))
    for run in reversed(runs):
        events = EventAccumulator(str(run))
        events.Reload()
        if "loss/current" in events.Tags()["scalars"]:
            return [event.value for event in events.Scalars("loss/current")]
    raise UserError(f"{logs}: no run with a loss was logged")


def loss_curve(losses: Sequence[float], width: int = 720, height: int = 240) -> str:
    """An SVG line of the losses."""
    top = max(losses)
    step = width / max(len(losses) - 1, 1)
    points = " ".join(f"{index * step:.1f},{height - value / top * (height - 10):.1f}" for index, value in enumerate(losses))
    line = f"<polyline fill=none stroke='#2458a6' stroke-width=1.5 points='{points}'/>"
    label = (
        f"<text x=4 y=14 font-size=12>{top:.2f}</text><text x={width - 60} y={height - 4} font-size=12>{len(losses)} steps</text>"
    )
    return f"<svg viewBox='0 0 {width} {height}' role=img aria-label='loss by step'>{line}{label}</svg>"


def figure(folder: Path, *videos: Path) -> str:
    """A contact sheet of each video, side by side, with a link to the file."""
    sheets = []
    for video in videos:
        sheet = folder / "sheets" / f"{video.parent.name}_{video.stem}.png"
        write_png(sheet, contact_sheet(video))
        place, name = (html.escape(path.relative_to(folder).as_posix()) for path in (sheet, video))
        sheets.append(f"<a href='{name}'><img src='{place}' alt='{name}'></a>")
    names = " and ".join(f"{video.parent.name}/{video.name}" for video in videos)
    return f"<figure>{'<br>'.join(sheets)}<figcaption>{html.escape(names)}</figcaption></figure>"


def contact_sheet(path: Path) -> numpy.ndarray:
    """A row of frames spread over a video or image, H W 3 uint8."""
    frames = [read_image(path)] if path.suffix == ".png" else list(video_frames(path))
    chosen = [frames[round(index)] for index in numpy.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames)))]
    return numpy.concatenate([resize_cover(frame, (SHEET_TILE, SHEET_TILE)) for frame in chosen], axis=1)


def change(before: Path, after: Path) -> float:
    """Mean difference of two videos' pixel values, 0..255."""
    pairs = zip(video_frames(before), video_frames(after), strict=True)
    return float(numpy.mean([numpy.abs(a.astype(float) - b.astype(float)).mean() for a, b in pairs]))


def _samples(folder: Path) -> list[Path]:
    made = [path for path in folder.iterdir() if path.suffix in {".mp4", ".png"}]
    return sorted(made, key=lambda path: path.stat().st_mtime)


def _commands(folder: Path) -> str:
    commands = json.loads((folder / "commands.json").read_text(encoding="utf-8"))
    return f"<pre>{html.escape(chr(10).join(commands))}</pre>"


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
