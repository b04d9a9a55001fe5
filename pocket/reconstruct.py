"""Encode and decode the beginning of real clips with the pocket VAE, and show the results beside them.

python -m pocket.reconstruct FOLDER     reads FOLDER/clips, writes FOLDER/reconstructed: psnr.json and
                                        NAME.mp4 with the original on the left
"""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from modules.atomic_write import write_text
from modules.media.pixels import pixels_to_uint8
from modules.media.reading import resize_cover, video_frames
from modules.media.writing import write_video
from pocket import drawing
from pocket.footage import read_folder
from pocket.train_vae import as_pixels, psnr
from wan.vae import load_vae

VAE = Path(__file__).resolve().parent / "vae.safetensors"


def reconstruct(folder: Path) -> dict[str, float]:
    """Write the reconstructions of `folder`/clips; return the PSNR in dB by name of the clip."""
    vae = load_vae(VAE, torch.device("cpu"), torch.float32)
    figures = {}
    for path in sorted((folder / "clips").glob("*.mp4")):
        frames = islice(video_frames(path), drawing.FRAMES)
        clip = np.stack([resize_cover(frame, (drawing.SIZE, drawing.SIZE)) for frame in frames])
        pixels = as_pixels(clip[None])
        result = torch.cat(list(vae.decode(vae.encode(pixels))), dim=2)
        figures[path.stem] = psnr(pixels, result)
        beside = np.concatenate([clip, pixels_to_uint8(result)], axis=2)
        write_video(folder / "reconstructed" / path.name, iter(beside), drawing.FPS)
    write_text(folder / "reconstructed" / "psnr.json", json.dumps(figures))
    return figures


if __name__ == "__main__":
    reconstruct(read_folder(__doc__))
