"""Measure an upscaler.

    python benchmarks/upscaling.py --model FILE

First its seconds per megapixel of the input, whole and in tiles; on a CPU the processor time. Then, for a
released file, how near it comes to real images that were reduced by its factor: PSNR against that of bicubic
enlargement. Files trained to look sharp (GAN) may be below bicubic there; those trained for PSNR must not.
Without --model, networks of the released sizes with random weights are timed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

RELEASED = ("swinir-medium", "realesrgan-x4plus", "realesrgan-x2plus")


def main() -> None:
    """Print the speed of each model and, for a given file, its quality."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a SwinIR or ESRGAN file")
    parser.add_argument("--clip", type=Path, help="a video (default: the smallest of the quickstart's)")
    parser.add_argument("--frames", type=int, default=4, help="of the clip, evenly spread over 100")
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), help="height, width: to be timed")
    parser.add_argument("--dtype", default="fp32", help="as of the script")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="as of the scripts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = [args.model] if args.model else list(_random_models(Path(folder)))
        for model in models:
            _time(model, args)
    if args.model:
        raise SystemExit(not _compare(args))


def _random_models(folder: Path) -> Iterator[Path]:
    """Write the released networks with random weights."""
    import torch

    from postprocessing.upscaling.rrdb import RrdbConfig, RRDBNet
    from postprocessing.upscaling.swinir import SwinIR, SwinirConfig

    swinir = SwinirConfig(180, (6,) * 6, (6,) * 6, 8, 360, 1, "nearest+conv", (2, 2), 64, 1.0)
    made = (SwinIR(swinir), *(RRDBNet(RrdbConfig(64, 32, 23, 2, cut, False)) for cut in (1, 2)))
    for name, network in zip(RELEASED, made, strict=True):
        path = folder / f"{name}.pth"
        torch.save(network.state_dict(), path)
        yield path


def _stage(model: Path, args: argparse.Namespace, scale: float, tile: int | None) -> Any:
    from modules.devices import select_device
    from postprocessing.options import ToolNetworkOptions, UpscalerOptions
    from postprocessing.upscaling.stage import make_upscaler

    network = ToolNetworkOptions(model=model, dtype=args.dtype)
    options = UpscalerOptions(network=network, scale=scale, tile=tile, batch_size=1)
    return make_upscaler(options, select_device(args.device))


def _run(stage: Any, pixels: list[Any]) -> list[Any]:
    """Return the enlarged images."""
    from fractions import Fraction

    from modules.media.encoding import OutputFrame
    from postprocessing.contract import Clip

    height, width = pixels[0].shape[:2]
    clip = Clip(Path("a clip"), width, height, Fraction(25), len(pixels), False)
    given = (OutputFrame(each, Fraction(index, 25), Fraction(1, 25)) for index, each in enumerate(pixels))
    return [image.pixels for image in stage.run(given, clip)]


def _time(model: Path, args: argparse.Namespace) -> None:
    import numpy as np

    from modules.devices import select_device

    # of all threads: other work on the machine does not count
    clock = time.process_time if select_device(args.device).type == "cpu" else time.perf_counter
    height, width = args.size
    pixels = [np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)]
    from postprocessing.upscaling.files import check_file

    kind, config = check_file(model)
    found = []
    for tile in (0, max(args.size) // 2):
        if tile and tile < 64:
            continue
        stage = _stage(model, args, config.factor, tile)
        _run(stage, pixels)
        seconds = []
        for _ in range(args.rounds):
            start = clock()
            _run(stage, pixels)
            seconds.append(clock() - start)
        what = f"in tiles of {tile}" if tile else "whole"
        found.append(f"{what} {1e6 * statistics.median(seconds) / (height * width):.1f} s")
    print(
        f"{model.name}: {kind.name}, {config.factor} times as large, {width}x{height}: a megapixel of input "
        + ", ".join(found)
    )


def _compare(args: argparse.Namespace) -> bool:
    """Print how near network and bicubic enlargement come to real images; return whether the network wins."""
    import torch

    from modules.media.reading import video_frames
    from pocket.footage import real_clips
    from postprocessing.contract import to_pixels, to_tensor
    from postprocessing.upscaling.files import check_file
    from postprocessing.upscaling.stage import resize

    cpu = torch.device("cpu")
    factor = check_file(args.model)[1].factor
    path = args.clip or real_clips()["carphone_pristine.mp4"]
    frames = list(islice(video_frames(path), 0, 100, max(100 // args.frames, 1)))
    height, width = (side // factor * factor for side in frames[0].shape[:2])
    truth = [to_tensor(frame[:height, :width], cpu) for frame in frames]
    small = [to_pixels(resize(each, (height // factor, width // factor)), False) for each in truth]
    enlarged = _run(_stage(args.model, args, factor, None), small)
    ours = statistics.mean(
        _psnr(to_tensor(each, cpu), real) for each, real in zip(enlarged, truth, strict=True)
    )
    plain = statistics.mean(
        _psnr(resize(to_tensor(each, cpu), (height, width)).clamp(0, 1), real)
        for each, real in zip(small, truth, strict=True)
    )
    print(f"{path.name}, {len(truth)} frames: PSNR {ours:.2f} dB, bicubic {plain:.2f} dB")
    return ours > plain


def _psnr(made: Any, real: Any) -> float:
    import torch

    return float(-10 * torch.log10((made - real).square().mean()))


if __name__ == "__main__":
    main()
