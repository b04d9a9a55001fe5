"""Train on a folder that `new` has described: check, cache and train with its run.toml."""

import modules.interpreter  # noqa: F401
from project.run_options import RunOptions
from protocols.families import plain_script

main = plain_script(
    __doc__, "project.running.run_project", RunOptions, advice_after_interrupt=lambda run: run.going_on
)


if __name__ == "__main__":
    main.run()
