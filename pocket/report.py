"""Write the quickstart's report: clips with the detectors' verdicts, curves, samples and commands.

It is one HTML file without scripts.

    python -m pocket.report FOLDER
"""

import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modules.atomic_write import write_text
from modules.errors import UserError
from modules.media.reading import read_image, resize_cover, video_frames
from modules.media.writing import write_png
from pocket import drawing
from pocket.concepts import CONCEPTS, Concept
from pocket.footage import read_folder
from pocket.measure import FORMS
from tests.pocket.detectors import Verdict, look

SHEET_FRAMES = 5
SHEET_TILE = 96
LOSS_WINDOW = 20  # number of steps averaged at the start and at the end
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:66em;margin:2em auto;padding:0 "
    "1em}pre{background:#f3f3f3;padding:1em;overflow-x:auto}"
    "img,svg,video{max-width:100%}figure{margin:1em "
    "0}.ok{color:#176b2c}.pair{display:flex;gap:1em;flex-wrap:wrap}"
)
TITLE = "Reelsmith: a model is taught something it has never seen"
COPYRIGHT = (
    "Footage: Big Buck Bunny, (c) Blender Foundation, CC-BY 3.0; bikes and carphone are common test "
    "sequences."
)


def write_report(folder: Path) -> Path:
    """Check what the run made and describe it in report.html. Raises UserError if a check fails."""
    blorp, zindle = CONCEPTS["blorp"], CONCEPTS["zindle"]
    before, after = (clips_by_seed(folder / name, folder / "blorp.txt") for name in ("before", "after"))
    counts = [
        sum(shows(clip, blorp) for clip in clips if blorp.word in clip.prompt) for clips in (before, after)
    ]
    asked = sum(blorp.word in clip.prompt for clip in before)
    if any(
        numpy.array_equal(first.frames, second.frames) for first, second in zip(before, after, strict=True)
    ):
        raise UserError("the LoRA changes nothing: clips made with and without it are equal")
    sections = [
        f"<p class=ok>Of {asked} clips that ask for a <b>{blorp.word}</b>, a form that the model has never "
        "seen, "
        f"{counts[0]} show it before and {counts[1]} after {read_steps(folder / blorp.word)} steps.</p>",
        "<h2>Before and after: same prompts, same seeds</h2>",
        *(pair(folder, *clips) for clips in zip(before, after, strict=True)),
        f"<h2>The second LoRA: {zindle.word} is a colour</h2>",
        *(pair(folder, clip) for clip in clips_by_seed(folder / "zindle", folder / "zindle.txt")),
        "<h2>Both LoRAs at once</h2>",
        *(pair(folder, clip) for clip in clips_by_seed(folder / "both", folder / "both.txt")),
        *(section for concept in (blorp, zindle) for section in training_sections(folder, concept.word)),
        "<h2>Real footage through cache and VAE: left as it was, right as it comes back</h2>",
        *footage_figures(folder, folder / "footage" / "reconstructed"),
        "<h2>The commands</h2><p>Put in the paths of a real model to repeat this.</p>" + _commands(folder),
        f"<p>{COPYRIGHT}</p>",
    ]
    text = (
        "<!doctype html><meta "
        f"charset=utf-8><title>{TITLE}</title><style>{STYLE}</style><h1>{TITLE}</h1>{''.join(sections)}"
    )
    report = folder / "report.html"
    write_text(report, text)
    return report


@dataclass(frozen=True)
class GeneratedClip:
    """A generated video and its prompt."""

    path: Path
    prompt: str

    @cached_property
    def frames(self) -> drawing.Clip:
        return numpy.stack(list(video_frames(self.path)))

    @cached_property
    def verdict(self) -> Verdict:
        return look(self.frames, FORMS)


def clips_by_seed(folder: Path, prompts: Path) -> list[GeneratedClip]:
    """Return the clips of a prompt file, in its order. Raises UserError if one is missing."""
    lines = [line.partition(" --d ") for line in prompts.read_text(encoding="utf-8").splitlines()]
    files = {path.stem.rpartition("_")[2]: path for path in folder.glob("*.mp4")}
    missing = [seed for _, _, seed in lines if seed not in files]
    if missing:
        raise UserError(f"{folder}: no clip with seed {', '.join(missing)} of {prompts.name}")
    return [GeneratedClip(files[seed], prompt) for prompt, _, seed in lines]


def shows(clip: GeneratedClip, concept: Concept) -> bool:
    """Return whether the detectors see the concept in the clip."""
    return (
        clip.verdict.colour == concept.colour if concept.form is None else clip.verdict.shape == concept.form
    )


def pair(folder: Path, *clips: GeneratedClip) -> str:
    """Return HTML: clips of one prompt side by side, the prompt above, the detectors' verdict under each."""
    return (
        f"<h3>{html.escape(clips[0].prompt)}</h3><div "
        f"class=pair>{''.join(_judge(folder, clip) for clip in clips)}</div>"
    )


