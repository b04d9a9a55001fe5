"""Measure what MagCache and TeaCache save, and how far their videos are from the plain ones.

    python benchmarks/step_cache.py

The model is the pocket one, which draws moving shapes. It is calibrated with one seed; then the same videos
of other seeds are generated without a cache and with several thresholds, in turn, in one process. Time is CPU
time of denoising, which other work on the machine hardly changes. Drift is the difference of the latents
relative to the plain ones (L2), and the PSNR of the decoded frames against the plain ones. Figures are means
over the videos; the last column is the fraction of videos that the detectors of the tests find right in
shape, color and direction.
"""

import argparse
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

AIM = 1.3  # speed at --magcache_threshold 0.24, the default
SIDE, FRAMES, STEPS = 64, 17, 20
CALIBRATION_SEED = 1
THRESHOLDS = {"magcache": (0.06, 0.12, 0.24, 0.5), "teacache": (0.1, 0.2, 0.4)}
CLIP = (
    *("--video_size", str(SIDE), str(SIDE), "--video_length", str(FRAMES), "--infer_steps", str(STEPS)),
    *("--guidance_scale", "3", "--flow_shift", "3", "--device", "cpu"),
)
PRINTED = re.compile(r"--(magcache_mag_ratios|teacache_coefficients)(?: -?[0-9.e+-]+)+")
SKIPPED = re.compile(r"skipped (\d+) of (\d+) passes")


@dataclass(frozen=True)
class Made:
    """One video."""

    latents: Any
    frames: Any  # F H W 3 uint8; None of a calibration
    seconds: float  # CPU time of denoising
    said: str


def main() -> None:
    """Calibrate, generate all videos, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=8, help="of each setting")
    args = parser.parse_args()
    from pocket.measure import some_prompts

    make = maker()
    asked = some_prompts(args.videos, 1000, None)
    calibration = make(next(iter(asked.values())).prompt, CALIBRATION_SEED, ["--magcache_calibration"])
    ratios = options_in(calibration.said)
    coefficients = options_in(
        make(next(iter(asked.values())).prompt, CALIBRATION_SEED, ["--teacache_calibration"]).said
    )
    print(" ".join(ratios), " ".join(coefficients), sep="\n", flush=True)
    settings: dict[str, list[str]] = {"no cache": []}
    for name, given in (("magcache", ratios), ("teacache", coefficients)):
        for threshold in THRESHOLDS[name]:
            option = [f"--{name}_threshold", str(threshold)]
            settings[" ".join(option)] = [*given, *option]
    found: dict[str, list[Made]] = {name: [] for name in settings}
    for seed, one in asked.items():
        for name, arguments in settings.items():
            found[name].append(make(one.prompt, seed, arguments))
    raise SystemExit(report(found, list(asked.values())) < AIM)


def maker() -> Callable[[str, int, Sequence[str]], Made]:
    """Return a function that generates a video of a prompt, a seed and options, with loaded networks."""
    import torch

    from generation.denoise import make_latents
    from generation.experts import ExpertOffloader
    from generation.loaded_networks import Session, select_prompts
    from generation.network_setup import dit_loader
    from generation.options import read_generation
    from generation.request import prepare_line
    from pocket.measure import POCKET, model_options
    from wan.family import family_for_generation
    from wan.options import WanGenerationOptions
    from wan_generate_video import DEFAULTS

    device = torch.device("cpu")

    def read(*arguments: str) -> Any:
        given = ["--save_path", "unused", *model_options(POCKET), *CLIP, *arguments]
        return read_generation(None, DEFAULTS, WanGenerationOptions, given)

    options, own = read("--prompt", "x")
    family = family_for_generation(own)
    dits = ExpertOffloader(family.experts, device, dit_loader(family, [], device, options), keep=True)
    session = Session(family, device, dits)

    def make(prompt: str, seed: int, arguments: Sequence[str]) -> Made:
        asked = read("--prompt", prompt, "--seed", str(seed), *arguments)[0]
        prepared = prepare_line(family, asked, {})
        (texts,) = session.encode_texts([select_prompts(prepared, asked.guidance)])
        with heard() as lines, dits.phase() as dit_at:
            start = time.process_time()
            latents = make_latents(family, dit_at, prepared, texts, {0: {}}, device)
            seconds = time.process_time() - start
        said = "\n".join(lines)
        print(f"seed {seed}: {' '.join(arguments[-2:])} {seconds:.1f} s", file=sys.stderr, flush=True)
        if "calibration" in " ".join(arguments):
            return Made(latents, None, seconds, said)
        with session.media(with_image_encoder=False, needed_again=True) as encoders:
            pixels = torch.cat([*family.decode(encoders, latents)], dim=2)[0]
        frames = pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0)
        return Made(latents, frames.numpy(), seconds, said)

    make("a red circle moving left", 0, [])  # warm up
    return make


@contextmanager
def heard() -> Iterator[list[str]]:
    """Yield a list that receives the log of the program."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def options_in(said: str) -> list[str]:
    """Return the option that a calibration has printed."""
    found = PRINTED.search(said)
    if found is None:
        raise SystemExit(f"the calibration printed no option:\n{said}")
    return found[0].split()


def report(found: dict[str, list[Made]], asked: Sequence[Any]) -> float:
    """Print a line for each setting; return the speed at MagCache's default threshold."""
    from statistics import mean

    import numpy as np

    from tests.pocket.detectors import look

    plain, speeds = found["no cache"], {}
    for name, videos in found.items():
        pairs = [*zip(plain, videos, strict=True)]
        drift = mean(float((one.latents - own.latents).norm() / own.latents.norm()) for own, one in pairs)
        psnr = [
            float(np.mean((one.frames.astype(float) - own.frames.astype(float)) ** 2)) for own, one in pairs
        ]
        in_decibels = mean(20 * math.log10(255) - 10 * math.log10(max(each, 1e-10)) for each in psnr)
        speeds[name] = sum(one.seconds for one in plain) / sum(one.seconds for one in videos)
        skipped = [SKIPPED.search(one.said) for one in videos]
        share = mean(int(each[1]) / int(each[2]) if each else 0.0 for each in skipped)
        right = mean(
            (seen.colour, seen.shape, seen.direction) == (one.colour, one.shape, one.direction)
            for one, seen in zip(asked, (look(video.frames) for video in videos), strict=True)
        )
        fidelity = "equal" if drift == 0 else f"drift {drift:.3f}, PSNR {in_decibels:.1f} dB"
        print(f"{name}: {share:.0%} skipped, {speeds[name]:.2f} x, {fidelity}, {right:.0%} right", flush=True)
    return speeds[f"--magcache_threshold {0.24:g}"]


if __name__ == "__main__":
    main()
