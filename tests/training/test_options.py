"""The options that training has in every family, and those that do nothing beside the others."""

import argparse
from pathlib import Path

import pytest

from frame_pack.options import FramePackTrainingOptions
from hunyuan_model.options import HunyuanTrainingOptions
from modules.errors import OptionError, UserError
from modules.installation import import_own
from modules.options import get_option_info, read_options
from modules.parser import add_options
from modules.script_options import parse_options
from protocols.family import FLOW, NoiseSpec
from tests.training.toy import toy_options
from training.checks import list_unused_options
from training.features.composing import options_by_expert
from training.learning_options import ExpertTrainingOptions
from training.options import TrainingOptions, read_arguments, training_parser
from training.scripts import training_script
from wan.options import WanTrainingOptions


def named(folder: Path, words: str, takes_guidance: bool = False, noise: NoiseSpec = FLOW) -> set[str]:
    """The options of a command that have no effect. words: FILE stands for a file that exists."""
    argv = [__file__ if word == "FILE" else word for word in words.split()]
    lines = list_unused_options(toy_options(folder, *argv), takes_guidance, noise.table_is_shifted)
    return {line.partition(" has no effect: ")[0] for line in lines}


def test_a_usual_command_is_told_nothing(tmp_path: Path) -> None:
    default = (
        "--timestep_sampling shift --discrete_flow_shift 3 --save_every_n_steps 2 --save_last_n_steps 4 "
    )
    default += "--save_state --save_last_n_steps_state 2 --logging_dir logs --log_config"
    assert named(tmp_path, default) == set()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--discrete_flow_shift 3", "--discrete_flow_shift"),
        ("--timestep_sampling uniform --sigmoid_scale 2", "--sigmoid_scale"),
        ("--timestep_sampling shift --weighting_scheme mode", "--weighting_scheme mode"),
        ("--logit_mean 1 --logit_std 2", "--logit_mean, --logit_std"),
        ("--timestep_sampling logsnr --logit_mean 1", ""),
        ("--weighting_scheme logit_normal --logit_mean 1", ""),
        ("--huber_c 0.2 --huber_schedule constant", "--huber_c, --huber_schedule"),
        ("--loss_type huber --huber_c 0.2 --huber_scale 2", "--huber_scale"),
        ("--loss_type smooth_l1 --huber_schedule constant --huber_scale 2", ""),
        ("--preserve_distribution_shape", "--preserve_distribution_shape"),
        ("--lr_scheduler cosine --lr_scheduler_power 2", "--lr_scheduler_power"),
        ("--lr_scheduler linear --lr_decay_steps 10%", "--lr_decay_steps"),
        ("--lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 2", ""),
        (
            "--lr_scheduler_type StepLR --lr_scheduler cosine --lr_warmup_steps 5",
            "--lr_scheduler, --lr_warmup_steps",
        ),
        (
            "--save_last_n_epochs 2 --save_last_n_steps_state 3",
            "--save_last_n_epochs, --save_last_n_steps_state",
        ),
        ("--mode_scale 1", "--mode_scale"),
        ("--weighting_scheme mode --mode_scale 1", ""),
        ("--no_metadata --training_comment a", "--training_comment"),
        ("--network_weights FILE --network_alpha 8", "--network_alpha"),
        ("--wandb_run_name a --log_config", "--log_config, --wandb_run_name"),
        ("--log_with wandb --wandb_run_name a --log_prefix b", "--log_prefix"),
        (
            "--huggingface_path_in_repo a --huggingface_token b",
            "--huggingface_path_in_repo, --huggingface_token",
        ),
        ("--guidance_scale 6", "--guidance_scale"),
        ("--ema_decay 0.9 --sample_ema", "--sample_ema"),
        ("--fp8_base --upcast_quantization", "--upcast_quantization"),
        ("--fp8_base --fp8_scaled --upcast_quantization", ""),
        # usual values do as little, if they are typed
        ("--discrete_flow_shift 1", "--discrete_flow_shift"),
        ("--guidance_scale 1", "--guidance_scale"),
        ("--huber_c 0.1", "--huber_c"),
        ("--loss_type huber --huber_c 0.1", ""),
        ("--convrot_int8_bwd bf16", "--convrot_int8_bwd"),
        ("--ema_update_every 1", "--ema_update_every"),
        ("--network_module networks.oft --network_alpha 1", "--network_alpha"),
        ("--sdpa --flash_attn --xformers", "--flash_attn, --xformers"),
        ("--split_attn", ""),
    ],
)
def test_what_has_no_effect_is_named(tmp_path: Path, words: str, expected: str) -> None:
    assert ", ".join(sorted(named(tmp_path, words))) == expected


