"""Commands and files as users of the known trainers, of their graphical interface and of notebooks have them.

Each is what a published one says, without what all of them have.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dataset.config import load_dataset_config
from dataset.subsets import folders_config
from dataset.table import DatasetTable
from modules.errors import OptionError
from modules.options import Options
from stable_diffusion.sd1.options import Sd1TrainingOptions
from stable_diffusion.sdxl.options import SdxlTrainingOptions
from stable_diffusion.training_options import SHOWN_AS
from training.image_options import NOISE_TRAINER, read_image_training
from training.options import TrainingOptions

SCRIPTS: dict[str, type[Options]] = {
    "train_network.py": Sd1TrainingOptions,
    "sdxl_train_network.py": SdxlTrainingOptions,
}
FILES = {
    # a graphical interface writes all its fields, in the order of the alphabet: 0 and "" it leaves out
    "interface.toml": """
bucket_no_upscale = true
bucket_reso_steps = 64.0
cache_latents = true
caption_dropout_rate = 0.05
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 160
huber_c = 0.1
huber_scale = 1
huber_schedule = "snr"
loss_type = "l2"
lr_scheduler = "constant"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_steps = 2400
min_bucket_reso = 256
min_snr_gamma = 5
mixed_precision = "bf16"
network_args = []
network_dim = 32
no_half_vae = true
noise_offset = 0.05
noise_offset_type = "Original"
optimizer_args = [ "weight_decay=0.01", "decouple=True", "d0=0.0001", "use_bias_correction=True",]
optimizer_type = "Prodigy"
output_dir = "out"
output_name = "last"
persistent_data_loader_workers = 1
prior_loss_weight = 1
reg_data_dir = "reg"
resolution = "1024,1024"
sample_sampler = "euler_a"
save_model_as = "safetensors"
scale_weight_norms = 5
text_encoder_lr = []
train_batch_size = 8
train_data_dir = "img"
unet_lr = 1.0
wandb_run_name = "last"
xformers = true
""",
    # a notebook: sections, null left out, a data set in a file of its own
    "notebook.toml": """
[model_arguments]
v2 = false
v_parameterization = false

[additional_network_arguments]
no_metadata = false
unet_lr = 0.0001
text_encoder_lr = 5e-5
network_module = "networks.lora"
network_dim = 32
network_alpha = 16
network_args = [ "conv_dim=32", "conv_alpha=16",]
network_train_unet_only = false

[optimizer_arguments]
optimizer_type = "AdamW8bit"
max_grad_norm = 1.0
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 0
lr_scheduler_num_cycles = 3

[training_arguments]
output_dir = "out"
save_precision = "fp16"
max_token_length = 225
mem_eff_attn = false
max_train_epochs = 10
persistent_data_loader_workers = true
lowram = true
clip_skip = 2

[sample_prompt_arguments]
sample_sampler = "ddim"

[saving_arguments]
save_model_as = "safetensors"
""",
    # all options by hand, with those that are off
    "by_hand.toml": """
[Basics]
train_data_dir = "img"
resolution = "512"
max_train_steps = 10000
max_train_epochs = 2
[Save]
output_dir = "out"
save_last_n_steps_state = 1
[Network_setup]
network_alpha = 4.0
resume = false
network_dropout = 0
[Lr_scheduler]
lr_scheduler_type = ""
[Further_improvement]
multires_noise_discount = 0.3
multires_noise_iterations = 10
[Huggingface]
resume_from_huggingface = false
[Others]
training_comment = ""
""",
    # a model of v with zero terminal SNR
    "of_v.toml": """
[sdxl_arguments]
cache_text_encoder_outputs = true
[model_arguments]
v_parameterization = true
zero_terminal_snr = true
[dataset_arguments]
train_data_dir = "img"
resolution = "1024,1024"
enable_bucket = true
max_bucket_reso = 2048
caption_extension = ".txt"
[training_arguments]
output_dir = "out"
max_token_length = 225
[optimizer_arguments]
optimizer_type = "Prodigy"
learning_rate = 1.0
optimizer_args = ["decouple=True", "betas=0.9,0.99"]
[network_arguments]
network_train_unet_only = true
""",
    "metadata.toml": """
