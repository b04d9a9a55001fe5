"""The options of image trainers: other names, what is refused by name, and what is answered in a line."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flux import options as flux
from hunyuan_image import options as hunyuan_image
from lumina import options as lumina
from modules.errors import OptionError
from modules.options import NoOptions
from training.image_options import ImageTrainerDefaults, read_image_training
from training.options import TrainingOptions

DEFAULTS = ImageTrainerDefaults(
    "sigma", 3.0, "raw", guidance_scale=3.5, refused={"vae": "the autoencoder is given to --ae"}
)
NEEDED = ["--dataset_config", "d.toml", "--output_dir", "out", "--output_name", "x"]


def read(*argv: str) -> TrainingOptions:
    return read_image_training(None, NoOptions, DEFAULTS, [*NEEDED, *argv])[0]


def test_the_defaults_of_a_family_are_those_of_its_script() -> None:
    made = read()

    times = made.timesteps
    assert (times.timestep_sampling, times.flow_shift, times.weighting_scheme) == ("sigma", 3.0, "uniform")
    assert (made.predicted, made.weighted_by, made.loop.embedded_guidance) == ("raw", "nothing", 3.5)
    assert made.speed.compilation.choice is None
    assert made.whole_dit is None


@pytest.mark.parametrize(
    ("argv", "same_as"),
    [
        (["--use_8bit_adam"], ["--optimizer_type", "AdamW8bit"]),
        (["--use_lion_optimizer"], ["--optimizer_type", "Lion"]),
        (["--torch_compile"], ["--dynamo_backend", "inductor"]),
        (["--fp8_base_unet"], ["--fp8_base"]),
        (["--fp8_scaled"], ["--fp8_base", "--fp8_scaled"]),
        (["--caption_extention", ".txt"], ["--caption_extension", ".txt"]),
        (
            ["--gradient_checkpointing", "--cpu_offload_checkpointing"],
            ["--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"],
        ),
        (
            ["--sample_prompts", __file__, "--sample_every_n_epochs", "2", "--sample_every_n_steps", "1"],
            ["--sample_prompts", __file__, "--sample_every_n_epochs", "2"],
        ),
    ],
)
def test_another_name_is_the_option_that_it_stands_for(argv: list[str], same_as: list[str]) -> None:
    assert read(*argv) == read(*same_as)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--v2"], "--v2 is not supported yet: it is for the text encoders of Stable Diffusion"),
        (["--vae", "ae.safetensors"], "--vae is not supported yet: the autoencoder is given to --ae"),
        (["--use_8bit_adam", "--optimizer_type", "Lion"], "--use_8bit_adam is --optimizer_type AdamW8bit"),
        (["--fused_backward_pass", "--gradient_accumulation_steps", "2"], "--fused_backward_pass with"),
        (["--resolution", "512,x"], "--resolution 512,x: give 512"),
        (["--face_crop_aug_range", "4,2"], "--face_crop_aug_range 4,2: give two numbers"),
        (["--output_config"], "--output_config writes to the file that --config_file names"),
    ],
)
def test_what_cannot_be_is_refused_by_name(argv: list[str], message: str) -> None:
    with pytest.raises(OptionError) as error:
        read(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "argv",
    [["--lowram"], ["--full_bf16"], ["--skip_until_initial_step"], ["--persistent_data_loader_workers"]],
)
def test_what_is_not_needed_is_answered_in_a_line(argv: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made = read(*argv)
    assert f"{argv[0]} is not needed: " in caplog.text
    assert made == read()


def test_folders_of_pictures_replace_the_toml_file(tmp_path: Path) -> None:
    argv = ["--train_data_dir", str(tmp_path), "--resolution", "768,1024", "--output_dir", "o"]
    argv += ["--output_name", "x"]
    made, _ = read_image_training(None, NoOptions, DEFAULTS, argv)

    assert made.loop.dataset_config is None
    assert made.subset is not None
    assert made.subset.size == (768, 1024)
    with pytest.raises(OptionError, match="--dataset_config is missing"):
        read_image_training(None, NoOptions, DEFAULTS, argv[4:])


def test_options_are_written_to_a_file_that_gives_them_again(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    argv = ["--learning_rate", "1e-3", "--text_encoder_lr", "1e-4", "0", "--caption_separator", 'a "b" \\ \t']
    with pytest.raises(SystemExit) as ended:
        read(*argv, "--output_config", "--config_file", str(path))

    assert ended.value.code == 0
    again, _ = read_image_training(None, NoOptions, DEFAULTS, ["--config_file", str(path)])
    assert again == read(*argv)
    with pytest.raises(OptionError, match="exists already"):
        read("--output_config", "--config_file", str(path))


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield root
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.setLevel(level)
    root.handlers[:] = handlers


def test_log_lines_go_to_a_file(tmp_path: Path, root_logger: logging.Logger) -> None:
    path = tmp_path / "log.txt"
    read("--console_log_file", str(path), "--console_log_level", "WARNING", "--lowram")
    logging.getLogger("here").warning("told")

    assert root_logger.level == logging.WARNING
    assert path.read_text(encoding="utf-8").split(" ", 2)[2] == "WARNING told\n"


@pytest.mark.parametrize(
    ("argv", "dtype"),
    [
        ([], "float32"),
        (["--mixed_precision", "bf16"], None),
        (["--text_encoder_dtype", "bfloat16"], "bfloat16"),
    ],
)
@pytest.mark.parametrize("family", [flux, lumina, hunyuan_image])
def test_texts_are_encoded_as_precisely_as_the_rest_is_computed(
    family: Any, argv: list[str], dtype: str | None
) -> None:
    record = next(value for name, value in vars(family).items() if name.endswith("TrainingOptions"))

    _, own = read_image_training(None, record, replace(DEFAULTS, refused={}), [*NEEDED, *argv])

    assert own.text.text_encoder_dtype == dtype
