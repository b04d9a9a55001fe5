"""Training with products in fp8 ends where training in bf16 does: the pocket model learns a made-up word
through the real training code, with the products emulated.

What fp8 adds to the validation loss is the rounding of weights, which the LoRA makes up for in time, and that
of activations: 1.3 % before training, 0.7 and 1.0 % after 24 steps (two seeds). At the quickstart's learning
rate rounding of sums alone moves the end of a run by more than that; hence a third of it here, and the mean
of two seeds.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from torch import nn

import wan_cache_latents
import wan_cache_text_encoder_outputs
from checkpoints.stored.fp8_products import Product
from modules.options import read_options
from modules.parser import add_options
from pocket.clips import write_clips
from pocket.concepts import CONCEPTS, draw_known
from pocket.measure import POCKET, model_options
from protocols.loading import Placement
from tests.fp8_reference import emulated_product
from training.loop import train
from training.options import TrainingOptions, read_arguments, training_parser
from training.run import prepare_run
from wan.family import family_for_training
from wan.options import WanTrainingOptions

STEPS, PARITY = 4, 0.01  # the loss may differ by 1 %
TABLE = """
[[datasets]]
video_directory = '{folder}/{name}'
cache_directory = '{folder}/{name}_cache'
target_frames = [17]
"""


@dataclasses.dataclass(frozen=True)
class Emulating:
    """A family whose networks multiply with this product, whatever the device."""

    family: Any
    product: Product

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        assert placement.quantization is not None
        fp8 = dataclasses.replace(placement.quantization, fp8_matmul=True, product=self.product)
        return self.family.load_dit(dataclasses.replace(placement, quantization=fp8), expert)


def cached(folder: Path, clips: int, validation: int, batch_size: int) -> Path:
    """Clips of a word to learn and of what is known, half and half, and others of the word to validate on,
    cached.
    """
    text = f'[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\nbatch_size = {batch_size}\n'
    sets = (
        ("new", clips, CONCEPTS["blorp"].make),
        ("known", clips, draw_known),
        ("held_out", validation, CONCEPTS["blorp"].make),
    )
    for seed, (name, count, make) in enumerate(sets):
        write_clips(folder / name, count, seed, make)
        text += TABLE.format(folder=folder.as_posix(), name=name)
    path = folder / "dataset.toml"
    path.write_text(text + "validation = true\n", encoding="utf-8")
    given = ["--dataset_config", str(path), "--device", "cpu"]
    wan_cache_latents.main([*given, "--vae", str(POCKET / "vae.safetensors"), "--vae_dtype", "float32"])
    wan_cache_text_encoder_outputs.main([*given, "--t5", str(POCKET / "t5.safetensors")])
    return folder


def losses(folder: Path, product: Product | None, *options: object) -> tuple[float, float]:
    """The validation loss before and after training."""
    AcceleratorState._reset_state(reset_partial_state=True)
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    words = "--network_module networks.lora_wan --network_dim 32 --network_alpha 32 --seed 42"
    words += " --timestep_sampling shift --discrete_flow_shift 3 --max_data_loader_n_workers 0"
    words += " --learning_rate 3e-3 --lr_scheduler cosine --mixed_precision bf16 --output_name x"
    files = ["--dataset_config", folder / "dataset.toml", "--output_dir", folder / "output"]
    weights = [] if product is None else ["--fp8_base", "--fp8_scaled"]
    given = [*model_options(POCKET), *files, *words.split(), *weights, *options]
    args = read_arguments(parser, [str(one) for one in given], {})
    family: Any = family_for_training(read_options(WanTrainingOptions, args))
    if product is not None:
        family = Emulating(family, product)
    with prepare_run(family, read_options(TrainingOptions, args)) as run:
        found = []
        for step in (lambda: None, lambda: train(run)):
            step()
            run.model.dits.on_device(0).eval()
            assert run.validation is not None
            found.append(run.validation.measure(run.model.dits.on_device, run.autocast)["validation/loss"])
    return found[0], found[1]


@pytest.mark.slow
def test_a_few_steps_in_fp8_end_where_those_in_bf16_do(tmp_path: Path) -> None:
    folder = cached(tmp_path, clips=4, validation=2, batch_size=4)
    _, in_bf16 = losses(folder, None, "--max_train_steps", STEPS)  # 0.440, from 0.461
    before, after = losses(folder, emulated_product, "--max_train_steps", STEPS)

    assert after == pytest.approx(in_bf16, rel=PARITY)  # measured: 0.3 % above
    assert before - after > 5 * abs(after - in_bf16)


@pytest.mark.slow
def test_training_in_fp8_ends_where_training_in_bf16_does(tmp_path: Path) -> None:
    folder = cached(tmp_path, clips=16, validation=8, batch_size=8)
    ends: dict[Product | None, list[float]] = {None: [], emulated_product: []}
    for seed in (42, 43):
        for product, found in ends.items():
            before, after = losses(
                folder, product, "--max_train_steps", 24, "--seed", seed, "--learning_rate", "1e-3"
            )
            assert after < 0.9 * before
            found.append(after)

    assert sum(ends[emulated_product]) == pytest.approx(sum(ends[None]), rel=PARITY)  # measured: 0.8 % above
