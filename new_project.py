"""Describe a folder of clips or images for training: write dataset.toml, prompts.txt and run.toml into it."""

import modules.interpreter  # noqa: F401
from project.new_options import NewOptions
from protocols.families import plain_script

main = plain_script(__doc__, "project.files.write_project", NewOptions)


if __name__ == "__main__":
    main.run()
