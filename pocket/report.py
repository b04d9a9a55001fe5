"""Write the quickstart's report: clips with the detectors' verdicts, curves, samples and commands.

python -m pocket.report FOLDER
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from markupsafe import Markup
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modules.errors import UserError
from modules.media.reading import video_frames, video_info
from modules.pages.charts import Chart, Curve, draw_chart
from modules.pages.page import embed_clip, write_page
from pocket import drawing
from pocket.concepts import CONCEPTS, Concept
from pocket.footage import read_folder
from pocket.measure import FORMS
from tests.pocket.detectors import Verdict, look

TEMPLATE = Path(__file__).resolve().parent / "report.html"
LOSS_WINDOW = 20  # number of steps averaged at the start and at the end
TITLE = "A model is taught something it has never seen"
# heads; label and cells of rows
Table = tuple[Sequence[str], Sequence[tuple[str, Sequence[tuple[Markup, str]]]]]


def write_report(folder: Path) -> Path:
    """Check what the run made and describe it in report.html. Raises UserError if a check fails."""
    blorp, zindle = CONCEPTS["blorp"], CONCEPTS["zindle"]
    before, after = (clips_by_seed(folder / name, folder / "blorp.txt") for name in ("before", "after"))
    if any(
        numpy.array_equal(first.frames, second.frames) for first, second in zip(before, after, strict=True)
    ):
        raise UserError("the LoRA changes nothing: clips made with and without it are equal")
    values = {
        "word": blorp.word,
        "colour": zindle.word,
        "asked": sum(blorp.word in clip.prompt for clip in before),
        "counts": [
            sum(shows(clip, blorp) for clip in clips if blorp.word in clip.prompt)
            for clips in (before, after)
        ],
        "steps": len(read_scalars(folder / blorp.word / "logs", "loss/current")),
        "before_and_after": judge(("before", before), ("after", after)),
        "second": judge(("", clips_by_seed(folder / "zindle", folder / "zindle.txt"))),
        "both": judge(("", clips_by_seed(folder / "both", folder / "both.txt"))),
        "trainings": [describe_training(folder, concept.word) for concept in (blorp, zindle)],
        "footage": show_footage(folder / "footage" / "reconstructed"),
        "commands": json.loads((folder / "commands.json").read_text(encoding="utf-8")),
    }
    report = folder / "report.html"
    write_page(report, TEMPLATE, TITLE, values)
    return report


@dataclass(frozen=True)
class GeneratedClip:
    """A generated video and its prompt."""

    path: Path
    prompt: str

    @cached_property
    def frames(self) -> drawing.Clip:
        """The clip's frames, F H W 3 uint8, read from its file once."""
        return numpy.stack(list(video_frames(self.path)))

    @cached_property
    def verdict(self) -> Verdict:
        """What the detectors see in the clip: its color, shape and direction."""
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


def judge(*rows: tuple[str, Sequence[GeneratedClip]]) -> Table:
    """Return a table of clips, a column for each prompt, with what the detectors see in each."""

    def say(verdict: Verdict) -> str:
        if verdict.is_empty:
            return "the detectors see nothing"
        thing = f"{verdict.colour} {verdict.shape or 'something'}"
        return f"the detectors see {thing} moving {verdict.direction or 'nowhere'}"

    heads = [clip.prompt for clip in rows[0][1]]
    return heads, [(label, [(play(clip.path), say(clip.verdict)) for clip in clips]) for label, clips in rows]


def describe_training(folder: Path, word: str) -> dict[str, Any]:
    """Return the facts of a training for the report: clips, losses, curves, samples."""
    losses = read_scalars(folder / word / "logs", "loss/current")
    validation = read_scalars(folder / word / "logs", "validation/loss")
    every = len(losses) / max(len(validation) - 1, 1)  # the first is before training
    learned = sorted((folder / word / "clips").glob("*.mp4"))[:4]
    samples = []  # step and file
    for path in (folder / word / "output" / "sample").glob("*.mp4"):
        mark = path.stem.removeprefix(f"{word}_").partition("_")[0]
        samples.append((int(mark) if mark.isdigit() else 0, path))
    curves = [
        Curve("loss", range(1, len(losses) + 1), losses, smoothing=0.9),
        Curve("validation", [at * every for at in range(len(validation))], validation, has_dots=True),
    ]
    return {
        "word": word,
        "clips": in_a_row(
            (path.with_suffix(".txt").read_text(encoding="utf-8"), path, "") for path in learned
        ),
        "losses": [
            *(statistics.fmean(part) for part in (losses[:LOSS_WINDOW], losses[-LOSS_WINDOW:])),
            *(validation[0], validation[-1]),
        ],
        "charts": [
            draw_chart(Chart([curve], "step", "loss", title))
            for curve, title in zip(curves, ("Loss", "Validation loss"), strict=True)
        ],
        "prompt": (folder / f"{word}_samples.txt").read_text(encoding="utf-8").partition(" --")[0],
        "samples": in_a_row(
            (f"step {step}" if step else "before training", path, "") for step, path in sorted(samples)
        ),
    }


def show_footage(reconstructed: Path) -> Table:
    """Return a table of real clips next to their reconstructions."""
    figures = json.loads((reconstructed / "psnr.json").read_text(encoding="utf-8"))
    return in_a_row(
        (name, reconstructed / f"{name}.mp4", f"{value:.1f} dB") for name, value in figures.items()
    )


def in_a_row(clips: Iterable[tuple[str, Path, str]]) -> Table:
    """Return a table of one row. clips: head, file and note of each."""
    heads, paths, notes = zip(*clips, strict=True)
    return heads, [("", [(play(path), note) for path, note in zip(paths, notes, strict=True)])]


def play(path: Path) -> Markup:
    """Return a tag that plays a clip."""
    return embed_clip(list(video_frames(path)), video_info(path).fps, path.stem)


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


if __name__ == "__main__":
    write_report(read_folder(__doc__))
