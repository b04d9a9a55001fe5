"""Whole checkpoints of Stable Diffusion, trained by their scripts on tiny models."""

import io
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from protocols.full_model import LearningParts
from protocols.requests import Prompt
from stable_diffusion.contract import SD1, SDXL
from stable_diffusion.files import ModelType
from stable_diffusion.tokenizers import CLIP_L
from stable_diffusion.towers import TextEncoderTraining, make_encoders
from stable_diffusion.training_files import TrainingFiles
from stable_diffusion.whole_files import make_writer
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.parity.training import stream
from tests.stable_diffusion.test_training_step import encode_plainly, plain_encoders
from tests.tiny.dit_files import write_tensors
from tests.tiny.stable_diffusion import (
    KINDS,
    WRITERS,
    ldm_unet,
    open_clip,
    tokenizer_folder,
    write_folder,
)

DATASET = """[general]
resolution = 64
caption_extension = ".txt"

[[datasets]]
batch_size = 1

[[datasets.subsets]]
image_dir = "pictures"
"""
SCRIPTS = {"sdxl": "sdxl_train.py", "sd1": "train_db.py", "sd2": "fine_tune.py"}
U_NET = "model.diffusion_model."
TOWERS = {  # of the files, by the text encoder: beginning of its names, whether it is OpenCLIP
    "sd1": [("cond_stage_model.transformer.", False)],
    "sd2": [("cond_stage_model.model.", True)],
    "sdxl": [("conditioner.embedders.0.transformer.", False), ("conditioner.embedders.1.model.", True)],
}
RATE = 0.1
SGD = ("--optimizer_type", "torch.optim.SGD", "--learning_rate", RATE, "--max_grad_norm", "0")
BF16 = ("--full_bf16", "--mixed_precision", "bf16")  # a CPU takes long in it
FUSED = ("--optimizer_type", "adafactor", "--max_grad_norm", "0")
KEPT = ("--optimizer_args", "relative_step=False", "scale_parameter=False", "warmup_init=False")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "pictures"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "0.png")
    (images / "0.txt").write_text("a red cat", encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    tokenizer_folder(tmp_path / "tokenizers")
    return tmp_path


def words(model: str, *further: object, steps: int = 1) -> list[object]:
    files = ["--pretrained_model_name_or_path", model, "--tokenizer_cache_dir", "tokenizers"]
    data = ["--dataset_config", "dataset.toml", "--max_data_loader_n_workers", "0"]
    return [*files, *data, "--max_train_steps", steps, "--seed", "1", "--output_dir", "output"] + [*further]


def changes(folder: Path, model: str, trained: str) -> dict[str, Tensor]:
    """What was added to each tensor that is not the same as in the source."""
    before, after = load_file(folder / model), load_file(folder / trained)
    after.pop("v_pred", None)  # an empty tensor that says what the model predicts
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in after.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in before.items()
    }
    return {
        name: tensor.float() - before[name].float()
        for name, tensor in after.items()
        if not torch.equal(tensor, before[name])
    }


def parts(changed: Mapping[str, Tensor], kind: str) -> set[str]:
    """Beginnings of the names of networks with changes."""
    starts = [U_NET, "first_stage_model.", *(start for start, _ in TOWERS[kind])]
    return {start for start in starts if any(name.startswith(start) for name in changed)}


def expected_changes(folder: Path, kind: str, predicts_v: bool = False) -> dict[str, Tensor]:
    """One step of descent of all networks by diffusers and transformers, in the names of released files."""
    plain = folder / "plain"
    unet = UNet2DConditionModel.from_pretrained(plain / "unet")
    towers = plain_encoders(kind, plain)
    with np.load(next((folder / "pictures").glob("*_sd*.npz"))) as cache:
        latents = torch.from_numpy(cache["latents"])[None] * KINDS[kind].latent_scale
    noise = torch.randn(1, 4, 1, *latents.shape[2:], generator=stream(1, "noise", 0))[:, :, 0]
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    time = torch.tensor([500])
    states = encode_plainly(kind, plain, ("a red cat",), 1, towers)
    inputs: dict[str, Any] = {}
    context = torch.cat([states[name] for name in sorted(states) if name != "pool2"], dim=-1)
    if kind == "sdxl":
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        inputs = {"added_cond_kwargs": {"text_embeds": states["pool2"], "time_ids": sizes}}
    noisy = schedule.add_noise(latents, noise, time)
    output = unet(noisy, time, encoder_hidden_states=context, **inputs).sample
    target = schedule.get_velocity(latents, noise, time) if predicts_v else noise
    nn.functional.mse_loss(output, target).backward()

    def steps(network: nn.Module) -> dict[str, Tensor]:
        weights = network.named_parameters()
        return {name: -RATE * weight.grad for name, weight in weights if weight.grad is not None}

    expected = {f"{U_NET}{name}": change for name, change in ldm_unet(steps(unet)).items()}
    for tower, (start, is_open_clip) in zip(towers, TOWERS[kind], strict=True):
        starts = ("text_model.", "text_projection.")
        found = {
            name if name.startswith(starts) else f"text_model.{name}": change
            for name, change in steps(tower).items()
        }
        released = open_clip(found) if is_open_clip else found
        released.pop("logit_scale", None)  # `open_clip` adds it
        expected |= {f"{start}{name}": change for name, change in released.items()}
    return expected


