"""Fine-tune the whole transformer of Ideogram 4."""

import modules.interpreter  # noqa: F401
from training.noise_options import IDEOGRAM_SHIFT
from training.options import TrainerChanges
from training.scripts import training_script

changes = TrainerChanges(settings={"timestep_sampling": {"default": IDEOGRAM_SHIFT}})
main = training_script("ideogram4", __doc__, full_dit=True, changes=changes)


if __name__ == "__main__":
    main.run()
