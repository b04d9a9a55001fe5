"""Train a LoRA for MiniMax-H3, video with sound."""

import modules.interpreter  # noqa: F401
from minimax_h3.training_options import UNIFORM, trainer_changes
from training.noise_options import SAMPLERS, WEIGHTINGS
from training.options import TrainerChanges
from training.scripts import training_script

changes = TrainerChanges(**trainer_changes(SAMPLERS, WEIGHTINGS))
main = training_script("minimax_h3", __doc__, samplers=(UNIFORM,), changes=changes)


if __name__ == "__main__":
    main.run()
