"""Measure peak memory of FramePack videos of 5 and of 50 sections.

    python benchmarks/framepack_memory.py

A child process runs fpack_generate_video.py on a tiny random model, first for a short video, so that
everything a run loads is loaded, and then for the measured video: text and images, every section, the preview
after each (or not, with --no_progressive_save), decoding, the video file. The figure is the highest resident
memory of the process above that before (VmHWM of /proc/self/status, so Linux only), less one copy of the
video's latents in float32. It is divided by the figure of the shortest video.

At 96 x 96 pixels a frame takes 108 KiB as float32 and 27 KiB as bytes. The 1620 additional frames of the
longest video would show as 171 MiB or 43 MiB if anything kept them, against a peak of about 140 MiB; a copy
of the latents is 3.7 MiB. In any section the network sees 19 latent frames of 12 x 12 of the past; all 450 of
them as tokens would show as well.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.process_memory import peak, require_linux, start_of_peak  # noqa: E402  # found from here on

AIM = 1.1
SIDE, WINDOW = 96, 9  # pixels; latent frames of a section
SECTIONS = (5, 50)
MODES: dict[str, tuple[str, ...]] = {
    "watched": (),
    "not watched": ("--no_progressive_save",),
    "F1, watched": ("--f1",),
}


def main() -> None:
    """Print the peaks of all lengths, and the worst ratio to the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sections",
        nargs="+",
        type=int,
        default=SECTIONS,
        help="numbers of sections; the others are compared with the first",
    )
    parser.add_argument("--child", nargs=2, metavar=("MODE", "SECTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        mode, sections = args.child
        print(_measure(MODES[mode], int(sections)))
        return
    require_linux()
    worst = max(_compare(mode, args.sections) for mode in MODES)
    print(f"worst ratio {worst:.3f}, aim at most {AIM}", flush=True)
    raise SystemExit(worst > AIM)


def _compare(mode: str, lengths: tuple[int, ...]) -> float:
    """Print a line for each length; return the largest ratio to the first."""
    peaks: list[float] = []
    for sections in lengths:
        command = [sys.executable, __file__, "--child", mode, str(sections)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        peaks.append(float(done.stdout.splitlines()[-1]))
        print(
            f"{mode}, {sections:3} sections: peak {peaks[-1] / 1e6:6.1f} MB, ratio "
            f"{peaks[-1] / peaks[0]:.3f}",
            flush=True,
        )
    return max(peaks) / peaks[0]


def _measure(options: tuple[str, ...], sections: int) -> int:
    """Return the bytes at the peak, less one copy of the latents. Runs in the child."""
    import tempfile

    import numpy as np

    from fpack_generate_video import main as generate
    from modules.media.writing import write_png
    from tests.tiny.framepack import write_tiny_framepack

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_tiny_framepack(folder / "models").models
        write_png(folder / "start.png", np.full((SIDE, SIDE, 3), 120, np.uint8))
        words = [
            "--prompt",
            "a cat",
            "--image_path",
            str(folder / "start.png"),
            "--save_path",
            str(folder / "out"),
            "--seed",
            "1",
        ]
        words += [
            "--video_size",
            str(SIDE),
            str(SIDE),
            "--infer_steps",
            "1",
            "--device",
            "cpu",
            *models,
            *options,
        ]
        generate([*words, "--video_sections", "2"])
        before = start_of_peak()
        generate([*words, "--video_sections", str(sections)])
        return peak() - before - 16 * (sections * WINDOW + 1) * (SIDE // 8) ** 2 * 4


if __name__ == "__main__":
    main()