[dataset_arguments]
in_json = "meta.json"
train_data_dir = "flat"
dataset_repeats = 10
resolution = "1024,1024"
[training_arguments]
output_dir = "out"
max_train_epochs = 10
min_timestep = 0
[optimizer_arguments]
optimizer_type = "AdaFactor"
max_grad_norm = 0
optimizer_args = [ "scale_parameter=False", "relative_step=False", "warmup_init=False",]
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 80
""",
}
DATASETS = {
    "notebook_data.toml": """
[[datasets]]
resolution = 512
min_bucket_reso = 256
max_bucket_reso = 1024
caption_dropout_rate = 0
caption_dropout_every_n_epochs = 0
flip_aug = false
[[datasets.subsets]]
image_dir = "flat"
class_tokens = "mksks style"
num_repeats = 10
[[datasets.subsets]]
is_reg = true
image_dir = "reg/1_person"
class_tokens = "style"
num_repeats = 1
[general]
enable_bucket = true
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 0
bucket_reso_steps = 64
bucket_no_upscale = false
""",
    "masked_data.toml": """
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 1
enable_bucket = true
min_bucket_reso = 64
bucket_reso_steps = 32
  [[datasets.subsets]]
  image_dir = './flat'
  caption_extension = '.txt'
  conditioning_data_dir = './reg/1_person'
""",
    "three_sizes.toml": """
[general]
flip_aug = true
keep_tokens_separator= "|||"
caption_tag_dropout_rate = 0
caption_extension = ".txt"
[[datasets]]
enable_bucket = true
resolution = [1024, 1024]
  [[datasets.subsets]]
  image_dir = "./flat"
[[datasets]]
enable_bucket = true
resolution = [768, 768]
  [[datasets.subsets]]
  image_dir = "./flat"
""",
    "listed.toml": """
[[datasets]]
resolution = 512
  [[datasets.subsets]]
  image_dir = "./flat"
  num_repeats = 10
  metadata_file = "./meta.json"
