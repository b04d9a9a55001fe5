"""Compare gen_img.py with diffusers' own pipeline.

    pip install transformers
    python benchmarks/gen_img.py

Both generate the same images from one random checkpoint, from prompts to pixels, with the same sampler,
steps, seeds and network classes, so that the ratio is the cost of our loop. They take turns in one process,
the baseline first in each round; the figure is the median ratio of neighbors. Peaks are of resident memory
above the loaded models, each in a process of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.process_memory import compare_peaks, peak, start_of_peak  # noqa: E402

BAR, MEMORY_BAR = 1.03, 1.1  # what malloc keeps differs from run to run
PROMPTS = ("a cat on a mat", "a red circle", "the sea at night", "a house and a tree")
AVOIDED = "blurry"
SCALE = 7.5
# the tests' tiny networks, with a wider U-Net
SIZES: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (128, 256)},
    "sdxl": {"block_out_channels": (64, 256), "attention_head_dim": (1, 4)},
}
Make = Callable[[], list[Any]]


def main() -> None:
    """Print the ratios of speed and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=list(SIZES), default="sd1", help="which line of models")
    parser.add_argument("--size", type=int, default=256, help="width and height of the images in pixels")
    parser.add_argument("--steps", type=int, default=10, help="steps of each image")
    parser.add_argument("--batch", type=int, default=2, choices=(1, 2, 3, 4), help="images at once")
    parser.add_argument("--rounds", type=int, default=10, help="number of rounds; each times both")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure_peak(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), args.kind)
        ratio = compare_speed(Path(folder), args)
        more = compare_peaks(("theirs", "ours"), Path(folder), "peak above the loaded models", MEMORY_BAR)
    raise SystemExit(ratio > BAR or more > MEMORY_BAR)


def write_models(folder: Path, kind: str) -> None:
    """Write a checkpoint in the layout of diffusers, and tokenizers."""
    from tests.tiny.stable_diffusion import tokenizer_folder, write_folder

    write_folder(kind, folder / "model", **SIZES[kind])
    tokenizer_folder(folder / "tokenizers")


def compare_speed(folder: Path, args: argparse.Namespace) -> float:
    """Print the U-Net calls per second of both, and return the median ratio of our seconds to theirs."""
    makers = {"diffusers": load_theirs(folder, args), "gen_img.py": load_ours(folder, args)}
    images = [make() for make in makers.values()]  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(args.rounds):
        for name, make in makers.items():
            began = time.perf_counter()
            make()
            seconds[name].append(time.perf_counter() - began)
    for name, found in seconds.items():
        print(f"{name}: {args.steps / statistics.median(found):.2f} U-Net calls a second")
    theirs, ours = seconds.values()
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    ratio, fastest = statistics.median(ratios), min(ours) / min(theirs)
    print(f"ratio of seconds {ratio:.3f}, of the fastest rounds {fastest:.3f}; bar {BAR}")
    print(f"largest difference of a pixel: {difference(*images)} of 255")
    return ratio


def difference(some: list[Any], others: list[Any]) -> int:
    """Return the largest difference between two lists of images."""
    import numpy as np

    pairs = zip(some, others, strict=True)
    return max(int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max()) for one, other in pairs)


def load_theirs(folder: Path, args: argparse.Namespace) -> Make:
    """Return a function that generates a batch with diffusers' pipeline."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline if args.kind == "sdxl" else StableDiffusionPipeline
    pipe = pipeline.from_pretrained(folder / "model")
    pipe.scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
    )
    pipe.set_progress_bar_config(disable=True)

    def make() -> list[Any]:
        found: list[Any] = pipe(
            list(PROMPTS[: args.batch]),
            negative_prompt=[AVOIDED] * args.batch,
            num_inference_steps=args.steps,
            guidance_scale=SCALE,
            width=args.size,
            height=args.size,
            generator=[torch.Generator().manual_seed(seed) for seed in range(args.batch)],
        ).images
        return found

    return make


def load_ours(folder: Path, args: argparse.Namespace) -> Make:
    """Return a function that generates a batch as gen_img.py does."""
    import torch

    from stable_diffusion.assembling import assemble
    from stable_diffusion.contract import ImageSettings, RequestedImage
    from stable_diffusion.options import read_gen_img

    words = ["--ckpt", str(folder / "model"), "--tokenizer_cache_dir", str(folder / "tokenizers")]
    options = read_gen_img("", [*words, "--prompt", "x", "--device", "cpu"])
    maker = assemble(options, torch.device("cpu"))
    settings = ImageSettings(args.size, args.size, args.steps, SCALE)
    images = [
        RequestedImage(f"image {seed}", prompt, AVOIDED, seed, settings, prompt)
        for seed, prompt in enumerate(PROMPTS[: args.batch])
    ]
    return lambda: list(maker.make(images).images or ())


def measure_peak(args: argparse.Namespace) -> None:
    """Generate one batch as a child process, and print by how many bytes the resident memory grew."""
    name, folder = args.child
    make = (load_theirs if name == "theirs" else load_ours)(Path(folder), args)
    before = start_of_peak()
    make()
    print(json.dumps(peak() - before))


if __name__ == "__main__":
    main()
