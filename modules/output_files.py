"""Check the name of a file before it is written. Standard library only."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from modules.errors import OptionError, OutputError

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
    if path.is_dir():
        raise OptionError(f"{option} {path}: is a folder. Give the name of the file to write in it")
    if path.suffix.lower() in OTHER_KINDS:
        raise OptionError(
            f"{option} {path}: a safetensors file is written. Give a name that ends in .safetensors"
        )
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


def ask_to_replace(paths: Sequence[Path], yes: bool, ask: Callable[[str], str] | None = None) -> None:
    """Ask whether files that exist may be replaced; do nothing if there are none, or `yes` is set.

    ask: shows a question and returns the answer; default: on the terminal, if there is one. Raises
    OutputError if the answer is no, or if there is nobody to ask.
    """
    existing = [path for path in paths if path.exists()]
    if not existing or yes:
        return
    more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
    if ask is None:
        if not has_terminal():
            raise OutputError(f"{existing[0]}{more} exists. Give another name, or -y to replace it.")
        ask = ask_on_terminal
    if ask(f"{existing[0]}{more} exists. Replace? [y/N] ").strip().lower() not in {"y", "yes"}:
        raise OutputError(f"{existing[0]} is kept. Nothing was written.")


def has_terminal() -> bool:
    """Return whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def ask_on_terminal(question: str) -> str:
    """Show a question and return the line that is typed; empty at the end of input."""
    sys.stderr.write(question)  # standard output is for results
    sys.stderr.flush()
    return sys.stdin.readline()
