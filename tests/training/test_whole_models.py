"""Whole transformers of picture families, by their scripts: files in 16 and in 8 bits, and plans."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints.opening import open_checkpoint
from flux.options import TRAINER, FluxFullTrainingOptions, translate_older_options
from krea2.files import find_release
from minimax_h3.dit_checkpoints import STACKED, read_header
from minimax_h3.options import LAYOUT_KEY
from modules.atomic_write import SPARE_BYTES
from modules.errors import OutputError
from protocols.families import FAMILIES as FAMILIES_BY_NAME
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import FAMILIES, OUTPUT, TinyFamily, family_called
from tests.tiny.further_families import FURTHER
from tests.tiny.runs import make_project
from training.checks import check_before_loading
from training.image_options import ImageTrainerDefaults, read_image_training
from training.learner import FULL_MODEL
from training.learning_options import FullDitOptions
from training.options import TrainingOptions, read_training

FUSED = ("--full_bf16", "--fused_backward_pass", "--max_grad_norm", "0", "--optimizer_type", "adafactor")
PRESERVE_OUTPUT = ("--optimizer_args", "relative_step=False", "scale_parameter=False", "warmup_init=False")
BF16 = ("--mixed_precision", "bf16", "--learning_rate", "1e-2", *FUSED, *PRESERVE_OUTPUT)
DAILY = "krea2"
NAMES = (
    *("krea2", "flux", "chroma", "lumina", "hunyuan_image"),
    *("flux_2", "flux_3", "qwen_image_21", "moss_image", "fibo_2", "kontext", "z_image", "qwen_image"),
    *("ernie_image", "hidream_o1", "ideogram4"),
    *("kandinsky", "kandinsky image"),
    "hunyuan_video_15 i2v",  # from text, what sees an image does not learn
    *("ltx_2 with sound", "minimax_h3", "qwen_image layered"),
)
BY_NAME = {family.name: family for family in (*FAMILIES, *FURTHER)}
OF_DIT = ("--dit", "--pretrained_model_name_or_path", "--ltx2_checkpoint")
PREFIX = "model.diffusion_model."  # in files with all networks


def full_words(family: TinyFamily) -> list[str]:
    ends = ("--network_module", "--network_dim")
    end = next(place for place, word in enumerate(family.train) if word in ends)
    return [family.train_full, *family.train[1:end], *OUTPUT]


def place_of_dit(words: list[str]) -> int:
    """Where a command has the file of the transformer."""
    return next(words.index(flag) for flag in OF_DIT if flag in words) + 1


def read_dit(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a transformer, also from a file with all networks."""
    state = load_file(path)
    inside = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    return {name.removeprefix(PREFIX): tensor for name, tensor in inside.items()} or state


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name != DAILY)) for name in NAMES], scope="module"
)
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyFamily, Path]:
    family, folder = BY_NAME[request.param], tmp_path_factory.mktemp("whole")
    make_project(family, folder)
    path = folder / full_words(family)[place_of_dit(full_words(family))]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    narrow = {
        name: tensor.bfloat16() if "vae" not in name else tensor for name, tensor in load_file(path).items()
    }
    save_file(narrow, path, metadata)
    return family, folder


