"""Train a LoRA for MOSS-Image."""

import modules.interpreter  # noqa: F401
from training.noise_options import SAMPLERS, TRUNCATED_LOGIT
from training.options import TrainerChanges
from training.scripts import training_script

changes = TrainerChanges(settings={"timestep_sampling": {"default": TRUNCATED_LOGIT}})
main = training_script("moss_image", __doc__, samplers=(*SAMPLERS, TRUNCATED_LOGIT), changes=changes)


if __name__ == "__main__":
    main.run()
