"""Train on a folder that `new` has described: check, cache and train with its run.toml.

All options: python run_project.py --help
"""

import modules.interpreter  # noqa: F401
from modules.families import tool_script
from project.options import RunOptions

main = tool_script(__doc__, RunOptions, "project.running.run_project")


if __name__ == "__main__":
    main.run()
