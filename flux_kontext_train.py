"""Fine-tune the whole transformer of FLUX.1 Kontext."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("flux_kontext", __doc__, full_dit=True)


if __name__ == "__main__":
    main.run()
