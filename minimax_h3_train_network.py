"""Train a LoRA for MiniMax-H3, video with sound. All options: python minimax_h3_train_network.py --help"""

import modules.interpreter  # noqa: F401
from minimax_h3.training_options import LEVELS, SETTINGS, SHIFTS, translate
from training.noise_options import SAMPLERS, WEIGHTINGS
from training.options import TrainerChanges
from training.scripts import training_script

UNIFORM, NONE = "uniform", "none"  # the only sampler and weighting

changes = TrainerChanges(
    defaults={"timestep_sampling": UNIFORM},
    settings={
        **SETTINGS,
        "timestep_sampling": {"refused": dict.fromkeys({*SAMPLERS} - {UNIFORM}, LEVELS)},
        "weighting_scheme": {
            "choices": (NONE,),
            "refused": dict.fromkeys({*WEIGHTINGS} - {NONE}, LEVELS),
        },
    },
    refused={"discrete_flow_shift": SHIFTS},
    translate=translate,
)
main = training_script("minimax_h3", __doc__, samplers=(UNIFORM,), changes=changes)


if __name__ == "__main__":
    main.run()
