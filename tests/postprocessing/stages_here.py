"""Stages without networks, and runs with them."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modules.command import command_line
from modules.media.encoding import OutputFrame
from modules.media.options import FormatOptions
from modules.media.reading import read_image, video_frames
from modules.media.writing import write_video
from modules.options import NO_OPTIONS, NoOptions
from modules.output_files import Answer
from postprocessing.chain_options import Chain, Tool
from postprocessing.contract import Clip, Stage
from postprocessing.naming import plan_jobs
from postprocessing.options import ToolRunOptions
from postprocessing.run import run_jobs
from postprocessing.stages import NamedStage
from tests.tiny.project import moving_square

H264 = FormatOptions(codec="h264", container="mp4", keep_pngs=False)
PRORES = FormatOptions(codec="prores", container="mkv", keep_pngs=False)


@dataclass
class Same:
    """Gives pictures on as they are, if `change` is not given."""

    name: str = "same"
    change: Callable[[OutputFrame], OutputFrame] = lambda picture: picture

    def plan_output(self, clip: Clip) -> Clip:
        return clip

    def run(self, pictures: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        return map(self.change, pictures)


@dataclass
class Larger:
    """Makes each pixel two by two."""

    name: str = "larger"

    def plan_output(self, clip: Clip) -> Clip:
        return replace(clip, width=2 * clip.width, height=2 * clip.height)

    def run(self, pictures: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        for image in pictures:
            assert image.pixels.shape == (clip.height, clip.width, 3)
            yield replace(image, pixels=image.pixels.repeat(2, 0).repeat(2, 1))


@dataclass
class Smoother:
    """Puts the mean of two neighbors between them."""

    name: str = "smoother"

    def plan_output(self, clip: Clip) -> Clip:
        assert clip.rate is not None
        return replace(clip, rate=2 * clip.rate, frames=None if clip.frames is None else 2 * clip.frames - 1)

    def run(self, pictures: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        before: OutputFrame | None = None
        for image in pictures:
            if before is not None:
                half = (image.start - before.start) / 2
                mean = (before.pixels.astype(np.uint16) + image.pixels) // 2
                yield replace(before, seconds=half)
                yield OutputFrame(mean.astype(np.uint8), before.start + half, half)
            before = image
        if before is None:
            return
        yield replace(before, seconds=before.seconds / 2)


@dataclass
class Refusing:
    """Fails at the picture of that number, or at the end."""

    error: Exception
    at: int | None = None
    name: str = "refusing"

    def plan_output(self, clip: Clip) -> Clip:
        return clip

    def run(self, pictures: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        for index, image in enumerate(pictures):
            if index == self.at:
                raise self.error
            yield image
        if self.at is None:
            raise self.error


@dataclass
class Black:
    """Hides everything."""

    name: str = "black"

    def plan_output(self, clip: Clip) -> Clip:
        return clip

    def run(self, pictures: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        for image in pictures:
            yield replace(image, pixels=np.zeros_like(image.pixels))


def tool_for(stage: Stage, needs_video: bool = False, hides: bool = False) -> tuple[Tool, Any]:
    """A tool that the stage stands for, with options of no names."""
    tool = Tool(stage.name, (), NoOptions, lambda _: stage.name.upper(), needs_video, hides)
    return tool, NO_OPTIONS


@dataclass
class Asked:
    """Answers as told, and remembers the questions."""

    answer: Answer | None = None
    questions: list[str] = field(default_factory=list)

    def __call__(self, question: str) -> Answer | None:
        self.questions.append(question)
        return self.answer


def chain_of(
    stages: Sequence[Stage],
    source: Path,
    output: Path | str | None = None,
    form: FormatOptions = H264,
    yes: bool = False,
    needs_video: bool = False,
) -> Chain:
    """The command line that would have named these stages."""
    run = ToolRunOptions(
        input=source, output=None if output is None else str(output), yes=yes, device="cpu", format=form
    )
    return Chain(run, tuple(tool_for(stage, needs_video) for stage in stages))


def kept_frames(folder: Path) -> list[NDArray[np.uint8]]:
    """The frames that --keep_pngs has written beside an input, as the encoder got them."""
    return [read_image(path) for path in sorted((folder / "frames").glob("*.png"))]


def run_stages(
    stages: Sequence[Stage],
    source: Path,
    output: Path | str | None = None,
    form: FormatOptions = H264,
    *,
    yes: bool = False,
) -> list[Path]:
    """Run as a script does, but with stages that are there; returns the results."""
    chain = chain_of(stages, source, output, form, yes)
    jobs = plan_jobs(chain, Asked())
    run_jobs(chain, jobs, [NamedStage(stages[0]), *(NamedStage(s, f"--then {s.name}") for s in stages[1:])])
    return [job.output for job in jobs]


def write_clip(path: Path, frames: int = 6, width: int = 48, height: int = 32, fps: float = 16) -> Path:
    """A short video of high quality."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, moving_square(frames, width, height, 1), fps, preset="ultrafast")
    return path


def frames_of(path: Path) -> NDArray[np.uint8]:
    """All frames, F H W 3."""
    return np.stack(list(video_frames(path)))


def files_in(folder: Path) -> set[str]:
    """The names of all that lies in a folder, hidden or not."""
    return {path.name for path in folder.iterdir()}


def main() -> None:
    """Make a run whose stage takes its time, for tests that end it: INPUT OUTPUT."""
    source, output = map(Path, sys.argv[1:3])
    form = replace(H264, keep_pngs=True)

    def wait(picture: OutputFrame) -> OutputFrame:
        if picture.start == Fraction(3, 16):  # the encoder has its first frames
            print("at work", flush=True)  # noqa: T201
        if picture.start > Fraction(3, 16):
            time.sleep(0.2)
        return picture

    run_stages([Same(change=wait)], source, output, form)


if __name__ == "__main__":
    command_line(main)
