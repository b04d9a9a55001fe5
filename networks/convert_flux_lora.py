"""Convert a LoRA of FLUX.1 or Chroma between sd-scripts' and ai-toolkit's (diffusers') names.

All options: python networks/convert_flux_lora.py --help
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.parser import parse_options
from networks.tool_options import FluxConvertOptions


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, FluxConvertOptions)

    from networks.convert import convert_file

    assert options.src_path is not None
    assert options.dst_path is not None
    target = "diffusers" if options.dst == "ai-toolkit" else "default"
    convert_file(options.src_path, options.dst_path, target, "flux")


if __name__ == "__main__":
    command_line(main)