def test_a_file_in_bf16_has_the_names_and_dtypes_of_its_source(project: tuple[TinyFamily, Path]) -> None:
    """Also layers that compute in float32; a resumed run ends with equal bytes."""
    family, folder = project
    words = [
        *full_words(family),
        *BF16,
        "--max_train_steps",
        "2",
        "--save_every_n_steps",
        "1",
        "--save_state",
    ]

    printed = io.StringIO()
    assert run_here(*words, "--plan", folder=folder, printed=printed)[0] == 0
    assert "optimizer" in printed.getvalue()
    assert not (folder / "output").exists()
    succeed_here(*words, folder=folder)

    before = read_dit(folder / words[place_of_dit(words)])
    after = load_file(folder / "output" / "lora.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    # of Qwen-Image, what the last block makes of the text has no effect; texts are cached behind connectors
    learned = [name for name in before if "_connector." not in name]
    assert len(moved) > 0.85 * len(learned)
    state = "output/lora-step00000001-state"
    succeed_here(*words, "--resume", state, "--output_dir", "resumed", folder=folder)
    resumed = load_file(folder / "resumed" / "lora.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in after.items())


def test_a_base_in_8_bits_is_refused_at_once(project: tuple[TinyFamily, Path]) -> None:
    family, folder = project
    words = full_words(family)
    path = folder / words[place_of_dit(words)]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    small = {
        name: tensor.to(torch.float8_e4m3fn)
        if "s.0." in name and name.endswith("weight") and tensor.ndim == 2
        else tensor
        for name, tensor in state.items()
    }
    path = folder / "model" / "small.safetensors"
    save_file(small, path, metadata)
    words[place_of_dit(words)] = str(path)

    for more in ((), ("--plan",)):
        code, said = run_here(*words, "--max_train_steps", "1", *more, folder=folder)
        assert_one_message(
            code, said, "small.safetensors is in float8_e4m3fn", "Pass the bf16 file of the model ("
        )
        assert "Loading" not in said


def test_turbo_is_given_as_what_is_trained(tmp_path: Path) -> None:
    """Files say it to generation whatever they are called; samples on Turbo are refused by name."""
    family = family_called("krea2")
    make_project(family, tmp_path)
    words = [*full_words(family), "--max_train_steps", "1"]

    code, said = run_here(*words, "--turbo_dit", "model/turbo.safetensors", folder=tmp_path)
    assert_one_message(code, said, "--turbo_dit is refused", "does not contain", "--dit_variant turbo")
    said = succeed_here(*words, "--dit_variant", "turbo", folder=tmp_path)

    assert "is Krea 2 Turbo: --dit_variant turbo" in said
    assert find_release(tmp_path / "output" / "lora.safetensors") == (
        True,
        "its ss_krea2_dit_variant is turbo",
    )
    raw = succeed_here(*words, "--dit_variant", "raw", "--overwrite", folder=tmp_path)
    assert "few steps" not in raw
    assert find_release(tmp_path / "output" / "lora.safetensors") == (
        False,
        "its ss_krea2_dit_variant is raw",
    )


@pytest.mark.slow
def test_a_trained_file_says_how_its_rows_are_ordered_and_its_positions(tmp_path: Path) -> None:
    """--h3_qkv_layout was that of the base; printed commands repeat it. No config.json lies next to it."""
    family = BY_NAME["minimax_h3"]
    make_project(family, tmp_path)
    words = [*full_words(family), "--max_train_steps", "1", "--h3_qkv_layout", "interleaved"]

    succeed_here(*words, folder=tmp_path)

    with open_checkpoint(tmp_path / "output" / "lora.safetensors") as trained:
        assert trained.metadata[LAYOUT_KEY] == STACKED
        header = read_header(trained, "interleaved")
        assert (header.dialect, header.config.frequencies) == (STACKED, 4)


def test_what_a_whole_model_has_no_use_for_is_refused_by_name(tmp_path: Path) -> None:
    """Options of LoRAs, of text encoders and of frozen models, in scripts of three kinds."""
    image, video, audio = "flux_train.py", "minimax_h3_train.py", "ltx2_train.py"
    ltx = ("--ltx2_checkpoint", "ltx.safetensors", "--dataset_config", "d.toml")
    ltx += ("--output_dir", "o", "--output_name", "x")
    for script, words, reasons in (
        (image, ("--unet_lr", "1e-5"), ("--unet_lr is refused", "--learning_rate")),
        (image, ("--text_encoder_lr", "1e-5"), ("--text_encoder_lr is refused", "are not trained")),
        (image, ("--save_model_as", "ckpt"), ("can hold code",)),
        (image, ("--double_blocks_to_swap", "2", "--blocks_to_swap", "3"), ("both mean the same",)),
        (video, ("--h3_teacher_matching",), ("--h3_teacher_matching is refused", "no frozen one")),
        (audio, ("--lora_target_preset", "full"), ("is refused", "--trainable_modules")),
        (audio, (*ltx, "--ltx2_mode", "v"), ("would be missing", "--ltx2_mode av")),
    ):
        code, said = run_here(script, *words, folder=tmp_path)
        assert_one_message(code, said, *reasons)


def test_older_options_of_image_trainers_are_read_as_ours(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    words = ["--dataset_config", "d.toml", "--output_dir", "o", "--output_name", "x"]
    words += ["--double_blocks_to_swap", "3", "--single_blocks_to_swap", "5", "--blockwise_fused_optimizers"]
    defaults = ImageTrainerDefaults(**{**TRAINER, "translate": translate_older_options})

    options, _, _ = read_image_training("", FluxFullTrainingOptions, defaults, words, FullDitOptions)

    assert options.speed.swap.blocks_to_swap == 3 + 5 // 2
    assert options.is_fused
    assert options.is_for_images
    assert "read as --blocks_to_swap 5" in caplog.text


@pytest.mark.parametrize(("more", "bytes_each"), [((), 4), (("--save_state",), 8), (BF16, 2)])
def test_a_disk_that_cannot_hold_the_file_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], bytes_each: int
) -> None:
    """Also where the output folder is not there yet; the weights of blocks are counted in the saved dtype."""
    family = BY_NAME["krea2"]
    family.prepare(tmp_path)
    state = load_file(tmp_path / "model" / "dit.safetensors")
    blocks = sum(tensor.numel() for name, tensor in state.items() if name.startswith("blocks."))
    own, options = krea2_options(tmp_path, *more)
    model = FAMILIES_BY_NAME["krea2"].make_family("training", own)

    minimum = bytes_each * blocks + SPARE_BYTES
    monkeypatch.setattr("modules.atomic_write.free_bytes", lambda folder: minimum - 1)
    with pytest.raises(OutputError, match="Free some space"):
        check_before_loading(model, options, FULL_MODEL)
    monkeypatch.setattr("modules.atomic_write.free_bytes", lambda folder: minimum)
    check_before_loading(model, options, FULL_MODEL)


def krea2_options(folder: Path, *more: str) -> tuple[Any, TrainingOptions]:
    """Options of a family and of a training of krea2_train.py."""
    record = FAMILIES_BY_NAME["krea2"].options_record("FullTraining")
    dit = str(folder / "model" / "dit.safetensors")
    words = ["--dit", dit, "--dataset_config", "d.toml", "--output_dir", str(folder / "new")]
    options, own, _ = read_training(
        "", record, [*words, "--output_name", "x", *more], trained_options=FullDitOptions
    )
    return own, options


def test_states_of_optimizers_wait_in_host_memory_on_request(tmp_path: Path) -> None:
    """Files are equal on a CPU too, the plan counts them there, and optimizers that cannot are refused."""
    family = BY_NAME["krea2"]
    make_project(family, tmp_path)
    words = [*full_words(family), "--max_train_steps", "2", "--learning_rate", "1e-3"]
    offloaded = [*words, "--offload_optimizer_device", "cpu"]

    succeed_here(*words, folder=tmp_path)
    default = (tmp_path / "output" / "lora.safetensors").read_bytes()[-4096:]
    succeed_here(*offloaded, "--overwrite", folder=tmp_path)
    printed = io.StringIO()
    assert run_here(*offloaded, "--plan", folder=tmp_path, printed=printed)[0] == 0

    assert (tmp_path / "output" / "lora.safetensors").read_bytes()[-4096:] == default
    assert "all states of the optimizer" in printed.getvalue()
    for more, reasons in (
        (("--optimizer_type", "prodigy"), ("it finds one learning rate", "omit --offload_optimizer_device")),
        (("--optimizer_type", "PagedAdamW8bit"), ("in host memory already", "Leave")),
        (("--mixed_precision", "fp16"), ("overflowed", "Use bf16 or no")),
        (("--offload_optimizer_device", "nvme"), ("not kept on disk", "Use cpu")),
    ):
        code, said = run_here(*offloaded, *more, "--overwrite", folder=tmp_path)
        assert_one_message(code, said, "--offload_optimizer_device", *reasons)
