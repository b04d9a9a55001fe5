"""`new --from`: what a described run has of a project, by sums and values computed apart."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from modules.errors import OptionError
from modules.script_options import parse_options
from modules.text_files import parse_toml
from project.files import write_project
from project.new_options import NewOptions
from tests.project.test_new import write_photos

KOHYA: dict[str, Any] = {
    "LoRA_type": "Standard",
    "sdxl": True,
    "train_data_dir": "photos",
    "train_batch_size": 2,
    "epoch": 5,
    "max_train_epochs": 0,
    "max_train_steps": 0,
    "learning_rate": 3e-5,
    "unet_lr": 3e-5,
    "text_encoder_lr": 0,
    "network_dim": 8,
    "network_alpha": 4,
    "optimizer": "AdamW",
    "lr_scheduler": "constant",
}
ONETRAINER: dict[str, Any] = {
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "training_method": "LORA",
    "batch_size": 2,
    "epochs": 5,
    "learning_rate": 3e-4,
    "text_encoder": {"train": False},
    "text_encoder_2": {"train": False},
}
AI_TOOLKIT = {
    "job": "extension",
    "config": {
        "name": "mine",
        "process": [
            {
                "type": "sd_trainer",
                "network": {"type": "lora", "linear": 8, "linear_alpha": 8},
                "datasets": [{"folder_path": "photos", "caption_dropout_rate": 0.05, "num_repeats": 3}],
                "train": {
                    "steps": 30,
                    "lr": 1e-4,
                    "optimizer": "adafactor",
                    "ema_config": {"use_ema": True, "ema_decay": 0.99},
                },
                "model": {"name_or_path": "black-forest-labs/FLUX.1-dev", "arch": "flux"},
            }
        ],
    },
}
DIFFUSION_PIPE = """
dataset = 'examples/data.toml'
epochs = 4
micro_batch_size_per_gpu = 1
gradient_accumulation_steps = 2
warmup_steps = 3
save_every_n_epochs = 2
[model]
type = 'wan'
ckpt_path = '/data/Wan2.1-T2V-1.3B'
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
"""


class Described:
    """The files of a described folder, and what was told."""

    def __init__(self, folder: Path, told: str) -> None:
        run = parse_toml((folder / "run.toml").read_text(encoding="utf-8"))
        self.training: dict[str, Any] = run["training"]
        self.script: str = run["reelsmith"]["commands"][-1][1]
        self.steps = [words[1] for words in run["reelsmith"]["commands"]]
        self.general: dict[str, Any] = parse_toml((folder / "dataset.toml").read_text(encoding="utf-8"))[
            "general"
        ]
        self.told = " ".join(told.split())


def describe(
    folder: Path, content: Any, capsys: pytest.CaptureFixture[str], *words: str, name: str = "p.json"
) -> Described:
    """Describe a folder for the values of a project next to it."""
    file = folder.parent / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    argv = [str(folder), "--from", str(file), "--memory", "24", "--overwrite", *words]
    write_project(parse_options("", argv, NewOptions)[0])
    return Described(folder, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("folders", "regularising", "keys", "steps"),
    [
        ({".": 4}, 0, {}, 5 * 4 // 2),
        ({"10_ohwx man": 4}, 0, {}, 5 * 40 // 2),
        ({"10_ohwx man": 4, "3_ohwx house": 4}, 0, {}, 5 * (40 + 12) // 2),
        ({"10_ohwx man": 4}, 3, {}, 5 * 2 * 40 // 2),  # as many of the class as of the subject
        ({"10_ohwx man": 4}, 0, {"gradient_accumulation_steps": "4"}, 5 * math.ceil(20 / 4)),
        ({"10_ohwx man": 4}, 0, {"train_batch_size": "7"}, 5 * math.ceil(40 / 7)),
        ({".": 4}, 0, {"max_train_epochs": "3", "max_train_steps": "999"}, 3 * 2),  # it counts there
        ({".": 4}, 0, {"max_train_steps": "999"}, 999),
    ],
)
def test_epochs_are_as_many_steps_as_the_tables_make(
    folders: dict[str, int],
    regularising: int,
    keys: dict[str, Any],
    steps: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    for number, (place, count) in enumerate(folders.items()):
        write_photos(photos / place, count, stem=f"p{number}")
    if regularising:
        write_photos(photos / "reg" / "1_man", regularising, captions=False)
    described = describe(photos, {**KOHYA, **keys}, capsys)
    assert described.training["max_train_steps"] == steps
    if "epoch" in keys or "max_train_steps" in keys:
        assert "epoch = 5:" in described.told  # no key is dropped unsaid


def test_balancing_repeats_files_or_draws_a_number_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 4)
    concept = {"path": "photos", "balancing": 10.0, "balancing_strategy": "REPEATS"}
    repeated = describe(photos, {**ONETRAINER, "concepts": [concept]}, capsys)
    assert (repeated.training["max_train_steps"], repeated.general["num_repeats"]) == (5 * 40 // 2, 10)
    drawn = describe(
        photos, {**ONETRAINER, "concepts": [{**concept, "balancing_strategy": "SAMPLES"}]}, capsys
    )
    assert drawn.training["max_train_steps"] == 5 * 10 // 2
    assert "num_repeats" not in drawn.general


def test_a_project_of_diffusion_pipe_is_the_whole_model_with_repeats_for_all_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    (tmp_path / "examples").mkdir()
    data = "resolutions = [[512, 320]]\nnum_repeats = 5\n[[directory]]\npath = 'photos'\n"
    (tmp_path / "examples" / "data.toml").write_text(data, encoding="utf-8")
    full = describe(photos, DIFFUSION_PIPE, capsys, name="p.toml")
    assert full.script == "wan_train.py"  # it has no [adapter]
    assert full.training["max_train_steps"] == 4 * math.ceil(3 * 5 / 2)
    assert full.training["save_every_n_steps"] == 2 * math.ceil(3 * 5 / 2)
    assert full.general["resolution"] == [512, 320]
    assert full.training["optimizer_args"] == ["betas=0.9,0.99"]
    assert (full.training["learning_rate"], full.training["fused_backward_pass"]) == (2e-5, False)
    assert (full.training["gradient_accumulation_steps"], "blocks_to_swap" in full.training) == (2, False)
    text = DIFFUSION_PIPE + "[adapter]\ntype = 'lora'\nrank = 32\n"
    lora = describe(photos, text, capsys, name="p.toml")
    assert lora.script == "wan_train_network.py"
    assert lora.training["network_alpha"] == 32
    assert (lora.training["lr_scheduler"], lora.training["lr_warmup_steps"]) == ("constant_with_warmup", 3)


@pytest.mark.parametrize(
    ("content", "script", "values"),
    [
        ({**ONETRAINER, "training_method": "FINE_TUNE"}, "sdxl_train.py", {"learning_rate": 3e-4}),
        (
            {
                **ONETRAINER,
                "training_method": "EMBEDDING",
                "embedding": {"placeholder": "<zorb>", "token_count": 3},
            },
            "sdxl_train_textual_inversion.py",
            {"token_string": "zorb", "num_vectors_per_token": 3},
        ),
        (
            {
                "sdxl": True,
                "train_data_dir": "x",
                "token_string": "zorb",
                "init_word": "cat",
                "max_train_steps": 9,
            },
            "sdxl_train_textual_inversion.py",
            {"token_string": "zorb", "init_word": "cat", "max_train_steps": 9},
        ),
        (
            {
                "create_buckets": False,
                "epoch": "2",
                "train_text_encoder": True,
                "learning_rate": "1e-6",
                "v2": False,
            },
            "fine_tune.py",
            {"train_text_encoder": True, "learning_rate": 1e-6},
        ),
        (
            {"model_family": "sdxl", "model_type": "full", "max_train_steps": 9},
            "sdxl_train.py",
            {"max_train_steps": 9},
        ),
    ],
)
def test_what_a_project_trains_is_what_is_described(
    content: dict[str, Any],
    script: str,
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    described = describe(photos, content, capsys)
    assert described.script == script
    assert values.items() <= described.training.items()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {**ONETRAINER, "training_method": "FINE_TUNE_VAE"},
            "FINE_TUNE_VAE: `new` does not set up this kind of training",
        ),
        ({"LoRA_type": "LyCORIS/Native Fine-Tuning", "sdxl": True}, "trains differences of whole layers"),
        ({"model_family": "sdxl", "control": True}, "no script here trains such a LoRA"),
        ({"model_family": "flux", "controlnet": True}, "controlnet = true: .*ControlNet.*Pass --train lora"),
        ({"model_type": "SANA", "training_method": "LORA"}, "model_type = SANA"),
    ],
)
def test_what_is_not_set_up_is_refused_by_the_key_that_says_it(
    content: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    with pytest.raises(OptionError, match=f"(?s){message}"):
        describe(photos, content, capsys)


def test_a_rate_belongs_to_the_kind_and_to_the_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    full = {**ONETRAINER, "training_method": "FINE_TUNE", "learning_rate": 7e-6}
    lora = describe(photos, full, capsys, "--train", "lora")
    assert lora.training["learning_rate"] == 1e-4
    assert "learning_rate = 7e-06: it is not the rate of such a run" in lora.told
    other = {
        **KOHYA,
        "optimizer": "DAdaptation",
        "learning_rate": 1.0,
        "unet_lr": 1.0,
        "optimizer_args": "decouple=True",
    }
    adam = describe(photos, other, capsys)
    assert (adam.training["learning_rate"], "optimizer_args" in adam.training) == (1e-4, False)
    assert "another optimizer is used, with its own rates" in adam.told


def test_adafactor_has_the_arguments_of_the_project_or_of_its_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    fixed = ["scale_parameter=False", "relative_step=False", "warmup_init=False"]
    toolkit = describe(photos, AI_TOOLKIT, capsys)
    assert (toolkit.training["optimizer_args"], toolkit.training["learning_rate"]) == (fixed, 1e-4)
    assert (toolkit.training["ema_decay"], toolkit.general["caption_dropout_rate"]) == (0.99, 0.05)
    assert toolkit.general["num_repeats"] == 3
    text = "scale_parameter=True relative_step=True warmup_init=True weight_decay=2"
    kohya = describe(
        photos, {**KOHYA, "optimizer": "Adafactor", "optimizer_args": text, "lr_warmup": 10}, capsys
    )
    assert kohya.training["optimizer_args"] == text.split()
    assert kohya.training["lr_scheduler"] == "adafactor"
    assert "learning_rate = 3e-05: Adafactor with relative_step finds its own rate" in kohya.told


def test_text_encoders_learn_as_there_or_a_line_says_that_they_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    both = describe(photos, {**KOHYA, "text_encoder_lr": 1e-5}, capsys)
    assert (both.training["network_train_unet_only"], both.training["text_encoder_lr"]) == (False, [1e-5])
    assert "sdxl_cache_text_encoder_outputs.py" not in both.steps
    second = describe(
        photos, {**ONETRAINER, "text_encoder_2": {"train": True, "learning_rate": 1e-5}}, capsys
    )
    assert second.training["text_encoder_lr"] == [0, 1e-5]
    frozen = describe(
        photos,
        {**ONETRAINER, "model_type": "KREA_2", "text_encoder": {"train": True}},
        capsys,
        "--task",
        "raw",
    )
    assert "the project trains a text encoder, which is not possible here" in frozen.told


def test_keys_that_the_script_knows_are_taken_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    keys = {
        "shuffle_caption": True,
        "keep_tokens": "1",
        "caption_dropout_rate": 0.1,
        "flip_aug": True,
        "noise_offset": 0.05,
        "noise_offset_type": "Original",
        "min_snr_gamma": 7,
        "max_token_length": "225",
        "lr_warmup": 10,
        "weighted_captions": True,
        "on_end": "rm -rf x",
        "log_with": "wandb",
        "nothing_of_the_kind": 3,
        "clip_skip": "1",
    }
    found = describe(photos, {**KOHYA, "epoch": 20, **keys}, capsys)
    expected = {"noise_offset": 0.05, "min_snr_gamma": 7, "max_token_length": 225, "lr_warmup_steps": 4}
    assert expected.items() <= found.training.items()
    assert {
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_dropout_rate": 0.1,
        "flip_aug": True,
    }.items() <= found.general.items()
    assert not {"on_end", "log_with"} & found.training.keys()
    assert "weighted_captions = True: captions are read as they are" in found.told
    assert "left, this program has no such thing: nothing_of_the_kind" in found.told
    for key in keys:
        assert key in found.told
    without = describe(photos, KOHYA, capsys)
    assert "min_snr_gamma" not in without.training  # the form has none, so none is there


def test_usual_values_of_the_other_program_are_taken_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 3)
    found = describe(
        photos, {"model_type": "ANIMA", "training_method": "LORA", "text_encoder": {"train": False}}, capsys
    )
    expected = {"network_dim": 16, "network_alpha": 1.0, "learning_rate": 3e-6, "lr_warmup_steps": 200}
    assert expected.items() <= found.training.items()
    assert found.training["lr_scheduler"] == "constant_with_warmup"
    assert found.general["resolution"] == [512, 512]
    assert "set as by OneTrainer, because the file does not set it:" in found.told


SIMPLETUNER = {"model_family": "flux", "model_flavour": "dev", "model_type": "lora", "lora_rank": 4}
TOOLKIT_TRAIN = "config.process[0].train"


def misspell(content: Any, key: str, wrong: str) -> Any:
    """The same project with a key that is called otherwise."""
    if isinstance(content, str):
        return content.replace(f"\n{key} = ", f"\n{wrong} = ")
    return json.loads(json.dumps(content).replace(f'"{key}":', f'"{wrong}":'))


@pytest.mark.parametrize(
    ("content", "name", "key", "wrong", "told"),
    [
        (AI_TOOLKIT, "p.yaml", "steps", "stepps", f"{TOOLKIT_TRAIN}.stepps (for steps?)"),
        (DIFFUSION_PIPE, "p.toml", "epochs", "epocs", "epocs (for epochs?)"),
        (SIMPLETUNER, "p.json", "lora_rank", "lora_rnak", "lora_rnak (for lora_rank?)"),
        (ONETRAINER, "p.json", "epochs", "epohs", "epohs (for epochs?)"),
        (KOHYA, "p.json", "network_dim", "network_dimm", "network_dimm (for network_dim?)"),
        ({**KOHYA, "min_snr_gama": 5}, "p.json", "", "", "min_snr_gama (for min_snr_gamma?)"),
    ],
    ids=["AI Toolkit", "diffusion-pipe", "SimpleTuner", "OneTrainer", "kohya_ss", "an option"],
)
def test_a_key_that_is_nearly_one_of_the_program_is_told_with_it(
    content: Any,
    name: str,
    key: str,
    wrong: str,
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    if key:
        assert "probably misspelled" not in describe(photos, content, capsys, name=name).told
        content = misspell(content, key, wrong)
    found = describe(photos, content, capsys, name=name)
    assert f"left, probably misspelled: {told}" in found.told


def test_a_text_for_a_number_is_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    wrong = {"epoch": "two", "network_dim": "eight", "noise_offset": "some"}
    found = describe(photos, {**KOHYA, **wrong}, capsys)
    for key, value in wrong.items():
        assert f"{key} = {value}: it is not a number" in found.told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({**SIMPLETUNER, "model_family": "fluxx"}, "model_family = fluxx"),
        ({**ONETRAINER, "model_type": "SDXLL"}, "model_type = SDXLL"),
    ],
)
def test_a_model_of_no_known_name_is_said_to_be_that(
    content: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    with pytest.raises(OptionError, match=f"{said}.*, which names no model known here"):
        describe(photos, content, capsys)
