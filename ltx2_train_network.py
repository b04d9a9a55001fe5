"""Train a LoRA for LTX-2 and LTX-2.3, with or without sound."""

import functools

import modules.interpreter  # noqa: F401
from ltx_2.options import warn_about_unused_sigmas
from training.noise_options import SAMPLERS, SHIFTED_LOGIT
from training.options import TrainerChanges
from training.scripts import training_script

changes = TrainerChanges(translate=functools.partial(warn_about_unused_sigmas, sampler=SHIFTED_LOGIT))
main = training_script("ltx_2", __doc__, samplers=(*SAMPLERS, SHIFTED_LOGIT), changes=changes)


if __name__ == "__main__":
    main.run()