def training_sections(folder: Path, word: str) -> list[str]:
    """Return HTML on the training of a LoRA: clips, curves, samples."""
    losses = read_scalars(folder / word / "logs", "loss/current")
    validation = read_scalars(folder / word / "logs", "validation/loss")
    first, last = (statistics.fmean(part) for part in (losses[:LOSS_WINDOW], losses[-LOSS_WINDOW:]))
    clips = sorted((folder / word / "clips").glob("*.mp4"))[:4]
    return [
        f"<h2>Teaching {word}</h2><p>Four of the clips it learned from:</p>",
        *(figure(folder, path, path.with_suffix(".txt").read_text(encoding="utf-8")) for path in clips),
        f"<p>Loss: from {first:.3f} to {last:.3f}. Validation loss: from {validation[0]:.3f} to "
        f"{validation[-1]:.3f}.</p>",
        curve(losses, "loss"),
        curve(validation, "validation loss"),
        "<p>Samples while training:</p>",
        *(figure(folder, path, path.stem) for path in _samples(folder / word / "output" / "sample")),
    ]


def footage_figures(folder: Path, reconstructed: Path) -> list[str]:
    """Return HTML: real clips beside their reconstructions."""
    figures = json.loads((reconstructed / "psnr.json").read_text(encoding="utf-8"))
    return [
        figure(folder, reconstructed / f"{name}.mp4", f"{name}: {value:.1f} dB")
        for name, value in figures.items()
    ]


def read_steps(folder: Path) -> int:
    """Return how many steps a LoRA was trained for."""
    return len(read_scalars(folder / "logs", "loss/current"))


def read_scalars(logs: Path, name: str) -> list[float]:
    """Return the values of a logged scalar by step, from the TensorBoard files below `logs`.

    Raises UserError if no run logged it.
    """
    for run in sorted((path.parent for path in logs.rglob("events.out.tfevents.*")), reverse=True):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        if name in events.Tags()["scalars"]:
            return [event.value for event in events.Scalars(name)]
    raise UserError(f"{logs}: no run with {name} was logged")


def curve(values: Sequence[float], name: str, width: int = 720, height: int = 200) -> str:
    """Return an SVG line of numbers in their order; the axis begins at 0."""
    top = max(values)
    step = width / max(len(values) - 1, 1)
    points = " ".join(
        f"{index * step:.1f},{height - value / top * (height - 10):.1f}" for index, value in enumerate(values)
    )
    line = f"<polyline fill=none stroke='#2458a6' stroke-width=1.5 points='{points}'/>"
    label = f"<text x=4 y=14 font-size=12>{top:.2f} {name}</text>"
    return f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{name}'>{line}{label}</svg>"


def figure(folder: Path, video: Path, text: str) -> str:
    """Return HTML: a contact sheet with a link to the video, and a text below it."""
    sheet = folder / "sheets" / f"{video.parent.parent.name}_{video.parent.name}_{video.stem}.png"
    write_png(sheet, contact_sheet(video))
    place, name = (html.escape(path.relative_to(folder).as_posix()) for path in (sheet, video))
    return (
        f"<figure><a href='{name}'><img src='{place}' "
        f"alt='{name}'></a><figcaption>{html.escape(text)}</figcaption></figure>"
    )


def _judge(folder: Path, clip: GeneratedClip) -> str:
    verdict = clip.verdict
    seen = (
        "nothing"
        if verdict.is_empty
        else f"{verdict.colour} {verdict.shape or 'something'} moving {verdict.direction or 'nowhere'}"
    )
    return figure(folder, clip.path, f"{clip.path.parent.name}: the detectors see {seen}")


def contact_sheet(path: Path) -> numpy.ndarray:
    """Return a row of frames spread over a video or image, H W 3 uint8."""
    frames = [read_image(path)] if path.suffix == ".png" else list(video_frames(path))
    chosen = [
        frames[round(index)] for index in numpy.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames)))
    ]
    tile = SHEET_TILE * frames[0].shape[1] // frames[0].shape[0], SHEET_TILE
    return numpy.concatenate([resize_cover(frame, tile) for frame in chosen], axis=1)


def _samples(folder: Path) -> list[Path]:
    made = [path for path in folder.iterdir() if path.suffix in {".mp4", ".png"}]
    return sorted(made, key=lambda path: path.stat().st_mtime)


def _commands(folder: Path) -> str:
    commands = json.loads((folder / "commands.json").read_text(encoding="utf-8"))
    return f"<pre>{html.escape(chr(10).join(commands))}</pre>"


if __name__ == "__main__":
    write_report(read_folder(__doc__))
