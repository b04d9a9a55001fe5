"""Fine-tune the whole transformer of Kandinsky 5 or 6."""

import modules.interpreter  # noqa: F401
from training.scripts import training_script

main = training_script("kandinsky", __doc__, full_dit=True)


if __name__ == "__main__":
    main.run()
