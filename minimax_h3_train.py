"""Fine-tune the whole transformer of MiniMax-H3."""

import modules.interpreter  # noqa: F401
from minimax_h3.training_options import TEACHER_OPTIONS, UNIFORM, trainer_changes
from training.learning_options import NO_FROZEN_MODEL
from training.noise_options import SAMPLERS, WEIGHTINGS
from training.options import TrainerChanges
from training.scripts import training_script

common = trainer_changes(SAMPLERS, WEIGHTINGS)
teacher_refusals = dict.fromkeys(TEACHER_OPTIONS, NO_FROZEN_MODEL)
changes = TrainerChanges(**{**common, "refused": {**common["refused"], **teacher_refusals}})
main = training_script(
    "minimax_h3", __doc__, full_dit=True, kind="FullTraining", samplers=(UNIFORM,), changes=changes
)


if __name__ == "__main__":
    main.run()
