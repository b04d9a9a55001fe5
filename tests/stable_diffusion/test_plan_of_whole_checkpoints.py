"""What the plan of a whole checkpoint's training predicts is what a real step counts."""

from pathlib import Path

import pytest
import torch

from protocols.data import SIZES
from protocols.loading import Placement
from stable_diffusion import family as sd
from stable_diffusion.sd1.options import Sd1FineTuningOptions
from stable_diffusion.sdxl.options import SdxlFullTrainingOptions
from stable_diffusion.training_files import number_blocks
from tests.tiny.stable_diffusion import TEXT_DIM, WRITERS
from tests.training.planning.test_rehearsal import CHECKPOINTED, GIVEN, assert_takes_what_was_predicted, noisy
from training.image_options import CHECKPOINT_TRAINER, read_image_training
from training.learning_options import FullDitOptions
from training.loss import NoisyBatch
from training.options import TrainingOptions
from training.planning.memory import predict_memory

ADAMW = "--optimizer_type AdamW"
FUSED = "--optimizer_type Adafactor --full_bf16 --fused_backward_pass --optimizer_args relative_step=False"
RECORDS = {"sdxl": SdxlFullTrainingOptions, "sd1": Sd1FineTuningOptions, "sd2": Sd1FineTuningOptions}
KINDS = {"sdxl": sd.ONLY_SDXL, "sd1": sd.SD1_AND_SD2, "sd2": sd.SD1_AND_SD2}
CASES = [(kind, words) for kind in RECORDS for words in (FUSED, ADAMW)]


@pytest.mark.parametrize(
    ("kind", "words"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case != ("sdxl", ADAMW))) for case in CASES],
)
def test_a_step_of_a_unet_takes_what_was_predicted(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, gradients, states of the optimizer, and activations of two pictures."""
    family, options = read_training(kind, WRITERS[kind](tmp_path), *CHECKPOINTED, *words.split())

    assert_takes_what_was_predicted(family, options, batch_of(kind), monkeypatch)


def read_training(kind: str, model: Path, *words: str) -> tuple[sd.StableDiffusion, TrainingOptions]:
    typed = ["--pretrained_model_name_or_path", str(model), *GIVEN, *words]
    options, own, _ = read_image_training("", RECORDS[kind], CHECKPOINT_TRAINER, typed, FullDitOptions)
    return sd.family_for_training(KINDS[kind], own), options


def batch_of(kind: str) -> NoisyBatch:
    names = ["hidden_state1", "hidden_state2"] if kind == "sdxl" else ["hidden_state"]
    tensors = {name: torch.zeros(2, 77, TEXT_DIM) for name in names}
    if kind == "sdxl":
        tensors |= {"pool2": torch.zeros(2, TEXT_DIM), SIZES: torch.full((2, 6), 64.0)}
    return noisy({"latents": torch.zeros(2, 4, 1, 16, 16), **tensors})


def test_an_average_counts_what_learns_alone(tmp_path: Path) -> None:
    model = WRITERS["sdxl"](tmp_path)
    family, _ = read_training("sdxl", model)
    count = number_blocks(family.files.unet_config).count - 1

    def average(*words: str) -> int:
        typed = ("--ema_decay", "0.9", "--learning_rate_te1", "0", "--learning_rate_te2", "0", *words)
        return predict_memory(
            *read_training("sdxl", model, *typed), batch_of("sdxl"), torch.device("cpu")
        ).host_average_bytes

    embeddings = average("--block_lr", ",".join(["1e-5", *["0"] * count]))
    blocks = average("--block_lr", ",".join(["0", *["1e-5"] * count]))
    unet = family.load_dit(Placement(torch.device("meta")))
    assert 0 < embeddings < blocks
    assert embeddings + blocks == 4 * sum(weight.numel() for weight in unet.parameters())
