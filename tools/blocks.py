"""Write a LoRA with other strengths of its blocks, or with blocks of another LoRA in place of its own.

The new file gives the same results as --lora_blocks when generating. Its metadata lists what was changed.
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from networks.rewriting_blocks import BlockOptions, rewrite_blocks
from protocols.families import plain_script

main = plain_script(__doc__, rewrite_blocks, BlockOptions)


if __name__ == "__main__":
    main.run()
