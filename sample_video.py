"""Generate videos with HunyuanVideo by the command line of its release.

hv_generate_video.py has more.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import modules.interpreter  # noqa: F401
from generation.options import GenerationOptions
from hunyuan_model.official_options import TYPED, generation_argv, read_official
from hv_generate_video import main as generate_video
from modules.command import command_line, name_as_typed
from protocols.families import identify

if TYPE_CHECKING:
    from hunyuan_model.family import HunyuanVideo


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options of the release, then do what hv_generate_video.py does with the same in its words."""
    official = read_official(__doc__, argv)

    def make(family: "HunyuanVideo", options: GenerationOptions) -> None:
        from generation.run import generate
        from modules.devices import select_compute_dtype

        dtype = select_compute_dtype(official.model.precision, "--precision", None)
        output = replace(options.output, naming="released")
        settings = {**options.settings, "precision": official.model.precision}
        options = replace(options, output=output, settings=settings)
        generate(replace(family, files=replace(family.files, dit_dtype=dtype)), options)

    with name_as_typed(TYPED):
        generate_video(generation_argv(official), make)


if __name__ == "__main__":
    command_line(main, explain=identify)
