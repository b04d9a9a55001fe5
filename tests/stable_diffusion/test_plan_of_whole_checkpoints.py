"""What the plan of a whole checkpoint's training predicts is what a real step counts."""

from pathlib import Path

import pytest
import torch

from contract.data import SIZES
from stable_diffusion import family as sd
from stable_diffusion.sd1.options import Sd1FineTuningOptions
from stable_diffusion.sdxl.options import SdxlWholeTrainingOptions
from tests.tiny.stable_diffusion import TEXT_DIM, WRITERS
from tests.training.planning.test_rehearsal import CHECKPOINTED, GIVEN, assert_takes_what_was_predicted, noisy
from training.image_options import CHECKPOINT_TRAINER, read_image_training
from training.learning_options import WholeDitOptions

ADAMW = "--optimizer_type AdamW"
FUSED = "--optimizer_type Adafactor --full_bf16 --fused_backward_pass --optimizer_args relative_step=False"
RECORDS = {"sdxl": SdxlWholeTrainingOptions, "sd1": Sd1FineTuningOptions, "sd2": Sd1FineTuningOptions}
KINDS = {"sdxl": sd.OF_XL, "sd1": sd.OF_SD, "sd2": sd.OF_SD}
CASES = [(kind, words) for kind in RECORDS for words in (FUSED, ADAMW)]


@pytest.mark.parametrize(
    ("kind", "words"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case != ("sdxl", ADAMW))) for case in CASES],
)
def test_a_step_of_a_unet_takes_what_was_predicted(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients, states of the optimizer, and activations of two pictures."""
    model = WRITERS[kind](tmp_path)
    typed = ["--pretrained_model_name_or_path", str(model), *GIVEN, *CHECKPOINTED, *words.split()]
    options, own, _ = read_image_training("", RECORDS[kind], CHECKPOINT_TRAINER, typed, WholeDitOptions)
    family = sd.family_for_training(KINDS[kind], own)
    names = ["hidden_state1", "hidden_state2"] if kind == "sdxl" else ["hidden_state"]
    tensors = {name: torch.zeros(2, 77, TEXT_DIM) for name in names}
    if kind == "sdxl":
        tensors |= {"pool2": torch.zeros(2, TEXT_DIM), SIZES: torch.full((2, 6), 64.0)}

    batch = noisy({"latents": torch.zeros(2, 4, 1, 16, 16), **tensors})
    assert_takes_what_was_predicted(family, options, batch, monkeypatch)
