"""Fine-tune the whole transformer of LTX-2 and LTX-2.3."""

import functools

import modules.interpreter  # noqa: F401
from ltx_2.options import warn_about_unused_sigmas
from training.noise_options import SAMPLERS, SHIFTED_LOGIT
from training.options import TrainerChanges
from training.scripts import training_script

NO_LORA = "all modules are trained; --trainable_modules trains those with a text in their names. Omit it"

changes = TrainerChanges(
    refused={"lora_target_preset": NO_LORA},
    translate=functools.partial(warn_about_unused_sigmas, sampler=SHIFTED_LOGIT),
)
main = training_script(
    "ltx_2",
    __doc__,
    full_dit=True,
    kind="FullTraining",
    samplers=(*SAMPLERS, SHIFTED_LOGIT),
    changes=changes,
)


if __name__ == "__main__":
    main.run()
