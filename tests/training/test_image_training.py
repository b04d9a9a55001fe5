"""What image trainers do otherwise than video trainers, and their options."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flux import options as flux
from flux_2.family import Flux2
from flux_2.files import Flux2Files
from flux_3.family import Flux3
from flux_3.files import Flux3Files
from hunyuan_image import options as hunyuan_image
from krea2.family import Krea2, Krea2Files
from lumina import options as lumina
from modules.errors import OptionError
from modules.options import NoOptions, option
from networks.module_names import read_family
from protocols.loading import Placement
from qwen_image.family import QwenImage
from qwen_image.files import VERSIONS, QwenImageFiles
from tests.training.toy import metadata_of, same
from tests.training.toy_images import (
    TextFamily,
    image_toy_options,
    train_image_toy,
    write_images,
    write_subset,
)
from training import image_metadata
from training.checks import list_unused_options
from training.image_options import ImageTrainerDefaults, read_image_training
from training.metadata import file_metadata
from training.noise_options import ADDITIVE, PREDICTIONS, SIGMA_SCALED
from training.options import TrainingOptions
from training.run import prepare_run
from z_image.family import ZImage, ZImageFiles

ONLY = "--network_train_unet_only"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_two_steps_are_those_of_plain_torch(prediction: str, tmp_path: Path) -> None:
    write_images(tmp_path, texts=True)
    words = [ONLY, "--max_train_steps", 2, "--optimizer_type", "torch.optim.SGD", "--max_grad_norm", 0]
    words += ["--weighting_scheme", "sigma_sqrt", "--ip_noise_gamma", 0.1]
    family = TextFamily()
    with prepare_run(family, image_toy_options(tmp_path, *words, prediction=prediction)) as run:
        state = run.model.trainable.modules["network"].state_dict()
        factors = {name: tensor.clone().requires_grad_("lora" in name) for name, tensor in state.items()}
        batches = run.feed
    dit = family.load_dit(Placement(torch.device("cpu"))).requires_grad_(False)

    for step in range(2):
        data = batches.read((0, step))
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

    for name, tensor in train_image_toy(tmp_path, *words, prediction=prediction).items():
        torch.testing.assert_close(tensor, factors[name].detach(), rtol=1e-5, atol=1e-6)


def _with_lora(layer: torch.nn.Module, x: Tensor, factors: dict[str, Tensor], name: str) -> Tensor:
    down, up = factors[f"{name}.lora_down.weight"], factors[f"{name}.lora_up.weight"]
    return layer(x) + x @ down.T @ up.T * (factors[f"{name}.alpha"] / len(down))


def test_the_prediction_that_is_no_velocity_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path)
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


def test_attributes_of_a_table_that_nothing_reads_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_subset(tmp_path, "custom_attributes = { diff_output_preserve = true, off = false }")

    train_image_toy(tmp_path, ONLY, "--max_train_steps", 1)

    told = [record.getMessage() for record in caplog.records if "custom_attributes" in record.message]
    assert len(told) == 1
    assert told[0].endswith("custom_attributes.diff_output_preserve is ignored: nothing reads it")


def test_samples_that_preserve_the_output_are_refused_beside_a_slider(tmp_path: Path) -> None:
    write_subset(tmp_path, "custom_attributes.diff_output_preservation = true")
    slider = tmp_path / "slider.toml"
    slider.write_text("[[sliders]]\npositive = 'old'\nnegative = 'new'\nneutral = 'a'\n", encoding="utf-8")

    with pytest.raises(
        OptionError, match="diff_output_preservation cannot be used with --slider .*its own file"
    ):
        train_image_toy(tmp_path, ONLY, "--slider", slider)


@pytest.mark.parametrize(
    ("option", "occasion"), [("--validate_every_n_steps", "step"), ("--validate_every_n_epochs", "epoch")]
)
def test_validation_is_at_four_levels_under_its_own_names(option: str, occasion: str, tmp_path: Path) -> None:
    write_images(tmp_path, texts=True)
    words = ["--validation_split", 0.5, "--max_validation_steps", 1, option, 2, "--min_timestep", 500]

    with prepare_run(TextFamily(), image_toy_options(tmp_path, ONLY, *words)) as run:
        assert run.validation is not None
        losses = run.validation.measure(run.model.dits.on_device, run.autocast)
        logged = run.validation.name_tracked_values(losses, occasion, 0.25)

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
    write_images(tmp_path, texts=True)
    default = ONLY, "--max_grad_norm", 0

    plain = train_image_toy(tmp_path, *default)
    fused = train_image_toy(tmp_path, *default, "--fused_backward_pass")

    assert same(plain, fused)


def test_a_run_may_begin_later(tmp_path: Path) -> None:
    """Its data and its schedule are those of these steps, and it can be resumed."""
    write_images(tmp_path, texts=True)
    later = "--initial_step", 3, "--lr_scheduler", "linear", ONLY

    full = train_image_toy(tmp_path, *later, "--save_state", "--save_every_n_steps", 4)
    state = tmp_path / "output" / "x-step00000004-state"
    resumed = train_image_toy(tmp_path, *later, "--resume", state)

    assert same(full, resumed)
    assert metadata_of(tmp_path / "output" / "x.safetensors")["ss_steps"] == "6"
    with pytest.raises(OptionError, match="--initial_epoch 3 is step 8, but the run ends at step 6"):
        train_image_toy(tmp_path, ONLY, "--initial_epoch", 3)


def test_metadata_count_the_parts_of_captions_by_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_subset(tmp_path, "num_repeats = 3")
    (tmp_path / "images" / "p0.txt").write_text("Red , a house,, red")
    train_image_toy(tmp_path, ONLY)
    made = json.loads(metadata_of(tmp_path / "output" / "x.safetensors")["ss_tag_frequency"])
    monkeypatch.setattr(image_metadata, "MAX_TAGS", 2)
    train_image_toy(tmp_path, ONLY, "--overwrite")
    maximum = json.loads(metadata_of(tmp_path / "output" / "x.safetensors")["ss_tag_frequency"])
    assert maximum == {"images": {"red": 5, "big": 3}}
    numbers = {f"number {number}": 1 for number in (1, 2, 3)}
    assert made == {"images": {"red": 5, "a house": 1, "big": 3, **numbers}}

    shutil.rmtree(tmp_path / "images")  # caches were copied alone
    train_image_toy(tmp_path, ONLY, "--overwrite")
    assert json.loads(metadata_of(tmp_path / "output" / "x.safetensors")["ss_tag_frequency"]) == {}


@pytest.mark.parametrize(
    ("family", "architecture", "resolution", "read"),
    [
        (QwenImage(QwenImageFiles()), "Qwen-Image", "1328x1328", "qwen_image"),
        (QwenImage(QwenImageFiles(), VERSIONS["edit"]), "Qwen-Image-Edit", "1024x1024", "qwen_image"),
        (
            QwenImage(QwenImageFiles(), VERSIONS["edit-2509"]),
            "Qwen-Image-Edit-Plus",
            "1024x1024",
            "qwen_image",
        ),
        (
            QwenImage(QwenImageFiles(), VERSIONS["edit-2511"]),
            "Qwen-Image-Edit-2511",
            "1024x1024",
            "qwen_image",
        ),
        (Krea2(Krea2Files()), "Krea-2", "1024x1024", "krea2"),
        (Flux3(Flux3Files()), "Flux.3-klein", "1024x1024", "flux_3"),
        (ZImage(ZImageFiles()), "Z-Image", "1024x1024", "z_image"),
        (Flux2(Flux2Files(model_version="dev")), "Flux.2-dev", "1280x720", "flux_2"),
        (Flux2(Flux2Files(model_version="klein-base-4b")), "Flux.2-klein-4b", "1280x720", "flux_2"),
        (Flux2(Flux2Files(model_version="klein-9b")), "Flux.2-klein-9b", "1280x720", "flux_2"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_files_name_the_model_as_the_known_tuner_and_are_read_in_both_spellings(
    family: Any, architecture: str, resolution: str, read: str
) -> None:
    options = image_toy_options(Path("/nowhere"))
    # these scripts follow the tuner of video models
    options = replace(options, lora_parts=None, prediction=None)
    made = file_metadata({}, options, family.metadata, 1, 1, datetime(2030, 1, 1))
    assert made["modelspec.architecture"] == f"{architecture}/lora"
    assert made["modelspec.resolution"] == resolution
    for spelled in (architecture, architecture.lower(), architecture.lower().replace(".", "-")):
        found = read_family({"modelspec.architecture": f"{spelled}/lora"})
        assert found is not None
        assert found.name == read


def test_metadata_say_how_an_image_lora_was_trained(tmp_path: Path) -> None:
    write_images(tmp_path, texts=True)
    train_image_toy(tmp_path, ONLY, "--metadata_trigger_phrase", "red", "--validation_split", 0.25)

    made = metadata_of(tmp_path / "output" / "x.safetensors")
    expected = {
        "ss_model_prediction_type": "raw",
        "ss_loss_type": "l2",
        "ss_num_train_images": "3",
        "ss_num_validation_images": "1",
        "modelspec.trigger_phrase": "red",
        "modelspec.resolution": "1024x1024",
        "modelspec.sai_model_spec": "1.0.1",
        "ss_fp8_base_unet": "False",
        "ss_network_args": "{}",
    }
    assert {name: made[name] for name in expected} == expected
    assert "ss_session_id" in made
    assert "ss_ss_session_id" not in made  # that is in files of video trainers
    assert json.loads(made["ss_dataset_dirs"]) == {"images": {"n_repeats": 1, "img_count": 3}}
    assert json.loads(made["ss_bucket_info"])["buckets"] == {"0": {"resolution": [32, 32], "count": 3}}


DEFAULTS = ImageTrainerDefaults(
    "sigma", 3.0, "raw", guidance_scale=3.5, refused={"vae": "the autoencoder is given to --ae"}
)
NEEDED = ["--dataset_config", "d.toml", "--output_dir", "out", "--output_name", "x"]
SAMPLES = "--sample_prompts PROMPTS"


def read(*argv: str) -> TrainingOptions:
    words = [word.replace("PROMPTS", __file__) for word in argv]
    return read_image_training(None, NoOptions, DEFAULTS, [*NEEDED, *words])[0]


@pytest.mark.parametrize(
    ("argv", "same_as"),
    [
        ("--use_8bit_adam", "--optimizer_type AdamW8bit"),
        ("--use_lion_optimizer", "--optimizer_type Lion"),
        ("--torch_compile", "--dynamo_backend inductor"),
        ("--fp8_base_unet", "--fp8_base"),
        ("--fp8_scaled", "--fp8_base --fp8_scaled"),
        ("--caption_extention .txt", "--caption_extension .txt"),
        (
            "--gradient_checkpointing --cpu_offload_checkpointing",
            "--gradient_checkpointing --gradient_checkpointing_cpu_offload",
        ),
        (
            f"{SAMPLES} --sample_every_n_epochs 2 --sample_every_n_steps 1",
            f"{SAMPLES} --sample_every_n_epochs 2",
        ),
    ],
)
def test_another_name_is_the_option_that_it_stands_for(argv: str, same_as: str) -> None:
    assert read(*argv.split()) == read(*same_as.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--v2", "--v2 is refused: it is for the text encoders of Stable Diffusion"),
        ("--vae ae.safetensors", "--vae is refused: the autoencoder is given to --ae"),
        ("--use_8bit_adam --optimizer_type Lion", "--use_8bit_adam is --optimizer_type AdamW8bit"),
        ("--cpu_offload_checkpointing", "--cpu_offload_checkpointing needs --gradient_checkpointing"),
        ("--fused_backward_pass --gradient_accumulation_steps 2", "--fused_backward_pass with"),
        ("--fused_backward_pass --blank_prior_weight 1", "--blank_prior_weight with --fused_backward_pass"),
        ("--fused_backward_pass --slider PROMPTS", "--slider with --fused_backward_pass"),
        ("--caption_extention .a --caption_extension .b", "--caption_extension, which is .b: pass one"),
        ("--resolution 512,x", "--resolution 512,x: pass 512"),
        ("--resolution 832x480", "pass 512, or width and height, as 832,480"),
        (
            "--deepspeed",
            "--deepspeed is refused: DeepSpeed is not used. Processes of accelerate launch share ",
        ),
        ("--zero_stage 3", "with --shard_base and tokens with --context_parallel"),
        ("--face_crop_aug_range 4,2", "--face_crop_aug_range 4,2: use two numbers"),
        ("--output_config", "--output_config writes to the file that --config_file names"),
    ],
)
def test_what_cannot_be_is_refused_by_name(argv: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        read(*argv.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--learning_rate 1 --unet_lr 1 --text_encoder_lr 1", ["--learning_rate"]),
        ("--learning_rate 1 --unet_lr 1 --network_train_unet_only", ["--learning_rate"]),
        ("--learning_rate 1 --text_encoder_lr 1 --network_train_unet_only", ["--text_encoder_lr"]),
        ("--unet_lr 1 --network_train_text_encoder_only", ["--unet_lr"]),
        ("--learning_rate 1 --unet_lr 1", []),
    ],
)
def test_rates_that_others_replace_are_named(argv: str, expected: list[str]) -> None:
    lines = list_unused_options(read(*argv.split()), takes_guidance=True, shifts_table=True)
    assert [line.partition(" has no effect")[0] for line in lines] == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--unet_lr 1 --text_encoder_lr 1", "--unet_lr and --text_encoder_lr replace it."),
        ("--unet_lr 1 --network_train_unet_only", "no effect: --unet_lr replaces it."),
        (
            "--text_encoder_lr 1 --network_train_text_encoder_only",
            "no effect: --text_encoder_lr replaces it.",
        ),
    ],
)
def test_only_rates_that_are_given_are_said_to_replace_one(argv: str, said: str) -> None:
    options = read(*argv.split(), "--learning_rate", "1")
    (line,) = list_unused_options(options, takes_guidance=True, shifts_table=True)
    assert line.endswith(said)


@pytest.mark.parametrize(
    "option", ["--lowram", "--full_bf16", "--skip_until_initial_step", "--persistent_data_loader_workers"]
)
def test_what_is_not_needed_is_answered_in_a_line(option: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert read(option) == read()
    assert f"{option} is not needed: " in caplog.text


def test_tokenizers_come_from_their_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Own(NoOptions):
        t5xxl_tokenizer: Path | None = option("the tokenizer")

    defaults = replace(DEFAULTS, tokenizers={"t5xxl_tokenizer": "google_t5-v1_1-xxl"})
    folder = tmp_path / "google_t5-v1_1-xxl"

    def read_own(*more: str) -> Path | None:
        words = [*NEEDED, "--tokenizer_cache_dir", str(tmp_path), *more]
        found: Path | None = read_image_training(None, Own, defaults, words)[1].t5xxl_tokenizer
        return found

    assert read_own() is None
    assert "has no folder google_t5-v1_1-xxl: tokenizers are looked for next to" in caplog.text
    folder.mkdir()
    assert read_own() == folder
    assert read_own("--t5xxl_tokenizer", "mine") == Path("mine")


def test_folders_of_pictures_replace_the_toml_file(tmp_path: Path) -> None:
    argv = ["--train_data_dir", str(tmp_path), "--resolution", "768,1024", "--output_dir", "o"]
    argv += ["--output_name", "x"]
    made, *_ = read_image_training(None, NoOptions, DEFAULTS, argv)

    assert made.loop.dataset_config is None
    assert made.subset is not None
    assert made.subset.size == (768, 1024)
    with pytest.raises(OptionError, match="--dataset_config is missing"):
        read_image_training(None, NoOptions, DEFAULTS, argv[4:])


def test_other_names_of_options_are_told_by_those_that_a_run_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    words = ["--use_8bit_adam", "--torch_compile", "--save_n_epoch_ratio", "3", "--unet_lr", "1e-5"]

    options, _, given = read_image_training(None, NoOptions, DEFAULTS, [*NEEDED, *words])

    changed = {option.name: option.text for option in given if option.is_changed}
    needed = {"dataset_config", "output_dir", "output_name"}
    assert {name: text for name, text in changed.items() if name not in needed} == {
        "optimizer_type": "AdamW8bit",
        "dynamo_backend": "inductor",
        "save_n_epoch_ratio": "3",
        "unet_lr": "1e-05",
    }
    assert read(*(word for option in given if option.is_changed for word in option.arguments)) == options


def test_a_printed_command_has_what_other_names_stand_for() -> None:
    words = ["--use_8bit_adam", "--fp8_base_unet", "--caption_extention", ".cap", "--fp8_scaled"]

    _, _, given = read_image_training(None, NoOptions, DEFAULTS, [*NEEDED, *words])

    typed = [one.name for one in given if one.is_changed and one.is_typed and f"--{one.name}" not in NEEDED]
    assert typed == ["optimizer_type", "fp8_base", "fp8_scaled", "caption_extension"]


def test_options_are_written_to_a_file_that_gives_them_again(tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    argv = ["--learning_rate", "1e-3", "--text_encoder_lr", "1e-4", "0", "--caption_separator", 'a "b" \\ \t']
    with pytest.raises(SystemExit) as ended:
        read(*argv, "--output_config", "--config_file", str(path))

    assert ended.value.code == 0
    again, *_ = read_image_training(None, NoOptions, DEFAULTS, ["--config_file", str(path)])
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_log_lines_that_a_file_cannot_take_go_to_the_console(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    read("--console_log_file", "/dev/full", "--console_log_level", "INFO", "--lowram")
    for text in ("told", "and more"):
        logging.getLogger("here").info(text)

    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert [line.split(" ", 2)[2] for line in said.splitlines() if line.startswith("20")] == [
        "WARNING --console_log_file /dev/full: No space left on device. This and all further lines are "
        "written here",
        "INFO told",
        "INFO and more",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_log_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OptionError, match="--console_log_file .*log: it is a named pipe"):
        read("--console_log_file", str(tmp_path / "log"), "--lowram")


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

    _, own, _ = read_image_training(None, record, replace(DEFAULTS, refused={}), [*NEEDED, *argv])

    assert own.text.text_encoder_dtype == dtype
