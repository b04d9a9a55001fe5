"""Run tools on videos and pictures: read, stage after stage, write, as one stream."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from modules.devices import choose_device
from modules.media.reading import timed_frames, video_info
from modules.media.writing import write_video
from post.chain_options import Chain
from post.contract import Clip, Picture, Stage
from post.making import check_tool, make_stage
from post.pixels import to_bytes


def run_chain(chain: Chain) -> None:
    """Do what a command line asks for. Raises UserError."""
    for _, options in chain.tools:
        check_tool(options)
    device = choose_device(chain.run.device)
    stages = [make_stage(options, device) for _, options in chain.tools]
    tool, options = chain.tools[0]
    path = chain.run.input
    output = chain.run.output or path.with_name(f"{path.stem}_{tool.added(options)}{chain.run.format.suffix}")
    run_file(chain, stages, path, output)


def run_file(chain: Chain, stages: Sequence[Stage], path: Path, output: Path) -> None:
    """Let all stages work on one video."""
    info = video_info(path)
    rate = Fraction(info.fps or 25).limit_denominator(1001)
    clip = Clip(path, info.width, info.height, rate, info.frames, chain.run.format.is_deep)
    pictures = _read(path)
    for stage in stages:
        pictures, clip = stage.run(pictures, clip), stage.result(clip)
    frames = (to_bytes(picture.pixels) for picture in pictures)
    write_video(output, frames, float(clip.rate or 25), chain.run.format.codec)


def _read(path: Path) -> Iterator[Picture]:
    for frame in timed_frames(path):
        start, end = (Fraction(time).limit_denominator(90000) for time in (frame.start, frame.end))
        yield Picture(frame.pixels, start, end - start)