""",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("img/10_ohwx man", "reg/1_person", "flat"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name / "0.png")
    (tmp_path / "meta.json").write_text('{"0": {"caption": "a cat", "tags": "1girl, cat"}}')
    for name, text in {**FILES, **DATASETS}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(line: str) -> tuple[TrainingOptions, Any, tuple[DatasetTable, ...]]:
    """The options of a command, those of its model, and the tables of its data set."""
    script, *words = line.split()
    defaults = replace(NOISE_TRAINER, shown_as=SHOWN_AS)
    base = ["--pretrained_model_name_or_path", "model.safetensors"]
    options, model, _ = read_image_training(None, SCRIPTS[script], defaults, [*base, *words])
    assert options.subset is not None
    path = options.loop.dataset_config
    config = folders_config(options.subset) if path is None else load_dataset_config(path, options.subset)
    return options, model, config.datasets


def test_a_file_of_the_graphical_interface() -> None:
    options, model, tables = read("sdxl_train_network.py --config_file interface.toml")

    assert options.optimizer.arguments()["d0"] == 0.0001
    assert options.speed.attention.choice.mode == "xformers"
    assert model.num_chunks == 1
    assert (model.loss_weights.min_snr_gamma, model.varied_noise.noise_offset) == (5, 0.05)
    assert [
        (table.learning.num_repeats, table.learning.is_reg, table.captions.class_tokens) for table in tables
    ] == [
        (10, False, "ohwx man"),
        (1, True, "person"),
    ]
    assert tables[0].buckets.rule is not None
    assert tables[0].buckets.rule.step == 64
    assert tables[0].captions.caption_dropout_rate == 0.05


def test_a_notebook_with_a_data_set() -> None:
    line = "train_network.py --config_file=notebook.toml --dataset_config=notebook_data.toml"
    options, model, tables = read(line)

    assert options.network is not None
    assert options.network.arguments() == {"conv_dim": "32", "conv_alpha": "16"}
    assert options.lora_parts is not None
    assert options.lora_parts.text_encoder_lr == (5e-5,)
    assert options.saving.output_name == "last"
    assert (model.num_chunks, model.clip_skip) == (3, 2)
    assert [table.learning.is_reg for table in tables] == [False, True]
    assert tables[0].captions.changes.shuffle


def test_a_file_with_all_options_by_hand() -> None:
    options, model, (table,) = read("train_network.py --config_file by_hand")

    assert options.saving.resume is None
    assert options.lr_schedule.lr_scheduler_type == ""
    assert model.varied_noise.multires_noise_iterations == 10
    assert (table.buckets.resolution, table.buckets.enable_bucket) == ((512, 512), False)


def test_a_model_of_v() -> None:
    options, model, (table,) = read("sdxl_train_network.py --config_file of_v.toml")

    assert model.v_parameterization
    assert model.zero_terminal_snr
    assert options.caching is not None
    assert options.caching.caches_texts
    assert table.captions.caption_extension == ".txt"


def test_pictures_that_a_json_file_lists() -> None:
    options, _, (table,) = read("sdxl_train_network.py --config_file metadata.toml")

    assert table.learning.num_repeats == 10
    assert options.optimizer.max_grad_norm == 0
    assert options.lr_schedule.lr_warmup_steps == 80
    _, _, (listed,) = read("train_network.py --dataset_config listed.toml --output_dir out")
    assert listed.source_key == "metadata_file"


COMMON = "--network_module networks.lora --output_dir=out --learning_rate=1e-4"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "train_network.py --dataset_config=three_sizes.toml --save_model_as=safetensors --network_dim=16 "
            "--network_alpha=1 --use_8bit_adam --lr_scheduler=constant --sdpa --max_train_epochs=10 "
            "--save_every_n_epochs=1 --mixed_precision=fp16 --gradient_checkpointing",
            {"resolution": (1024, 1024)},
        ),
        (
            "train_network.py --dataset_config masked_data.toml --masked_loss --prior_loss_weight 1.0 "
            "--max_train_steps 400 --max_train_epoch 50 --use_8bit_adam --cache_latents",
            {"mask_directory": Path("reg/1_person")},
        ),
        (
            "sdxl_train_network.py --train_data_dir=img/ --resolution=768 --dataset_repeats=1 "
            "--text_encoder_lr 1e-5 2e-5 --unet_lr 1e-4 --enable_bucket --no_half_vae",
            {"resolution": (768, 768), "num_repeats": 10},
        ),
        (
            "sdxl_train_network.py --train_data_dir img --reg_data_dir reg --resolution=1024,1024 "
            "--keep_tokens 1 --shuffle_caption --caption_extention .cap --flip_aug --bucket_reso_steps 32 "
            "--network_train_unet_only --lr_scheduler cosine --noise_offset 0.0357",
            {"caption_extension": ".cap"},
        ),
    ],
)
def test_commands_of_guides(line: str, expected: dict[str, Any]) -> None:
    _, _, (table, *_) = read(f"{line} {COMMON}")

    assert {name: table.value_of(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "sdxl_train_network.py --text_encoder_lr1=1e-5 --text_encoder_lr2=1e-5",
            "both rates to",
        ),
        ("train_network.py --lr_scheduler constant --lr_warmup_steps 100", "constant_with_warmup"),
        ("train_network.py --save_model_as ckpt", "only safetensors"),
        ("train_network.py --weighted_captions", "captions are read as they are"),
        ("train_network.py --deepspeed", "DeepSpeed is not used"),
        ("train_network.py --sample_every_n_epochs 1", "--sample_prompts"),
    ],
)
def test_what_is_refused_says_what_to_type(line: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        read(f"{line} --train_data_dir img --resolution 512 {COMMON}")
