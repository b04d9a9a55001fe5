"""Convert a LoRA of HunyuanImage-2.1 to ComfyUI's names, or back.

All options: python networks/convert_hunyuan_image_lora_to_comfy.py --help
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
from networks.tool_options import ComfyConvertOptions


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, ComfyConvertOptions)

    from networks.names.image import HUNYUAN_IMAGE
    from networks.writing import rename_file

    rename_file(options.src_path, options.dst_path, HUNYUAN_IMAGE, options.reverse)


if __name__ == "__main__":
    command_line(main)
