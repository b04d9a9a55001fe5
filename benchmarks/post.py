"""Measure a tool's whole run from file to file against its bare network.

    python benchmarks/post.py

A clip with random weights of SwinIR (the released light model's widths) goes through reading, the stage and
writing, and in turns the same network runs over the same frames in memory. The figure is the median ratio of
neighbors, seconds of the bare loop divided by seconds of the run; at 1, reading and writing are hidden
completely. On a machine with other work, read the second figure: the processor time of the thread with the
network.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from checkpoints.writing import save_tensors  # noqa: E402
from modules.devices import select_device  # noqa: E402
from modules.media.options import FormatOptions  # noqa: E402
from modules.media.reading import video_frames  # noqa: E402
from modules.media.writing import write_video  # noqa: E402
from postprocessing.contract import to_tensor  # noqa: E402
from postprocessing.naming import FileJob  # noqa: E402
from postprocessing.options import ToolNetworkOptions, UpscalerOptions  # noqa: E402
from postprocessing.run import run_video  # noqa: E402
from postprocessing.stages import NamedStage  # noqa: E402
from postprocessing.upscaling.files import load_upscaler  # noqa: E402
from postprocessing.upscaling.stage import make_upscaler  # noqa: E402
from postprocessing.upscaling.swinir import SwinIR, SwinirConfig  # noqa: E402

AIM = 0.9
Measure = Callable[[], tuple[float, float]]  # seconds on the wall, and of this thread on the processor


def main() -> None:
    """Print the ratio of the bare loop to the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=24, help="of the clip")
    parser.add_argument("--size", type=int, nargs=2, default=(96, 160), help="its height and width")
    parser.add_argument("--depth", type=int, default=2, help="blocks in each of 4 layers; released: 6")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--codec", default="prores", help="as of the tools")
    parser.add_argument("--threads", type=int, default=1, help="of the network; others read and write")
    parser.add_argument("--device", help="as of the tools")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        bare, full = _measures(Path(folder), args)
        bare()
        full()
        pairs = [(bare(), full()) for _ in range(args.rounds)]
    wall, own = (statistics.median(alone[kind] / run[kind] for alone, run in pairs) for kind in range(2))
    seconds = statistics.median(run[0] for _, run in pairs)
    print(
        f"{args.frames} frames of {args.size[1]} x {args.size[0]} to {args.codec}: {seconds:.2f} s, "
        f"{args.frames / seconds:.2f} a second; bare loop / run {wall:.3f} on the wall, {own:.3f} of the "
        f"thread's time, aim at least {AIM}"
    )
    raise SystemExit(wall < AIM)


def _measures(folder: Path, args: argparse.Namespace) -> tuple[Measure, Measure]:
    """Return the two functions to compare."""
    clip, model = folder / "clip.mp4", folder / "swinir.safetensors"
    height, width = args.size
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (height // 8 + 1, width // 8 + args.frames, 3), dtype=np.uint8)
    large = noise.repeat(8, 0).repeat(8, 1)[:height]  # which moves to the left
    write_video(clip, (large[:, 2 * at : 2 * at + width] for at in range(args.frames)), 16, preset="fast")
    config = SwinirConfig(
        dim=60, heads=(6,) * 4, depths=(args.depth,) * 4, window=8, hidden=120, convolutions=1,
        upsampler="pixelshuffle", upsampling_factors=(2,), features=64, pixel_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    save_tensors(model, SwinIR(config).state_dict())
    device = select_device(args.device)
    options = UpscalerOptions(network=ToolNetworkOptions(model=model), scale=2.0, tile=0, batch_size=1)
    stage = NamedStage(make_upscaler(options, device))
    network = load_upscaler(model, device, torch.float32).network
    frames = list(video_frames(clip))
    form = FormatOptions(codec=args.codec, container="mkv", keep_pngs=False)

    def bare() -> tuple[float, float]:
        start = time.perf_counter(), time.thread_time()
        with torch.no_grad():
            for frame in frames:
                made = network(to_tensor(frame, device))
        made.cpu()  # waits for a GPU
        return time.perf_counter() - start[0], time.thread_time() - start[1]

    def whole() -> tuple[float, float]:
        start = time.perf_counter(), time.thread_time()
        run_video([stage], FileJob(clip, folder / "made.mkv", False), [], form)
        return time.perf_counter() - start[0], time.thread_time() - start[1]

    return bare, whole


if __name__ == "__main__":
    main()
