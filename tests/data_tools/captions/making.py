"""Datasets without captions, and options as they are typed."""

import json
from pathlib import Path

from data_tools.captions.options import CaptioningOptions
from modules.parser import parse_options
from tests.dataset.making import make_image

COLOURS = {"a": (200, 20, 20), "b b": (20, 200, 20), "ç": (20, 20, 200)}


def make_folder(folder: Path, captions: dict[str, str] | None = None, extension: str | None = ".txt") -> Path:
    """Three images, of which some have captions; returns the configuration."""
    images = folder / "im ages"
    images.mkdir()
    for name, colour in COLOURS.items():
        make_image(images / f"{name}.png", colour=colour)
    for name, text in (captions or {}).items():
        (images / f"{name}.txt").write_text(text, encoding="utf-8")
    config = folder / "data.toml"
    key = "" if extension is None else f"caption_extension = {extension!r}\n"
    config.write_text(f"[[datasets]]\nimage_directory = {str(images)!r}\n{key}", encoding="utf-8")
    return config


def make_list(folder: Path, lines: list[str] | None = None, keys: str = "") -> Path:
    """The same as a JSONL list. lines: `{}` becomes the path of an image."""
    for name, colour in COLOURS.items():
        make_image(folder / f"{name}.png", colour=colour)
    lines = ['{"image_path": {}}'] * 3 if lines is None else lines
    paths = [json.dumps(str(folder / f"{name}.png"), ensure_ascii=False) for name in COLOURS]
    text = "".join(f"{line.replace('{}', path)}\n" for line, path in zip(lines, paths, strict=True))
    (folder / "list.jsonl").write_text(text, encoding="utf-8", newline="")
    config = folder / "data.toml"
    where = (
        f"image_jsonl_file = {str(folder / 'list.jsonl')!r}\ncache_directory = {str(folder / 'cache')!r}\n"
    )
    config.write_text(f"[[datasets]]\n{where}{keys}\n", encoding="utf-8")
    return config


def read_captions(folder: Path) -> dict[str, str]:
    """The captions of `make_folder` by name."""
    return {
        path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / "im ages").glob("*.txt"))
    }


def read_lines(folder: Path) -> list[dict[str, object]]:
    """The lines of `make_list`."""
    return [
        json.loads(line) for line in (folder / "list.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]


def everything_in(folder: Path) -> dict[Path, bytes]:
    """All files of a folder and what is in them."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def options_of(config: Path, *words: object) -> CaptioningOptions:
    """Options as from the command line."""
    argv = ["--dataset_config", str(config), *map(str, words)]
    return parse_options("", argv, CaptioningOptions)[0]
