"""Measure peak memory of the tiled HunyuanVideo VAE, for clips of growing length and size.

    python benchmarks/hunyuan_vae_memory.py

A child process encodes a clip or decodes latents with a narrow random VAE and discards each chunk of frames,
as writing a video does. The figure is the highest resident memory of the process above that before (VmHWM of
/proc/self/status, so Linux only), less the pixels that must be in memory: the clip when encoding, one tile's
length of frames when decoding. It is divided by the figure of the smallest clip. The last lines, without
tiles, show for comparison how memory grows if nothing bounds it.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.process_memory import peak, require_linux, start_of_peak  # noqa: E402  # found from here on

AIM = 1.1
TILE, WIDTH = 64, 16  # edge of a tile in pixels; channels of the first level, 128 in the released VAE
CLIPS = ((65, 96, 96), (129, 96, 96), (257, 96, 96), (65, 192, 192))  # frames, height, width
FULL = ((33, 96, 96), (65, 96, 96), (129, 96, 96))


def main() -> None:
    """Print the peaks for each clip, and the worst ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--child", nargs=5, metavar=("WHAT", "TILING", "FRAMES", "HEIGHT", "WIDTH"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.child:
        what, tiling, *sizes = args.child
        print(_measure(what, tiling == "tiles", *(int(size) for size in sizes)))
        return
    require_linux()
    worst = max(_compare(what, "tiles", CLIPS) for what in ("decode", "encode"))
    print(f"worst ratio {worst:.3f}, aim at most {AIM}", flush=True)
    for what in ("decode", "encode"):
        _compare(what, "whole", FULL)
    raise SystemExit(worst > AIM)


def _compare(what: str, tiling: str, clips: tuple[tuple[int, int, int], ...]) -> float:
    """Print a line for each clip; return the largest ratio to the first."""
    peaks: list[float] = []
    for clip in clips:
        command = [sys.executable, __file__, "--child", what, tiling, *map(str, clip)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        peaks.append(
            float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
        )
        frames, height, width = clip
        print(
            f"{what} in {tiling}, {frames:3} frames of {height:3} x {width:3}: peak {peaks[-1] / 1e6:6.1f} "
            f"MB, ratio {peaks[-1] / peaks[0]:.3f}",
            flush=True,
        )
    return max(peaks) / peaks[0]


def _measure(what: str, tiling: bool, frames: int, height: int, width: int) -> int:
    """Return the bytes at the peak, less the pixels that must be in memory. Runs in the child."""
    import tempfile

    import torch

    from hunyuan_model.vae import load_vae
    from tests.tiny.hunyuan_vae import write_vae

    with tempfile.TemporaryDirectory() as folder:
        path = write_vae(Path(folder) / "vae.safetensors", WIDTH)
        vae = load_vae(path, torch.device("cpu"), torch.float32, tile=TILE if tiling else None)
    vae.encode(torch.zeros(1, 3, 5, 16, 16))  # so that what a first call loads does not count
    list(vae.decode(torch.zeros(1, 16, 2, 2, 2)))
    pixel_bytes = 3 * height * width * 4
    if what == "encode":
        # allocated before the first reading, so it does not count
        pixels, needed = torch.zeros(1, 3, frames, height, width).uniform_(-1, 1), 0
        before = start_of_peak()
        vae.encode(pixels)
    else:
        latents = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        needed = min(frames, 65) * pixel_bytes
        before = start_of_peak()
        for chunk in vae.decode(latents):
            del chunk
    return peak() - before - needed


if __name__ == "__main__":
    main()
