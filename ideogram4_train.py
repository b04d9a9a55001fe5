"""Fine-tune the whole transformer of Ideogram 4."""

import modules.interpreter  # noqa: F401
from training.noise_options import IDEOGRAM_SHIFT
from training.options import TrainerChanges
from training.scripts import training_script

ONE_NETWORK = (
    "the second network runs beside a copy of --dit, which would not have what is trained here: samples "
    "of a whole model are made with the trained network alone. Make images with both by "
    "ideogram4_generate_image.py"
)
changes = TrainerChanges(
    settings={"timestep_sampling": {"default": IDEOGRAM_SHIFT}}, refused={"unconditional_dit": ONE_NETWORK}
)
main = training_script("ideogram4", __doc__, full_dit=True, changes=changes)


if __name__ == "__main__":
    main.run()
