"""Fine-tune the whole transformer of Krea 2."""

import modules.interpreter  # noqa: F401
from training.options import TrainerChanges
from training.scripts import training_script

TURBO_LACKS_IT = (
    "Turbo's file does not contain what is trained here: samples are made with the trained transformer. To "
    "train Turbo itself, pass it to --dit with --dit_variant turbo"
)

main = training_script(
    "krea2",
    __doc__,
    full_dit=True,
    kind="FullTraining",
    changes=TrainerChanges(refused={"turbo_dit": TURBO_LACKS_IT}),
)


if __name__ == "__main__":
    main.run()
