"""Options that all tools have: of the run, and of the network. Standard library only."""

import os
from pathlib import Path

from modules.errors import OptionError
from modules.media.options import FormatOptions
from modules.option_values import to_path
from modules.options import Options, option


class ToolRunOptions(Options, title="input and output"):
    """The input, and the place of the result."""

    input: Path = option(
        "a video, a picture, or a folder: then each video and each picture in it is worked on by itself",
        required=True,
    )
    output: str | None = option(  # a text, because a path does not keep the / at its end
        "file of the result, whose ending is that of --container or .png, or folder for results (default: "
        "beside the input, with the name of the network added)",
        metavar="PATH",
    )
    yes: bool = option("overwrite results that exist, and ask nothing", flags=("-y",))
    device: str | None = option("cuda, cuda:1, mps or cpu (default: the best there is)")
    format: FormatOptions = option(defaults={"codec": "prores", "container": "mkv"})

    def __post_init__(self) -> None:
        if not self.input.exists():
            raise OptionError(f"--input {self.input} does not exist. Give a video, a picture, or a folder.")
        if self.output is not None and not self.output.strip():
            raise OptionError("--output is empty: give a file or a folder, or leave the option out")

    @property
    def output_path(self) -> Path | None:
        """Return --output as a path. Raises OptionError for a name that no file can have."""
        return None if self.output is None else to_path("--output", self.output)

    @property
    def means_folder(self) -> bool:
        """Return whether --output is written as a folder: `made/`."""
        ends = ("/", os.sep) if os.altsep is None else ("/", os.sep, os.altsep)
        return self.output is not None and self.output.endswith(ends)


class ToolNetworkOptions(Options, title="network"):
    """Which network works, and how."""

    model: Path = option("the network's file", required=True)
    dtype: str = option(
        "fp32 (float32), bf16 (bfloat16) or fp16 (float16): the halves take half the memory", default="fp32"
    )
    seed: str | None = option("of what is drawn at random; most of these networks draw nothing")
    compile: bool = option("compile the network with torch: slow to start, then faster")
