"""Merge LoRAs into a model file, one tensor at a time."""

import modules.interpreter  # noqa: F401
from networks.merging import MergeOptions
from protocols.families import plain_script

main = plain_script(__doc__, "networks.merging.merge_dit", MergeOptions)


if __name__ == "__main__":
    main.run()
