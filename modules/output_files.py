"""Check the name of a file before it is written. Standard library only."""

from collections.abc import Sequence
from pathlib import Path

from modules.errors import OptionError

# of files that are no safetensors file
OTHER_KINDS = {
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".txt",
    ".json",
    ".toml",
    ".zip",
    ".mp4",
    ".png",
}


def check_output_file(option: str, path: Path) -> None:
    """Raise OptionError if a safetensors file cannot be written under this name."""
    if path.suffix.lower() in OTHER_KINDS and not path.is_dir():
        raise OptionError(
            f"{option} {path}: a safetensors file is written. Give a name that ends in .safetensors"
        )
    check_place(option, path)


def check_place(option: str, path: Path) -> None:
    """Raise OptionError if no file can be written under this name: a folder has it, or a file is above it."""
    if path.is_dir():
        raise OptionError(f"{option} {path}: is a folder. Give the name of the file to write in it")
    above = next((folder for folder in path.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise OptionError(f"{option} {path}: {above} is a file, not a folder. Choose another folder")


def refuse_replacing(option: str, output: Path, inputs: Sequence[Path]) -> None:
    """Raise OptionError if the file to write is one of those that are read, under whatever name."""
    for path in inputs:
        is_same = output.resolve() == path.resolve()
        if is_same or (output.exists() and path.exists() and output.samefile(path)):
            raise OptionError(
                f"{option} {output} is one of the files to read, {path}, which would be lost. Give a new "
                "name."
            )