def test_guidance_and_a_flow_shift_are_for_models_that_take_them(tmp_path: Path) -> None:
    assert named(tmp_path, "--guidance_scale 6", takes_guidance=True) == set()
    assert named(tmp_path, "--discrete_flow_shift 3", noise=NoiseSpec(table_is_shifted=True)) == set()


NEEDED = ["--dataset_config", "d.toml", "--output_dir", "out", "--output_name", "x"]


def parser() -> argparse.ArgumentParser:
    made = training_parser("Train.")
    add_options(made, WanTrainingOptions)
    add_options(made, ExpertTrainingOptions, *options_by_expert())
    return made


def options(*argv: str, environment: dict[str, str] | None = None) -> TrainingOptions:
    return read_options(TrainingOptions, read_arguments(parser(), [*NEEDED, *argv], environment or {}))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--fp8_scaled", "--fp8_scaled needs --fp8_base"),
        ("--blocks_to_swap -2", "--blocks_to_swap -2: use a number"),
        ("--lr_scheduler cosin", "--lr_scheduler cosin: unknown"),
        ("--lr_warmup_steps 10", "--lr_scheduler constant has no warm-up. Use .*constant_with_warmup"),
        ("--resume_from_huggingface", "--resume is missing"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(words: str, expected: str) -> None:
    with pytest.raises(OptionError, match=expected):
        options(*words.split())


@pytest.mark.parametrize("words", ["--show_timesteps console", "--check --dataset_config d.toml"])
def test_what_only_shows_something_needs_no_place_to_save_to(words: str) -> None:
    read_options(TrainingOptions, read_arguments(parser(), words.split(), {}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100", 100), ("1", 1), ("0", 0), ("0.05", 0.05), ("5%", 0.05), ("100%", 1.0), ("1e3", 1000)],
)
def test_warmup_takes_steps_and_fractions(text: str, expected: float) -> None:
    warmup = options("--lr_scheduler", "linear", "--lr_warmup_steps", text).lr_schedule.lr_warmup_steps

    assert (warmup, type(warmup)) == (expected, type(expected))


def test_optimizer_arguments_are_literals_and_bare_words_are_text() -> None:
    made = options(
        "--optimizer_args", "betas=0.9,0.95", "weight_decay=1e-2", "fused=True", "mode=fast=er", "name='x'"
    )

    expected = {"betas": (0.9, 0.95), "weight_decay": 0.01, "fused": True, "mode": "fast=er", "name": "x"}
    assert made.optimizer.arguments() == expected


def test_the_launchers_precision_holds_unless_one_is_given(tmp_path: Path) -> None:
    launcher = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    file = tmp_path / "c.toml"
    file.write_text('mixed_precision = "fp16"')

    assert options(environment=launcher).accelerator.mixed_precision == "bf16"
    assert options("--mixed_precision", "no", environment=launcher).accelerator.mixed_precision == "no"
    assert options("--config_file", str(file), environment=launcher).accelerator.mixed_precision == "fp16"
    with pytest.raises(OptionError, match="fp8"):
        options(environment={"ACCELERATE_MIXED_PRECISION": "fp8"})


@pytest.mark.parametrize(
    ("typed", "file", "said"),
    [
        ("--max_train_epochs 3 --max_train_steps 1600", "", True),  # the default, but typed
        ("--max_train_steps 5", "max_train_epochs = 3", True),
        ("--max_train_epochs 3", "max_train_steps = 5", True),
        ("--max_train_epochs 3", "", False),
        ("--max_train_steps 5", "max_train_steps = 3", False),
    ],
)
def test_steps_that_epochs_replace_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, typed: str, file: str, said: bool
) -> None:
    (tmp_path / "c.toml").write_text(file)
    options("--config_file", str(tmp_path / "c.toml"), *typed.split())
    assert ("is ignored because --max_train_epochs 3 replaces it" in caplog.text) == said


def test_usual_values_in_a_file_are_told_in_one_line_if_they_do_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other programs write all their options into it, with the usual values. Any other value is refused."""
    file = tmp_path / "c.toml"
    file.write_text(
        "huber_c = 0.1\nloss_type = 'l2'\nteacher_weight = 0.5\ntimestep_focus_range = [400, 800]\n"
    )
    caplog.set_level("INFO")
    script = training_script("wan", None)
    words = [*NEEDED, "--config_file", str(file)]

    with pytest.raises(UserError, match="d.toml"):  # the dataset is missing; all options are well
        script(words)

    (line,) = [message for message in caplog.messages if "no effect" in message]
    told = "timestep_focus_range, huber_c, teacher_weight have no effect, as the options that they belong to"
    assert line == f"{file}: {told} are not given."
    with pytest.raises(UserError, match="d.toml"):
        script([*words, "--teacher_weight", "0.5"])
    assert "--teacher_weight has no effect without --teacher" in caplog.messages
    file.write_text("teacher_weight = 0.3\n")
    with pytest.raises(OptionError, match="--teacher_weight needs --teacher"):
        script(words)


def test_the_command_line_goes_before_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        '[any]\nmax_train_steps = 7\nlearning_rate = 1\nnetwork_args = ["a=b"]\n'
        '[other]\nseed = 5\nsdpa = true\nlr_warmup_steps = "10%"\nlr_scheduler = "linear"\n'
        'task = "t2v-1.3B"\n'
    )

    made = options("--config_file", str(file.with_suffix("")), "--seed", "6")

    assert (made.loop.max_train_steps, made.loop.seed, made.optimizer.learning_rate) == (7, 6, 1.0)
    assert made.network.arguments() == {"a": "b"}
    assert made.lr_schedule.lr_warmup_steps == 0.1
    assert made.speed.attention.sdpa


def test_the_launcher_may_ask_for_compilation_and_the_command_line_overrides_it() -> None:
    launched = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}

    assert options(environment=launched).speed.compilation.choice is not None
    assert options("--dynamo_backend", "no", environment=launched).speed.compilation.choice is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_train_steps = 1.5", "expected a whole number"),
        ("max_train_steps = true", "expected a whole number"),
        ("gradient_checkpointing = 2", "expected true or false"),
        ("output_name = 3", "expected text in quotes"),
        ("network_args = [1]", "expected text in quotes, or a list of them"),
        ("fp8_scaled = true", "--fp8_scaled needs --fp8_base"),
        ("lr_warmup_steps = 1.5", "expected steps, or a fraction"),
        ("a = ", r"--config_file .*c\.toml"),
    ],
)
def test_a_config_file_is_checked_like_the_command_line(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(line)

    with pytest.raises(UserError, match=expected):
        options("--config_file", str(file))


def test_values_as_other_programs_write_them_in_config_files(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    lines = "gradient_checkpointing = 1\nsave_state = 0\nresume = false\nmax_train_steps = 64.0\n"
    file.write_text(lines, encoding="utf-8")
    made = options("--config_file", str(file))

    assert made.loop.gradient_checkpointing
    assert (made.saving.save_state, made.saving.resume) == (False, None)
    assert made.loop.max_train_steps == 64
    for line in ("save_state = 2", "max_train_steps = 64.5", "resume = true", "max_train_steps = false"):
        file.write_text(line, encoding="utf-8")
        with pytest.raises(OptionError, match="expected"):
            options("--config_file", str(file))


def test_a_key_of_another_tool_in_the_config_file_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("text_encoder_lr = 5")

    assert options("--config_file", str(file)).loop.max_train_steps == 1600
    assert "text_encoder_lr is ignored" in caplog.text


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("loraplus_lr_ratio = 16", 'write network_args = ["loraplus_lr_ratio=16"]'),
        ("lowvram = true", "blocks_to_swap and gradient_checkpointing save GPU memory"),
        ("epoch = 4", "write max_train_epochs = 4"),
        ('gpu_ids = "0"', "it is for accelerate launch"),
        ("use_wandb = true", 'write log_with = "wandb"'),
        ("lowvram = false", ""),
        ('loraplus_lr_ratio = 4\nnetwork_args = ["loraplus_lr_ratio=4"]', ""),
    ],
)
def test_keys_of_the_page_of_kohya_ss_are_explained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str, advice: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(line, encoding="utf-8")

    options("--config_file", str(file))

    assert len(caplog.messages) == bool(advice)
    assert advice in caplog.text


def test_empty_texts_in_a_config_file_are_no_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "c.toml"
    lines = 'sample_prompts = ""\nmax_train_steps = ""\nsave_state = ""\nlr_scheduler_args = [""]\n'
    file.write_text(lines, encoding="utf-8")

    assert options("--config_file", str(file)) == options()
    assert not caplog.messages


def test_a_text_as_seed_is_the_number_that_generation_makes_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "c.toml"
    file.write_text('seed = "hello world"\n')
    in_file = options("--config_file", str(file)).loop
    assert in_file.seed == 3807366404  # recorded in tests/golden/string_seeds.json
    assert caplog.text.count("Seed of the text 'hello world': --seed 3807366404") == 1
    # what a state compares: a resumed run may give the text or its number
    assert in_file == options("--seed", "hello world").loop == options("--seed", "3807366404").loop
    file.write_text("seed = 42\n")
    assert options("--config_file", str(file)).loop.seed == 42
    assert options("--seed", "0").loop.seed == 0


def test_a_seed_of_many_digits_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--seed", "1" * 200)
    assert "200 digits" in capsys.readouterr().err


OWN = (WanTrainingOptions, HunyuanTrainingOptions, FramePackTrainingOptions)


@pytest.mark.parametrize("record", [TrainingOptions, *OWN])
def test_every_option_of_training_says_whether_a_resumed_run_may_change_it(record: type) -> None:
    assert {
        name
        for name, info in get_option_info(record).items()
        if info.get("resume") not in {"identity", "habit", "free", "names"}
    } == set()


def test_an_option_in_two_records_is_judged_alike() -> None:
    shared = get_option_info(TrainingOptions)
    for record in OWN:
        for name, info in get_option_info(record).items():
            assert name not in shared or shared[name]["resume"] == info["resume"], name


@pytest.mark.parametrize(
    ("room", "record", "words", "expected"),
    [
        (
            "ltx_2",
            "Ltx2TrainingOptions",
            "--stg_scale 1 --height 256 --video_cfg_scale 3",
            "height stg_scale video_cfg_scale",
        ),
        ("ltx_2", "Ltx2TrainingOptions", "--sample_disable_audio --ltx2_mode av", "sample_disable_audio"),
        ("stable_diffusion.sdxl", "SdxlTrainingOptions", "--sample_sampler euler_a", "sample_sampler"),
    ],
)
def test_options_of_a_family_that_act_on_samples_alone_say_that_none_are_made(
    room: str, record: str, words: str, expected: str, tmp_path: Path
) -> None:
    family_options = parse_options("", words.split(), getattr(import_own(f"{room}.options"), record))[0]
    (tmp_path / "prompts.txt").write_text("a cat", encoding="utf-8")
    silent, sampling = (
        toy_options(tmp_path),
        toy_options(tmp_path, "--sample_prompts", str(tmp_path / "prompts.txt")),
    )

    lines = list_unused_options(silent, False, False, family_options=family_options)

    assert sorted(line.partition(" ")[0] for line in lines) == sorted(
        f"--{name}" for name in expected.split()
    )
    assert all("no samples are made" in line for line in lines)
    assert list_unused_options(sampling, False, False, family_options=family_options) == []


def test_previews_without_samples_say_so(tmp_path: Path) -> None:
    assert named(tmp_path, "--preview_latent_every 5") == {"--preview_latent_every"}
