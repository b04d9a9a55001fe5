"""Options that do nothing beside the others are named."""

from pathlib import Path

import pytest

from modules.contract.family import FLOW, NoiseSpec
from tests.training.toy import toy_options
from training.checks import list_unused_options


def named(
    folder: Path, *arguments: object, takes_guidance: bool = False, noise: NoiseSpec = FLOW
) -> set[str]:
    lines = list_unused_options(toy_options(folder, *arguments), takes_guidance, noise.table_is_shifted)
    return {line.partition(" has no effect: ")[0] for line in lines}


def test_a_usual_command_is_told_nothing(tmp_path: Path) -> None:
    usual = [
        *("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--save_every_n_steps", 2),
        *("--save_last_n_steps", 4),
    ]
    assert (
        named(
            tmp_path,
            *usual,
            *("--save_state", "--save_last_n_steps_state", 2, "--logging_dir", "logs", "--log_config"),
        )
        == set()
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--discrete_flow_shift", 3], {"--discrete_flow_shift"}),
        (["--timestep_sampling", "uniform", "--sigmoid_scale", 2], {"--sigmoid_scale"}),
        (["--timestep_sampling", "shift", "--weighting_scheme", "mode"], {"--weighting_scheme mode"}),
        (["--logit_mean", 1, "--logit_std", 2], {"--logit_mean", "--logit_std"}),
        (["--timestep_sampling", "logsnr", "--logit_mean", 1], set()),
        (["--weighting_scheme", "logit_normal", "--logit_mean", 1], set()),
        (["--huber_c", 0.2, "--huber_schedule", "constant"], {"--huber_c", "--huber_schedule"}),
        (["--loss_type", "huber", "--huber_c", 0.2, "--huber_scale", 2], {"--huber_scale"}),
        (["--loss_type", "smooth_l1", "--huber_schedule", "constant", "--huber_scale", 2], set()),
        (["--preserve_distribution_shape"], {"--preserve_distribution_shape"}),
        (["--lr_scheduler", "cosine", "--lr_scheduler_power", 2], {"--lr_scheduler_power"}),
        (["--lr_scheduler", "linear", "--lr_decay_steps", "10%"], {"--lr_decay_steps"}),
        (["--lr_scheduler", "cosine_with_restarts", "--lr_scheduler_num_cycles", 2], set()),
        (
            ["--lr_scheduler_type", "StepLR", "--lr_scheduler", "cosine", "--lr_warmup_steps", 5],
            {"--lr_scheduler", "--lr_warmup_steps"},
        ),
        (
            ["--save_last_n_epochs", 2, "--save_last_n_steps_state", 3],
            {"--save_last_n_epochs", "--save_last_n_steps_state"},
        ),
        (["--wandb_run_name", "a", "--log_config"], {"--wandb_run_name", "--log_config"}),
        (["--log_with", "wandb", "--wandb_run_name", "a", "--log_prefix", "b"], {"--log_prefix"}),
        (
            ["--huggingface_path_in_repo", "a", "--huggingface_token", "b"],
            {"--huggingface_path_in_repo", "--huggingface_token"},
        ),
        (["--guidance_scale", 6], {"--guidance_scale"}),
        (["--fp8_base", "--upcast_quantization"], {"--upcast_quantization"}),
        (["--fp8_base", "--fp8_scaled", "--upcast_quantization"], set()),
        (["--sdpa", "--flash_attn", "--xformers"], {"--flash_attn", "--xformers"}),
        (["--split_attn"], set()),
    ],
)
def test_what_has_no_effect_is_named(tmp_path: Path, arguments: list[object], expected: set[str]) -> None:
    assert named(tmp_path, *arguments) == expected


def test_guidance_is_for_models_that_take_it(tmp_path: Path) -> None:
    assert named(tmp_path, "--guidance_scale", 6, takes_guidance=True) == set()


def test_the_flow_shift_counts_on_a_table_that_it_shifts(tmp_path: Path) -> None:
    assert named(tmp_path, "--discrete_flow_shift", 3, noise=NoiseSpec(table_is_shifted=True)) == set()
