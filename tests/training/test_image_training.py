"""What image trainers do otherwise than video trainers, on a toy."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from modules.contract.loading import Placement
from modules.errors import OptionError
from tests.training.toy import same
from tests.training.toy_texts import (
    TextFamily,
    image_toy_options,
    train_image_toy,
    write_pictures,
    write_subset,
)
from training.noise_options import ADDITIVE, PREDICTIONS, SIGMA_SCALED
from training.run import prepare_run, train_network

CPU = torch.device("cpu")
ONLY = "--network_train_unet_only"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_two_steps_are_those_of_plain_torch(prediction: str, tmp_path: Path) -> None:
    write_pictures(tmp_path, texts=True)
    options = image_toy_options(
        tmp_path,
        *(ONLY, "--max_train_steps", 2, "--optimizer_type", "torch.optim.SGD", "--max_grad_norm", 0),
        *("--weighting_scheme", "sigma_sqrt", "--ip_noise_gamma", 0.1),
        prediction=prediction,
    )
    family = TextFamily()
    with prepare_run(family, options) as run:
        state = run.trainable.modules["network"].state_dict()
        factors = {name: tensor.clone().requires_grad_("lora" in name) for name, tensor in state.items()}
        batches = run.feed.batches
    dit = family.load_dit(Placement(CPU)).requires_grad_(False)

    for step in range(2):
        data = batches[(0, step)].data
        latents = 0.5 * data.batch.tensor("latents")
        sigma = data.sigmas.item()
        assert data.perturbation is not None
        noisy = (1 - sigma) * latents + sigma * (data.noise + data.perturbation)
        text = (data.batch.tensor("first") + 2 * data.batch.tensor("second")).mean()
        x = dit.embed(noisy.flatten(2).transpose(1, 2))
        for index, block in enumerate(dit.double_blocks):
            h = x + text + data.timesteps / 1000
            h = _with_lora(block.up, h, factors, f"lora_unet_double_blocks_{index}_up")
            x = x + _with_lora(block.down, torch.tanh(h), factors, f"lora_unet_double_blocks_{index}_down")
        output = dit.head(x).transpose(1, 2).view_as(noisy)
        if prediction == ADDITIVE:
            output = output + noisy
        elif prediction == SIGMA_SCALED:
            output = noisy - sigma * output
        weight = sigma**-2 if prediction == SIGMA_SCALED else 1.0
        loss = weight * (output - (data.noise - latents)).square().mean()
        trained = [tensor for tensor in factors.values() if tensor.requires_grad]
        for tensor, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            with torch.no_grad():
                tensor -= 1e-2 * gradient

    made = train_image_toy(
        tmp_path,
        *(ONLY, "--max_train_steps", 2, "--optimizer_type", "torch.optim.SGD", "--max_grad_norm", 0),
        *("--weighting_scheme", "sigma_sqrt", "--ip_noise_gamma", 0.1),
        prediction=prediction,
    )
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, factors[name].detach(), rtol=1e-5, atol=1e-6)


def _with_lora(layer: torch.nn.Module, x: Tensor, factors: dict[str, Tensor], name: str) -> Tensor:
    down, up = factors[f"{name}.lora_down.weight"], factors[f"{name}.lora_up.weight"]
    return layer(x) + x @ down.T @ up.T * (factors[f"{name}.alpha"] / len(down))


def test_the_prediction_that_is_no_velocity_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path)
    image_toy_options(tmp_path, prediction=SIGMA_SCALED)
    assert "Use raw" in caplog.text
    caplog.clear()
    image_toy_options(tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_samples_that_preserve_the_output_have_the_base_model_as_target(tmp_path: Path) -> None:
    """An untrained LoRA is the base model, so that nothing is learned."""
    write_subset(tmp_path, "custom_attributes.diff_output_preservation = true")

    tensors = train_image_toy(tmp_path, ONLY, "--text_encoder_lr", 0)

    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_up" in name)


@pytest.mark.parametrize("every", [("--validate_every_n_steps", 2), ("--validate_every_n_epochs", 1)])
def test_validation_is_at_four_levels_under_its_own_names(every: tuple[object, ...], tmp_path: Path) -> None:
    write_pictures(tmp_path, texts=True)
    options = image_toy_options(
        tmp_path, ONLY, "--validation_split", 0.5, "--max_validation_steps", 1, *every, "--min_timestep", 500
    )
    occasion = "step" if "steps" in str(every[0]) else "epoch"

    with prepare_run(TextFamily(), options) as run:
        losses = run.validation.measure(run.dits.at, run.autocast)
        logged = run.validation.rule.logged(losses, occasion, 0.25)

    assert list(losses) == ["validation/loss", *(f"validation/loss_{at}" for at in (600, 700, 800, 900))]
    assert logged == {
        f"loss/validation/{occasion}_average": losses["validation/loss"],
        f"loss/validation/{occasion}_divergence": losses["validation/loss"] - 0.25,
    }


def test_a_masked_loss_without_masks_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_subset(tmp_path, "")
    train_image_toy(tmp_path, ONLY, "--masked_loss", "--max_train_steps", 1)

    assert "--masked_loss has no effect" in caplog.text


def test_a_fused_run_is_the_plain_one_without_clipping(tmp_path: Path) -> None:
    write_pictures(tmp_path, texts=True)
    usual = ONLY, "--max_grad_norm", 0

    plain = train_image_toy(tmp_path, *usual)
    fused = train_image_toy(tmp_path, *usual, "--fused_backward_pass")

    assert same(plain, fused)


def test_a_run_may_begin_later(tmp_path: Path) -> None:
    """Its data and its schedule are those of these steps, and it can be resumed."""
    write_pictures(tmp_path, texts=True)
    later = "--initial_step", 3, "--lr_scheduler", "linear", ONLY

    whole = train_image_toy(tmp_path, *later, "--save_state", "--save_every_n_steps", 4)
    state = tmp_path / "output" / "x-step00000004-state"
    resumed = train_image_toy(tmp_path, *later, "--resume", state)

    assert same(whole, resumed)
    with safe_open(tmp_path / "output" / "x.safetensors", "pt") as file:
        assert file.metadata()["ss_steps"] == "6"
    with pytest.raises(OptionError, match="--initial_epoch 3 is step 8, but the run ends at step 6"):
        train_network(TextFamily(), image_toy_options(tmp_path, ONLY, "--initial_epoch", 3))


def test_metadata_say_how_an_image_lora_was_trained(tmp_path: Path) -> None:
    write_pictures(tmp_path, texts=True)
    train_image_toy(tmp_path, ONLY, "--metadata_trigger_phrase", "red", "--validation_split", 0.25)

    with safe_open(tmp_path / "output" / "x.safetensors", "pt") as file:
        made = file.metadata()
    assert made["ss_model_prediction_type"] == "raw"
    assert made["ss_loss_type"] == "l2"
    assert (made["ss_num_train_images"], made["ss_num_validation_images"]) == ("3", "1")
    assert made["modelspec.trigger_phrase"] == "red"
    assert made["modelspec.resolution"] == "1024x1024"
    assert made["modelspec.sai_model_spec"] == "1.0.1"
    assert made["ss_fp8_base_unet"] == "False"
    assert "ss_session_id" in made
    assert "ss_ss_session_id" not in made  # that is in files of video trainers
    assert json.loads(made["ss_network_args"]) == {}
    assert json.loads(made["ss_dataset_dirs"]) == {"images": {"n_repeats": 1, "img_count": 3}}
    assert json.loads(made["ss_bucket_info"])["buckets"] == {"0": {"resolution": [32, 32], "count": 3}}
