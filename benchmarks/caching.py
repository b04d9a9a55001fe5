"""Measure the overhead of a caching run over encoding, with an encoder that only waits as a GPU would.

    python benchmarks/caching.py --clips 24

Prints the ratio of the whole run to the waiting; 1.0 is perfect. The target is 1.15 on two cores.
"""

import argparse
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from dataset.caching.loop import cache_media  # noqa: E402
from dataset.config import load_dataset_config  # noqa: E402
from dataset.options import CachingOptions, CheckPageOptions, ShardOptions  # noqa: E402
from modules.media.writing import write_video  # noqa: E402
from protocols.data import CacheEntry, LatentSpec, MediaBatch, MediaEncoders, SamplingDefaults  # noqa: E402
from protocols.family import Abilities  # noqa: E402

CONFIG = """[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
resolution = [832, 480]
target_frames = [{frames}]
frame_extraction = "head"
"""


@dataclass(frozen=True)
class WaitingFamily:
    """Stand-in for a model family: its encoder sleeps, as the host does while a GPU works."""

    seconds: float  # per clip
    name: str = "waiting"
    abilities: Abilities = Abilities()
    cache_tag: str = "waiting"
    latent: LatentSpec = LatentSpec(channels=16, stride=(4, 8, 8), pixel_step=16, frame_step=4)
    defaults: SamplingDefaults = SamplingDefaults(50, 16.0, 5.0, None, 5.0, "unipc", 832, 480, 81)

    @property
    def media_identity(self) -> Mapping[str, str]:
        """A constant, as nothing is encoded."""
        return {"vae": "waiting"}

    def media_encoders(self, device: torch.device) -> MediaEncoders:
        """Return no networks."""
        return MediaEncoders(vae=None)

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Sleep as long as encoding would take, and return zero latents."""
        time.sleep(self.seconds * len(media.keys))
        frames, height, width = media.frames.shape[1:4]
        shape = self.latent.shape(frames, height, width)[1:]
        return [[CacheEntry({"latents": torch.zeros(shape, dtype=torch.bfloat16)})] for _ in media.keys]


def write_clip(path: Path, frames: int, size: tuple[int, int], seed: int) -> None:
    """Write a clip with motion and grain that is about as expensive to decode as footage."""
    width, height = size
    random = np.random.default_rng(seed)
    ground = random.integers(0, 255, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    grain = random.integers(0, 12, (height, width, 1), np.uint8)
    images = (
        np.roll(ground, 3 * index, axis=1) // 2 + np.roll(grain, 5 * index, axis=0) + 60
        for index in range(frames)
    )
    write_video(path, images, 16, crf=20, preset="veryfast")


def main() -> None:
    """Cache generated clips, and print the time and the peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--source_size", type=int, nargs=2, default=(832, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seconds", type=float, default=0.5, help="encoding time per clip")
    parser.add_argument("--num_workers", type=int, default=None)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "clips").mkdir()
        for index in range(args.clips):
            write_clip(folder / "clips" / f"{index:03d}.mp4", args.frames, tuple(args.source_size), index)
        (folder / "dataset.toml").write_text(
            CONFIG.format(folder=folder.as_posix(), frames=args.frames), encoding="utf-8"
        )
        before = peak_bytes()
        taken = run(folder, args)
    waiting = args.clips * args.seconds
    print(
        f"{args.clips} clips of {args.frames} frames at {args.source_size[0]}x{args.source_size[1]}: "
        f"{taken:.2f} s, of which {waiting:.2f} s waiting for the encoder"
    )
    print(f"peak memory {peak_bytes() / 1e9:.2f} GB, {before / 1e9:.2f} GB before the run")
    print(f"ratio {taken / waiting:.3f}")


def run(folder: Path, args: argparse.Namespace) -> float:
    """Return the seconds of one caching run."""
    options = CachingOptions(
        dataset_config=folder / "dataset.toml",
        device="cpu",
        batch_size=None,
        num_workers=args.num_workers,
        skip_existing=False,
        keep_cache=False,
        verify=False,
        disable_cudnn_backend=False,
        check=False,
        repair_captions=None,
        page=CheckPageOptions(html=None, html_items=500),
        shard=ShardOptions(num_shards=None, shard_index=None),
    )
    family: Any = WaitingFamily(args.seconds)
    start = time.perf_counter()
    report = cache_media(family, load_dataset_config(options.dataset_config), options)
    taken = time.perf_counter() - start
    assert report.written == args.clips, report
    return taken


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