@pytest.mark.parametrize(
    "kind",
    [
        "sdxl",
        pytest.param("sd1", marks=pytest.mark.slow),
        pytest.param("sd2", marks=pytest.mark.slow),
    ],
)
def test_a_step_of_all_networks_equals_that_of_diffusers_and_transformers(folder: Path, kind: str) -> None:
    """Tensor by tensor in the saved checkpoint; frozen parts are equal in bytes."""
    model = WRITERS[kind](folder)
    write_folder(kind, folder / "plain")
    given = {
        "sdxl": ["--train_text_encoder"],
        "sd1": [],
        "sd2": ["--train_text_encoder", "--v_parameterization"],
    }[kind]
    fixed = ["--min_timestep", "500", "--max_timestep", "500", "--cache_latents", "--cache_latents_to_disk"]

    succeed_here(SCRIPTS[kind], *words(model.name, *SGD, *fixed, *given), folder=folder)

    changed = changes(folder, model.name, "output/last.safetensors")
    expected = expected_changes(folder, kind, predicts_v=kind == "sd2")
    assert parts(changed, kind) == {U_NET, *(start for start, _ in TOWERS[kind])}
    before = load_file(model)
    worst, moved = 0.0, 0
    for name, change in expected.items():
        # a change of a bit of the weight is the least that the file can hold
        minimum = float(before[name].abs().max().clamp(min=1e-2)) * 1e-5
        found = changed.get(name, torch.zeros(()))
        worst = max(worst, float((found - change).abs().max()) / max(float(change.abs().max()), minimum))
        moved += bool(change.abs().max() > minimum)
    assert moved > 0.9 * len(expected)
    assert changed.keys() <= expected.keys()
    assert worst < 1e-2
    with safe_open(folder / "output" / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    assert "lora" not in metadata["modelspec.architecture"]
    assert metadata["modelspec.prediction_type"] == ("v" if kind == "sd2" else "epsilon")


def words_of_fused(folder: Path) -> list[object]:
    """Make a model and the options that step its weights in the backward pass, with an average."""
    given = [
        *FUSED,
        *KEPT,
        "--fused_optimizer_groups",
        "4",
        "--train_text_encoder",
        "--learning_rate",
        "1e-3",
    ]
    given += ["--ema_decay", "0.9", "--save_every_n_steps", "1", "--save_state"]
    given += ["--cache_latents", "--cache_latents_to_disk"]
    return words(WRITERS["sdxl"](folder).name, *given, steps=2)


@pytest.mark.slow
def test_a_plan_counts_the_text_encoders_that_learn(folder: Path) -> None:
    """Slow: test_pivotal_tuning.py plans a run whose text encoder learns each day."""
    run = words_of_fused(folder)
    succeed_here("sdxl_train.py", *run, folder=folder)
    printed = io.StringIO()
    assert run_here("sdxl_train.py", *run, "--plan", folder=folder, printed=printed)[0] == 0
    assert "weights of text encoders" in printed.getvalue()


@pytest.mark.parametrize(
    "precision", [(), pytest.param(BF16, marks=pytest.mark.slow)], ids=["float32", "bf16"]
)
def test_the_file_is_drawn_with_and_a_resumed_run_ends_with_equal_tensors(
    folder: Path, precision: tuple[str, ...]
) -> None:
    run = [*words_of_fused(folder), *precision]
    model = folder / "sdxl.safetensors"

    code, said = run_here(
        "sdxl_train.py", *words(model.name, "--train_text_encoder", "--plan"), folder=folder
    )
    assert_one_message(code, said, "--plan rehearses", "--cache_latents_to_disk, or with")
    assert "cache_text" not in said
    succeed_here("sdxl_train.py", *run, folder=folder)
    state = "output/last-step00000001-state"
    succeed_here("sdxl_train.py", *run, "--resume", state, "--output_dir", "resumed", folder=folder)
    drawing = [
        "--ckpt",
        "output/last.safetensors",
        "--tokenizer_cache_dir",
        "tokenizers",
        "--prompt",
        "a cat",
    ]
    drawing += ["--W", "64", "--H", "64", "--steps", "2", "--seed", "1", "--outdir", "made"]
    succeed_here("gen_img.py", *drawing, folder=folder)

    full, resumed = (load_file(folder / name / "last.safetensors") for name in ("output", "resumed"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in full.items())
    assert changes(folder, model.name, "output/last.safetensors")
    assert changes(folder, "output/last.safetensors", "output/last-ema.safetensors")
    assert len([*(folder / "made").glob("*.png")]) == 1


def test_text_encoders_learn_at_their_own_rates(folder: Path) -> None:
    """Steps of descent are the ratio of the rates; a rate of 0 freezes an encoder to the byte."""
    model = WRITERS["sdxl"](folder)
    fixed = ["--cache_latents", "--cache_latents_to_disk", "--train_text_encoder"]
    rates = ["--learning_rate_te1", 2 * RATE, "--learning_rate_te2", 0]

    succeed_here("sdxl_train.py", *words(model.name, *SGD, *fixed), folder=folder)
    ours = words(model.name, *SGD, *fixed, *rates, "--output_name", "rates")
    said = succeed_here("sdxl_train.py", *ours, folder=folder)

    assert re.search(r"learning rate: 0\.1\n +0\.1: dit\n +0\.2: text_encoder\n", said)
    default = changes(folder, model.name, "output/last.safetensors")
    changed = changes(folder, model.name, "output/rates.safetensors")
    first, second = (start for start, _ in TOWERS["sdxl"])
    assert parts(changed, "sdxl") == {U_NET, first}
    for name in changed:
        factor = 2 if name.startswith(first) else 1
        torch.testing.assert_close(changed[name], factor * default[name], rtol=1e-2, atol=2e-6)
    assert any(name.startswith(second) for name in default)


def test_blocks_of_the_unet_learn_at_their_own_rates(folder: Path) -> None:
    """The first number is that of the embeddings, the last one that of the output."""
    model = WRITERS["sdxl"](folder)  # of two levels: 1 + 6 + 3 + 6 + 1 blocks
    fixed = ["--cache_latents", "--cache_latents_to_disk"]
    rates = [RATE * factor for factor in (2, 3, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 5)]

    usually = succeed_here("sdxl_train.py", *words(model.name, *SGD, *fixed), folder=folder)
    unused = [7 * RATE if word == RATE else word for word in SGD]
    given = ["--block_lr", ",".join(map(str, rates)), "--output_name", "rates"]
    ours = words(model.name, *unused, *fixed, *given)
    shown = succeed_here("sdxl_train.py", *ours, folder=folder)
    code, said = run_here(
        "sdxl_train.py", *words(model.name, *fixed, "--block_lr", "1e-5,1e-5"), folder=folder
    )

    remark = "--learning_rate has no effect: all trained parts have their own rates."
    assert [remark in text for text in (usually, shown)] == [False, True]
    assert LearningParts({"text_encoder": 1e-5}, (1e-5,)).have_own_rates
    assert not LearningParts({"text_encoder": None}, (1e-5,)).have_own_rates  # which learns at it
    assert re.search(r"learning rate: 0\.3: dit block 1\n +0\.2: dit block 0\n", shown)
    assert re.search(r"\n +0\.1: dit block \d+, .+, \.\.\., dit block \d+\n", shown)
    default = changes(folder, model.name, "output/last.safetensors")
    changed = changes(folder, model.name, "output/rates.safetensors")
    factors = {"time_embed": 2, "label_emb": 2, "input_blocks.0": 3, "output_blocks.5": 4, "out": 5}
    for name, change in default.items():
        place = name.removeprefix(U_NET)
        factor = next((factor for start, factor in factors.items() if place.startswith(f"{start}.")), 1)
        if place.startswith("input_blocks.2."):
            assert name not in changed
        else:
            torch.testing.assert_close(changed[name], factor * change, rtol=1e-2, atol=2e-6)
    assert_one_message(code, said, "--block_lr has 2 numbers", "17 blocks", "pass one for")


def test_the_text_encoder_learns_for_so_many_steps(folder: Path) -> None:
    """Counted from 0: with 1 the first step moves it; -1 leaves it as it is, and its state resumes."""
    model = WRITERS["sd1"](folder)
    ((start, _),) = TOWERS["sd1"]
    adam = ["--learning_rate", "1e-3", "--save_every_n_steps", "1", "--save_state"]

    for stop in ("1", "-1"):
        given = [*adam, "--stop_text_encoder_training", stop, "--output_name", f"stop{stop}"]
        succeed_here("train_db.py", *words(model.name, *given, steps=2), folder=folder)
    again = [*adam, "--stop_text_encoder_training", "1", "--output_name", "again"]
    state = "output/stop1-step00000001-state"
    succeed_here("train_db.py", *words(model.name, *again, "--resume", state, steps=2), folder=folder)

    first = changes(folder, model.name, "output/stop1-step00000001.safetensors")
    second = changes(folder, "output/stop1-step00000001.safetensors", "output/stop1.safetensors")
    never = changes(folder, model.name, "output/stop-1.safetensors")
    assert parts(first, "sd1") == {U_NET, start}
    assert parts(second, "sd1") == parts(never, "sd1") == {U_NET}
    assert not changes(folder, "output/stop1.safetensors", "output/again.safetensors")


def test_marks_of_the_source_stay_and_averages_of_it_are_left_out(folder: Path) -> None:
    """What the file says of its prediction is kept; --save_precision changes the networks alone."""
    model = WRITERS["sdxl"](folder)
    state = load_file(model)
    average = {"model_ema.diffusion_modelout2weight": torch.zeros(4)}
    write_tensors(model, {**state, **average, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    shutil.rmtree(folder / "output", ignore_errors=True)

    said = succeed_here("sdxl_train.py", *words(model.name, "--save_precision", "fp16"), folder=folder)

    saved = load_file(folder / "output" / "last.safetensors")
    planned = make_writer(TrainingFiles((SDXL,), model), {}, ModelType(SDXL, True, True)).list_infos(
        torch.float16
    )
    assert {name: info.dtype for name, info in planned.items()} == {
        name: tensor.dtype for name, tensor in saved.items()
    }
    assert saved.keys() == {*state, "v_pred", "ztsnr"}
    assert "averaged tensors" in said
    networks = [U_NET, "first_stage_model.", *(start for start, _ in TOWERS["sdxl"])]
    for name, tensor in saved.items():
        if tensor.is_floating_point():
            is_of_network = name.startswith(tuple(networks))
            assert tensor.dtype == (torch.float16 if is_of_network else torch.float32)


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_file_says_what_the_typed_options_made_its_model_predict(folder: Path, kind: str) -> None:
    """A checkpoint that says nothing is trained to predict v. What is drawn needs no options afterwards."""
    model = WRITERS[kind](folder)
    typed = ["--v_parameterization", "--zero_terminal_snr"]
    succeed_here(SCRIPTS[kind], *words(model.name, *typed), folder=folder)
    trained = folder / "output" / "last.safetensors"
    assert load_file(trained).keys() == {*load_file(model), "v_pred", "ztsnr"}
    with safe_open(trained, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == "v"
    assert (metadata["ss_v_parameterization"], metadata["ss_zero_terminal_snr"]) == ("True", "True")

    said = succeed_here(
        SCRIPTS[kind], *words("output/last.safetensors", "--output_name", "again"), folder=folder
    )

    again = folder / "output" / "again.safetensors"
    assert load_file(again).keys() == load_file(trained).keys()
    assert said.count("predicts v with a zero terminal SNR, as its tensor v_pred says") == 1
    with safe_open(again, "pt") as file:
        assert file.metadata()["ss_zero_terminal_snr"] == "True"
    images = []
    for number, words_of_run in enumerate(([], typed)):
        found = draw(folder, "output/last.safetensors", f"drawn{number}", *words_of_run)
        images.append(found)
    assert (images[0] == images[1]).all()


@pytest.mark.parametrize("form", ["file", pytest.param("folder", marks=pytest.mark.slow)])
def test_a_trained_file_makes_pictures_without_a_network_by_the_printed_command(
    folder: Path, form: str
) -> None:
    """The tokenizer lies next to the source, where the download puts it, and no option names it."""
    (folder / "models").mkdir()
    if form == "folder":
        model = write_folder("sd1", folder / "models" / "sd1")
    else:
        model = WRITERS["sd1"](folder / "models")
        (folder / "models" / "clip_l").mkdir()
        kept = ("tokenizer.json",) if form == "tokenizer.json" else ("vocab.json", "merges.txt")
        for name in kept:
            (found,) = (folder / "tokenizers").glob(f"openai_clip-vit-large-patch14/{name}")
            shutil.copyfile(found, folder / "models" / "clip_l" / name)
    shutil.rmtree(folder / "tokenizers")
    files = ["--pretrained_model_name_or_path", model.relative_to(folder)]
    data = ["--dataset_config", "dataset.toml", "--max_data_loader_n_workers", "0", "--max_train_steps", "1"]

    said = succeed_here("train_db.py", *files, *data, "--output_dir", "output", folder=folder)

    assert "was copied to output" in said
    lines = said.splitlines()
    (place,) = [number for number, line in enumerate(lines) if "Generate with it" in line]
    _, script, *typed = shlex.split(lines[place + 1].strip(" │"))
    succeed_here(script, *typed, "--image_size", "64", "64", "--steps", "2", folder=folder)
    assert list((folder / "output" / "generated").glob("*.png"))
    (folder / "copied").mkdir()
    for name in ("last.safetensors", CLIP_L):
        (folder / "output" / name).rename(folder / "copied" / name)
    draw(folder, "copied/last.safetensors", "drawn")


def draw(folder: Path, ckpt: str, name: str, *further: str) -> np.ndarray:
    tokenizers = ["--tokenizer_cache_dir", "tokenizers"] if (folder / "tokenizers").exists() else []
    words_of_run = ["--ckpt", ckpt, *tokenizers, "--prompt", "a cat", "--seed", "1"]
    words_of_run += ["--W", "64", "--H", "64", "--steps", "2", "--outdir", name, *further]
    succeed_here("gen_img.py", *words_of_run, folder=folder)
    (image,) = (folder / name).glob("*.png")
    return np.asarray(Image.open(image))


@pytest.mark.parametrize(
    "kind",
    [
        "sd2",
        pytest.param("sdxl", marks=pytest.mark.slow),
        pytest.param("sd1", marks=pytest.mark.slow),
    ],
)
def test_a_folder_of_diffusers_becomes_a_single_file_with_released_names(folder: Path, kind: str) -> None:
    """All parts have the values of the folder, and the file says that it predicts v."""
    write_folder(kind, folder / "model", velocity=True)

    said = succeed_here(SCRIPTS[kind], *words("model", "--learning_rate", "1e-5"), folder=folder)

    saved = load_file(folder / "output" / "last.safetensors")
    released = load_file(WRITERS[kind](folder))
    assert "single files" in said
    assert "v_pred" in saved
    # what the files of the training code have besides networks, and what a folder does not have
    ends = ("position_ids", "logit_scale") + (("text_projection",) if kind == "sd2" else ())
    networks = (U_NET, "first_stage_model.", *(start for start, _ in TOWERS[kind]))
    expected = {name for name in released if name.startswith(networks) and not name.endswith(ends)}
    assert saved.keys() - {"v_pred"} == expected
    for name in expected:
        if kind != "sd2" or ".resblocks.3." not in name:  # the layer that is not used
            torch.testing.assert_close(saved[name], released[name], rtol=0, atol=1e-4)


def test_captions_are_not_filled_up_on_request(tmp_path: Path) -> None:
    """The states of the longest caption of a batch are used, which are those of filled ones."""
    write_folder("sd1", tmp_path / "model")
    files = TrainingFiles((SD1,), tmp_path / "model", tokenizer_cache_dir=tokenizer_folder(tmp_path / "tok"))
    prompts = [Prompt("a cat"), Prompt("a red cat on the grass")]
    states = []
    for fills in (True, False):
        (encoder,) = make_encoders(files, 1, None, text_training=TextEncoderTraining({}, fills))
        encoder.load(torch.device("cpu"))
        states.append([row["hidden_state"] for row in encoder.encode(prompts)])
        tokens = encoder.token_counter()
    longest = max(tokens(prompt.text).tokens for prompt in prompts)

    for filled, unfilled in zip(*states, strict=True):
        assert unfilled.shape[0] == longest < 77 == filled.shape[0]
        torch.testing.assert_close(unfilled, filled[:longest])
