"""Prepare clips and captions in CogVideoX form: the folders that load_tensors of a dataset reads.

All options: python prepare_dataset.py --help
"""

import modules.interpreter  # noqa: F401
from data_tools.cogvideox.options import PrepareOptions
from modules.families import plain_script

main = plain_script(__doc__, "data_tools.cogvideox.preparing.prepare", PrepareOptions)


if __name__ == "__main__":
    main.run()
