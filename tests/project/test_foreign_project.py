"""`new --from`: what other trainers' projects say, and what becomes of each of their keys."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dataset.config import KEYS, load_dataset_config
from dataset.subset_options import SUBSET_KEYS
from flux.options import FluxTrainingOptions
from ltx_2.options import Ltx2TrainingOptions
from modules.errors import OptionError
from modules.options import get_option_info
from modules.script_options import parse_options
from modules.text_files import parse_toml
from project.files import write_project
from project.foreign.contract import ARGUMENT, DATA, NEW, OMITTED, OPTIMIZER_ARGUMENTS, PER_EPOCH, TRAINING
from project.foreign.lengths import select_length
from project.foreign.own_files import use_own_files
from project.foreign.project import ForeignProject
from project.foreign.reading import PROGRAMS, read_foreign
from project.foreign.settling import DatasetLayout, resolve_project
from project.kinds.composing import LORA
from project.kinds.contract import RunKind
from project.new_options import NewOptions
from project.options import find_models
from project.script_facts import read_script_options
from stable_diffusion.training_options import InversionOptions, StableDiffusionTrainingOptions
from tests.project.test_new import write_photos
from tests.tiny.new_models import write_new_model
from training.options import TrainingOptions

AI_TOOLKIT = """---
job: extension
config:
  name: "my_first_flux_lora_v1"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "p3r5on"
      network:
        type: "lora"
        linear: 12
        linear_alpha: 6
      save:
        dtype: float16
        save_every: 250
        max_step_saves_to_keep: 4
        push_to_hub: false
      datasets:
        - folder_path: "photos"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [ 512, 768, 1024 ]
      train:
        batch_size: 1
        steps: 1234
        gradient_accumulation_steps: 2
        train_unet: true
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        optimizer: "adamw8bit"
        lr: 1e-4
        dtype: bf16
      model:
        name_or_path: "black-forest-labs/FLUX.1-dev"
        is_flux: true
        quantize: true
      sample:
        sample_every: 125
        prompts:
          - "a [trigger]"
"""
ONETRAINER = {
    "__version": 6,
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
    "concept_file_name": "concepts.json",
    "learning_rate": 0.0003,
    "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 20.0,
    "epochs": 10,
    "batch_size": 2,
    "resolution": "768",
    "optimizer": {"optimizer": "ADAMW_8BIT", "weight_decay": 0.01},
    "lora_rank": 16,
    "lora_alpha": 1.0,
    "output_model_destination": "models/my lora.safetensors",
}
CONCEPTS = [{"name": "me", "path": "photos", "repeats": 3, "text": {"prompt_source": "sample"}}]
DIFFUSION_PIPE = """
output_dir = '/data/runs'
dataset = 'dataset.toml'
epochs = 1000
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1.0
warmup_steps = 100
[model]
type = 'z_image'
dtype = 'bfloat16'
diffusion_model = '/data/z.safetensors'
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
"""
DIRECTORIES = """
resolutions = [512]
enable_ar_bucket = true
[[directory]]
path = 'photos'
num_repeats = 5
"""
SIMPLETUNER = {
    "--model_family": "sdxl",
    "--model_type": "lora",
    "--pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0",
    "--lora_rank": 64,
    "--data_backend_config": "multidatabackend.json",
    "--max_train_steps": 900,
    "--num_train_epochs": 0,
    "--optimizer": "adamw_bf16",
    "--learning_rate": "8e-5",
    "--lr_scheduler": "polynomial",
    "--lr_warmup_steps": 100,
    "--train_batch_size": 4,
    "--resolution": 1.0,
    "--seed": 42,
}
BACKENDS = [
    {
        "id": "mine",
        "type": "local",
        "instance_data_dir": "photos",
        "repeats": 1,
        "caption_strategy": "textfile",
    },
    {"id": "text", "type": "local", "dataset_type": "text_embeds", "cache_dir": "cache"},
]
KOHYA = {
    "LoRA_type": "Standard",
    "pretrained_model_name_or_path": "D:/models/my_sdxl.safetensors",
    "sdxl": True,
    "v2": False,
    "train_data_dir": "photos",
    "output_name": "last",
    "network_dim": 8,
    "network_alpha": 4,
    "learning_rate": 0.0001,
    "lr_scheduler": "cosine",
    "lr_warmup": 10,
    "optimizer": "AdamW8bit",
    "epoch": 4,
    "max_train_steps": "",
    "train_batch_size": 1,
    "max_resolution": "512,512",
    "seed": 1234,
    "keep_tokens": "0",
}


def write_files(folder: Path, files: dict[str, Any]) -> Path:
    """Write files, and return the path of the first one."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / next(iter(files))


LTX_TRAINER = """
model:
  model_path: "/d/ltx-2.3.safetensors"
  text_encoder_path: "/d/gemma"
  training_mode: lora
  load_checkpoint: null
lora:
  rank: 16
  alpha: 8
  dropout: 0.1
  target_modules:
    - attn1.to_k
training_strategy:
  name: flexible
  video:
    is_generated: true
    latents_dir: latents
    conditions:
      - type: first_frame
        probability: 0.2
      - type: prefix
        temporal_boundary: 8
        probability: 0.75
      - type: mask
        probability: 1.0
        mask_dir: masks
      - type: reference
        layout: overlap
  audio:
    is_generated: true
    latents_dir: audio_latents
    conditions:
      - type: suffix
        temporal_boundary: 25
optimization:
  learning_rate: 2.0e-4
  steps: 3000
  batch_size: 2
  gradient_accumulation_steps: 4
  max_grad_norm: 0.5
  optimizer_type: adamw
  scheduler_type: linear
  scheduler_params: {}
  enable_gradient_checkpointing: true
acceleration:
  mixed_precision_mode: bf16
  quantization: null
data:
  preprocessed_data_root: "/d/.precomputed"
  num_dataloader_workers: 2
validation:
  interval: 250
  generate_audio: false
checkpoints:
  interval: 100
  keep_last_n: 4
  precision: bfloat16
flow_matching:
  timestep_sampling_mode: shifted_logit_normal
hub:
  push_to_hub: false
wandb:
  enabled: false
seed: 42
output_dir: "/d/outputs"
"""
PROJECTS = {
    "ltx-trainer": {"a2v.yaml": LTX_TRAINER},
    "AI Toolkit": {"train lora.yaml": AI_TOOLKIT},
    "OneTrainer": {"config.json": ONETRAINER, "concepts.json": CONCEPTS},
    "diffusion-pipe": {"main.toml": DIFFUSION_PIPE, "dataset.toml": DIRECTORIES},
    "SimpleTuner": {"config.json": SIMPLETUNER, "multidatabackend.json": BACKENDS},
    "the GUI of kohya_ss": {"gui.json": KOHYA},
}
# of each: new, training, data, epochs
MEANT: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int | None]] = {
    "ltx-trainer": (
        {"max_train_steps": 3000, "family": "ltx_2", "task": "av"},
        {
            "network_dim": 16,
            "network_alpha": 8,
            "network_dropout": 0.1,
            "ltx2_first_frame_conditioning_p": 0.2,
            "ltx2_extend_prefix_frames": 8,
            "ltx2_extend_prefix_p": 0.75,
            "ltx2_inpaint_mask": True,
            "ltx2_inpaint_mask_p": 1.0,
            "ltx2_audio_extend_suffix_frames": 25,
            "learning_rate": 2e-4,
            "gradient_accumulation_steps": 4,
            "max_grad_norm": 0.5,
            "optimizer_type": "adamw",
            "lr_scheduler": "linear",
            "sample_every_n_steps": 250,
            "save_every_n_steps": 100,
            "timestep_sampling": "shifted_logit_normal",
            "seed": 42,
        },
        {"batch_size": 2},
        None,
    ),
    "AI Toolkit": (
        {
            "output_name": "my_first_flux_lora_v1",
            "trigger_word": "p3r5on",
            "max_train_steps": 1234,
            "family": "flux",
            "task": "dev",
        },
        {
            "network_dim": 12,
            "network_alpha": 6,
            "save_every_n_steps": 250,
            "gradient_accumulation_steps": 2,
            "optimizer_type": "adamw8bit",
            "learning_rate": 1e-4,
            "sample_every_n_steps": 125,
        },
        {
            "resolution": ((1024, 1024), (768, 768), (512, 512)),
            "batch_size": 1,
            "caption_dropout_rate": 0.05,
            "shuffle_caption": False,
        },
        None,
    ),
    "OneTrainer": (
        {"family": "stable_diffusion", "task": "xl", "output_name": "my lora"},
        {
            "learning_rate": 0.0003,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 20,
            "optimizer_type": "adamw8bit",
            "network_dim": 16,
            "network_alpha": 1,
        },
        {"batch_size": 2, "resolution": ((768, 768),), "num_repeats": 3},
        10,
    ),
    "diffusion-pipe": (
        {"family": "z_image"},
        {
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 1,
            "lr_warmup_steps": 100,
            "network_dim": 32,
            "optimizer_type": "adamw",
            "learning_rate": 2e-5,
        },
        {"batch_size": 1, "resolution": ((512, 512),), "enable_bucket": True, "num_repeats": 5},
        1000,
    ),
    "SimpleTuner": (
        {"family": "stable_diffusion", "task": "xl", "max_train_steps": 900},
        {
            "network_dim": 64,
            "optimizer_type": "adamw",
            "learning_rate": 8e-5,
            "lr_scheduler": "polynomial",
            "lr_warmup_steps": 100,
            "seed": 42,
        },
        {"batch_size": 4, "resolution": ((1024, 1024),), "num_repeats": 2},
        None,
    ),
    "the GUI of kohya_ss": (
        {"family": "stable_diffusion", "task": "xl", "output_name": "last"},
        {
            "network_dim": 8,
            "network_alpha": 4,
            "learning_rate": 0.0001,
            "lr_scheduler": "cosine",
            "optimizer_type": "adamw8bit",
            "seed": 1234,
        },
        {"batch_size": 1, "resolution": ((512, 512),)},
        4,
    ),
}


def resolve_for(project: ForeignProject, kind: RunKind = LORA, memory: float = 24) -> None:
    """Settle what a project says for its model, as `new` does."""
    model = next(
        model
        for model in find_models()
        if model.family == project.new_options["family"]
        and project.new_options.get("task", model.task) == model.task
    )
    script = read_script_options(kind.find_training_command(model)[0])
    resolve_project(
        project,
        model,
        kind,
        script,
        memory,
        DatasetLayout(
            side_multiple=8,
            supports_subsets="shuffle_caption" in script.accepted,
            uses_subsets=False,
            target_size=(512, 512),
            clip_lengths=[],
        ),
    )


def keys_of(content: Any) -> set[str]:
    """The last names of all keys of a file that hold a value."""
    keys: set[str] = set()
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            keys |= keys_of(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                keys |= keys_of(item)
        else:
            keys.add(name.removeprefix("--"))
    return keys


@pytest.mark.parametrize("title", PROJECTS)
def test_a_project_says_what_its_authors_mean_and_every_key_is_told(title: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    project = read_foreign(write_files(tmp_path, PROJECTS[title]))

    assert project.title == title
    epochs = [said.number for said in project.epoch_settings if said.number]
    assert (project.new_options, project.training_options, project.general_keys) == MEANT[title][:3]
    assert epochs == [count for count in MEANT[title][3:] if count]
    assert [*project.folder_by_key.values()] == ([] if title == "ltx-trainer" else [Path("photos")])
    assert project.run.kind == "lora"
    resolve_for(project)
    select_length(project, NewOptions(folder=tmp_path), 7, 7)
    told = "\n".join(project.format_report(tmp_path / "photos"))
    assert "is described" not in told
    told += " ".join([*(file.key for file in project.own_files), *project.sample_keys])  # told later
    for content in PROJECTS[title].values():
        if isinstance(content, str):
            import yaml

            content = (
                yaml.safe_load(content) if title in {"AI Toolkit", "ltx-trainer"} else parse_toml(content)
            )
        for item in content if isinstance(content, list) else [content]:
            for key in keys_of(item):
                assert key in told, key


def describe(folder: Path, file: Path, *words: str) -> None:
    argv = [str(folder), "--from", str(file), *words]
    write_project(parse_options("", argv, NewOptions)[0])


def test_values_of_a_project_are_in_the_three_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos ü"
    write_photos(photos)
    file = write_files(tmp_path, {"train lora.yaml": AI_TOOLKIT.replace('"photos"', '"/data/elsewhere"')})

    describe(photos, file, "--memory", "24", "--trigger_word", "ohwx")

    training = parse_toml((photos / "run.toml").read_text(encoding="utf-8"))["training"]
    expected = {
        "max_train_steps": 1234,
        "output_name": "my_first_flux_lora_v1",
        "network_dim": 12,
        "network_alpha": 6,
        "learning_rate": 1e-4,
        "save_every_n_steps": 250,
        "save_last_n_steps_state": 250,
        "gradient_accumulation_steps": 2,
    }
    assert expected.items() <= training.items()
    tables = load_dataset_config(photos / "dataset.toml").datasets
    # each file is trained at each of the sizes, as there
    assert [table.buckets.resolution for table in tables] == [(1024, 1024), (768, 768), (512, 512)]
    assert {table.source.directory for table in tables} == {Path()}
    assert len({table.cache_directory for table in tables}) == 3
    assert {table.captions.trigger_word for table in tables} == {"ohwx"}
    told = " ".join(capsys.readouterr().out.split())
    assert "the size of a typical file" not in told
    for part in (
        "is a project of AI Toolkit; nothing of it is run",
        "folder_path = /data/elsewhere: ",
        "trigger_word = p3r5on: --trigger_word sets another value",
        "taken: ",
        "caption_dropout_rate",
        "push_to_hub",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("title", "file", "ours"),
    [
        ("AI Toolkit", {"a.yaml": AI_TOOLKIT.replace('type: "lora"', "type: lokr")}, "networks.lokr"),
        ("OneTrainer", {"a.json": {**ONETRAINER, "peft_type": "LOHA"}}, "networks.loha"),
        ("the GUI of kohya_ss", {"a.json": {**KOHYA, "LoRA_type": "LyCORIS/LoKr"}}, "networks.lokr"),
    ],
)
def test_other_networks_of_a_project_are_those_that_are_trained(
    title: str, file: dict[str, Any], ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    words = ["--family", "stable_diffusion", "--task", "xl"] if title == "the GUI of kohya_ss" else []
    describe(photos, write_files(tmp_path, file), "--memory", "24", *words)

    training = parse_toml((photos / "run.toml").read_text(encoding="utf-8"))["training"]
    assert training["network_module"] == ours
    told = " ".join(capsys.readouterr().out.split())
    assert f"project of {title};" in told
    assert f": network_module = {ours}" in told


def test_what_is_taken_has_a_place_here() -> None:
    of_training = {
        *get_option_info(TrainingOptions),
        *get_option_info(StableDiffusionTrainingOptions),
        *get_option_info(InversionOptions),
        *get_option_info(Ltx2TrainingOptions),
        *get_option_info(FluxTrainingOptions),
    }
    arguments = {"beta1", "beta2", "eps2"}.union(*OPTIMIZER_ARGUMENTS.values())
    places = {
        NEW: get_option_info(NewOptions),
        TRAINING: of_training,
        PER_EPOCH: of_training,
        DATA: {*KEYS, *SUBSET_KEYS},
        ARGUMENT: arguments,
    }
    models = {(model.family, model.task) for model in find_models()}
    families = {family for family, _ in models}
    for program in PROGRAMS:
        for rule in program.rules.values():
            assert rule.target not in places or rule.name in places[rule.target], rule
        for family, task in program.model_by_name.values():
            assert family in families if task is None else (family, task) in models


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "!!python/object/apply:os.system ['echo x']", "cannot be read"),
        ("a.yaml", "config: {process: [{type: x, lora: &a [*a]}]}", "cannot be read|deep"),
        ("a.yaml", "a: &a [x, x]\nb: &b [*a, *a]\n" + "c: 1", "not a project of AI Toolkit"),
        ("a.yaml", 'a: !!int ""', "cannot be read: a value does not fit its tag"),
        ("a.json", "[" * 5000 + "]" * 5000, "cannot be read"),
        ("a.json", json.dumps({"training_method": [{} for _ in range(6000)]}), "more than 5000"),
        ("a.json", '{"training_method": ' + "9" * 5000 + "}", "cannot be read"),
        ("a.toml", "[" * 100_000, "cannot be read"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.json", json.dumps({"training_method": {f"k{i}": i for i in range(6000)}}), "more than 5000"),
        ("a.json", '{"a": 1}', "not a project of AI Toolkit"),
        ("a.json", '{"training_method": ["LORA"]}', "does not set up this kind of training"),
        ("a.yaml", "job: [x]\nconfig: {process: [{type: [y]}]}", "does not set up this kind of training"),
        ("a.toml", "a = ", "cannot be read"),
        ("a.txt", "a", "pass a .yaml, .toml or .json"),
    ],
)
def test_hostile_and_foreign_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = write_files(tmp_path, {name: content})
    with pytest.raises(OptionError, match=message):
        read_foreign(file)


def test_values_that_cannot_be_meant_are_left_with_the_reason(tmp_path: Path) -> None:
    content = {
        "LoRA_type": "LyCORIS/iA3",
        "optimizer": "evil.module.Class",
        "network_dim": 10**9,
        "learning_rate": "nan",
        "output_name": "../../up",
        "seed": [1],
        "pretrained_model_name_or_path": "nobody/knows",
        "\x1b[2Jkey": 1,
    }
    project = read_foreign(write_files(tmp_path, {"gui.json": content}))
    assert project.training_options == {}
    assert project.new_options == {"output_name": "up"}
    assert len(project.omission_lines) == 5
    assert [file.value for file in project.own_files] == ["nobody/knows"]
    assert "a LoRA is trained" in "\n".join(project.omission_lines)
    assert [*project.keys_without_rule] == ["\x1b[2Jkey"]  # escaped where lines are printed


def test_a_missing_further_file_is_told(tmp_path: Path) -> None:
    project = read_foreign(write_files(tmp_path, {"main.toml": DIFFUSION_PIPE}))
    assert any("dataset.toml: it is not there" in line for line in project.omission_lines)
    assert project.folder_by_key == {}


@pytest.mark.parametrize(
    ("arch", "repository", "adapter", "task"),
    [
        (
            "zimage:turbo",
            "Tongyi-MAI/Z-Image-Turbo",
            "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors",
            "turbo-adapter",
        ),
        ("krea2:turbo", "krea/Krea-2-Turbo", "ostris/krea2_turbo_training_adapter", "turbo-adapter"),
    ],
)
def test_a_published_adapter_is_that_of_its_task(
    arch: str, repository: str, adapter: str, task: str, tmp_path: Path
) -> None:
    model = (
        f'arch: "{arch}"\n        assistant_lora_path: "{adapter}"\n        name_or_path: "{repository}"\n'
    )
    text = AI_TOOLKIT.replace('name_or_path: "black-forest-labs/FLUX.1-dev"\n', model)
    project = read_foreign(write_files(tmp_path, {"project.yaml": text}))
    assert project.new_options["task"] == task
    assert "training_adapter" not in project.training_options
    assert any(f"--task {task}, with the published adapter" in line for line in project.change_lines)


def write_checkpoint(path: Path) -> Path:
    """Write a tiny Stable Diffusion XL of the user's own, under a name that no release has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = write_new_model("stable_diffusion xl", path.parent / "released")
    (checkpoint,) = [word.partition("=")[2] for word in words if word.startswith("ckpt=")]
    path.write_bytes(Path(checkpoint).read_bytes())
    return path


def own_model_projects(file: str) -> dict[str, dict[str, Any]]:
    """Projects of programs that train an SDXL of the user's own."""
    job = AI_TOOLKIT.replace('"black-forest-labs/FLUX.1-dev"', json.dumps(file)).replace("is_flux", "is_xl")
    return {
        "the GUI of kohya_ss": {"a.json": {**KOHYA, "pretrained_model_name_or_path": file}},
        "OneTrainer": {"a.json": {**ONETRAINER, "base_model_name": file}},
        "AI Toolkit": {"a.yaml": job},
    }


@pytest.mark.parametrize("title", own_model_projects(""))
def test_the_base_model_of_a_project_is_trained_or_nothing_is_written(
    title: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    project = write_files(tmp_path, own_model_projects("own models/pony ü.safetensors")[title])
    with pytest.raises(OptionError) as refused:
        describe(photos, project, "--memory", "24", "--models", str(tmp_path / "m"))
    message = str(refused.value)
    assert "trains on own models/pony ü.safetensors" in message
    last = message.splitlines()[-1]
    assert "reelsmith.py new" in last
    assert last.endswith("--model_file ckpt=PATH")
    assert "--models" in last
    assert not (photos / "run.toml").exists()

    own = write_checkpoint(tmp_path / "own models/pony ü.safetensors")
    describe(photos, project, "--memory", "24")
    run = parse_toml((photos / "run.toml").read_text(encoding="utf-8"))
    assert own.as_posix() in json.dumps(run, ensure_ascii=False)
    assert "sd_xl_base" not in json.dumps(run)
    assert "--model_file ckpt=" in capsys.readouterr().out


def test_a_typed_model_takes_the_place_of_a_missing_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    project = write_files(tmp_path, {"a.json": KOHYA})
    describe(photos, project, "--memory", "24", "--family", "stable_diffusion", "--task", "xl")
    told = capsys.readouterr().out
    assert "different from your project: pretrained_model_name_or_path = D:/models/my_sdxl" in told


def test_a_lora_to_start_from_is_taken_or_asked_for(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    values = {**KOHYA, "pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}
    project = write_files(tmp_path, {"a.json": {**values, "network_weights": "old.safetensors"}})
    with pytest.raises(OptionError, match="starts from the LoRA old.safetensors"):
        describe(photos, project, "--memory", "24")
    (tmp_path / "old.safetensors").write_bytes(b"")
    project = read_foreign(project)
    model = next(model for model in find_models() if (model.family, model.task) == ("stable_diffusion", "xl"))
    options = NewOptions(folder=photos)
    assert use_own_files(project, options, model, options) == options
    assert project.training_options["network_weights"] == (tmp_path / "old.safetensors").as_posix()


@pytest.mark.parametrize(
    ("keys", "name", "value"),
    [
        ({"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 5.0}, "min_snr_gamma", 5.0),
        ({"loss_weight_fn": "MIN_SNR_GAMMA"}, "min_snr_gamma", 5.0),
        ({"loss_weight_fn": "CONSTANT", "loss_weight_strength": 5.0}, "min_snr_gamma", None),
        ({"loss_weight_fn": "DEBIASED_ESTIMATION"}, "debiased_estimation_loss", True),
        ({"ema": "GPU", "ema_decay": 0.995}, "ema_decay", 0.995),
        ({"ema": "CPU"}, "ema_decay", 0.999),
        ({"ema": "OFF", "ema_decay": 0.995}, "ema_decay", None),
        ({"validation": True}, "validation_split", 0.1),
        ({"validation": False}, "validation_split", None),
    ],
)
def test_a_switch_of_onetrainer_and_its_value_are_one_setting(
    keys: dict[str, Any], name: str, value: Any, tmp_path: Path
) -> None:
    plain = {key: old for key, old in ONETRAINER.items() if key not in {"ema", "ema_decay", "loss_weight_fn"}}
    project = read_foreign(write_files(tmp_path, {"a.json": {**plain, **keys}}))
    assert project.training_options.get(name) == value


@pytest.mark.parametrize(
    ("keys", "value"),
    [({"use_ema": True, "ema_decay": 0.99}, 0.99), ({"use_ema": True}, 0.995), ({"ema_decay": 0.99}, None)],
)
def test_an_average_of_simpletuner_is_that_of_its_switch(
    keys: dict[str, Any], value: float | None, tmp_path: Path
) -> None:
    name, content = next(iter(PROJECTS["SimpleTuner"].items()))
    plain = {key.removeprefix("--"): old for key, old in content.items()}
    plain = {key: old for key, old in plain.items() if key not in {"use_ema", "ema_decay"}}
    project = read_foreign(write_files(tmp_path, {name: {**plain, **keys}}))
    assert project.training_options.get("ema_decay") == value


def test_samples_of_a_project_are_those_of_the_run(tmp_path: Path) -> None:
    sample = {"prompt": "a cat -- on ice", "negative_prompt": "dog", "width": 512, "height": 768, "seed": 7}
    sample |= {"diffusion_steps": 12, "cfg_scale": 4.5}
    off = {"prompt": "nobody", "enabled": False}
    onetrainer = {**ONETRAINER, "samples": [sample, off]}
    lines = "# mine\na fox --w 512 --h 512 --d 3 --n blurry\n\n"
    line = "a cat on ice --w 512 --h 768 --l 4.5 --s 12 --d 7 --n dog"
    base = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}
    for number, (content, expected) in enumerate(
        [
            (onetrainer, line),
            ({**KOHYA, **base, "sample_prompts": lines}, "a fox --w 512 --h 512 --d 3 --n blurry"),
        ]
    ):
        photos = tmp_path / f"photos{number}"
        write_photos(photos)
        describe(photos, write_files(tmp_path, {"a.json": content}), "--memory", "24")
        assert (photos / "prompts.txt").read_text(encoding="utf-8").splitlines() == [expected]


def test_as_many_saves_are_kept_as_the_project_keeps(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    text = AI_TOOLKIT
    assert "save_every: " in text
    describe(photos, write_files(tmp_path, {"a.yaml": text}), "--memory", "24")
    training = parse_toml((photos / "run.toml").read_text(encoding="utf-8"))["training"]
    # the file of a step, and those of three steps before it
    assert training["save_last_n_steps"] == 3 * training["save_every_n_steps"]


# reasons that name an option or a key that the user may write -> why no rule writes it
NOT_WRITTEN = {
    "network_args below [training] choose layers: docs/networks.md": "names of layers differ",
    "set it by network_args below [training]: docs/networks.md": "one key for several kinds of networks",
    "timestep_sampling below [training] is that of the model's page": "distributions have no equal here",
    "without sample_prompts below [training] there are no samples": "samples do not change a training",
    "`new` names the masks that it sees, for mask_directory in dataset.toml": "masks have other names there",
    "class_tokens in dataset.toml is the caption of files without one": "`new` asks for captions",
    "learning_rate below [training] may be changed before a run continues": "it acts on continued runs alone",
    "loss_type and huber_c below [training]": "its scale is another one",
    "it needs a folder of its own there; validation_split below [training] holds files of this one back": (  # noqa: E501
        "files that were trained would be held back"
    ),
    "frame_extraction in dataset.toml says it": "`new` chooses the frames of clips",
    "targets below [training] keep what was distilled: docs/targets.md": "it takes another guidance",
    "training_adapter below [training] accepts such a file": "it is merged there for good",
    "it multiplies learning_rate by the batch: write the product below [training]": "it is not known here",
    "it multiplies learning_rate: write the product below [training]": "what it multiplies is of the machine",
    "max_grad_norm below [training] is the norm of all gradients": "it is read with max_grad_norm",
    "tread below [training] leaves tokens out: docs/speed.md": "routes are numbered otherwise",
    "num_repeats in dataset.toml says how often files are seen": "a share is no number of repeats",
    "lr_scheduler = cosine_with_min_lr below [training] has such a factor": "of one schedule alone",
    "custom_attributes.diff_output_preservation in a subset of dataset.toml: docs/image_datasets.md": "class",
    "batch_size in a table of dataset.toml": "tables of images and clips are one folder here",
    "shuffle_caption in a subset of dataset.toml shuffles in each step": "it is a number of variants there",
    "caption_separator in a subset of dataset.toml": "it acts with the key before it",
    "dataset.toml says where caches go": "a folder of the other program",
    "each folder of dataset.toml is used": "a folder that is off is left out",
    "crops are of the middle; random_crop in a subset of dataset.toml moves them": "it moves them by less",
    "dataset.toml is written by `new`": "it is a file of the other program",
    "spatial_crop_region in a table of dataset.toml": "it needs the folder of the clips",
    "references are in reference_directory of dataset.toml: docs/ltx2.md": "the folder is not in the project",
    "logging_dir below [training] says where logs go": "a folder of the other program",
    "audio_cond_mask_directory in dataset.toml and ltx2_audio_inpaint_mask below [training]": "files",
    "lr_scheduler_args below [training]": "arguments of classes that are not here",
    "optimizer says it": "the key `optimizer` is taken",
    "ltx2_train_direction below [training] says it": "both streams together are",
}


def test_what_has_a_counterpart_here_is_written_or_there_is_a_reason() -> None:
    """A key that is left out because the user may write it here has a reason why no rule does so."""
    pattern = re.compile(r"below \[training\]|dataset\.toml|says it|say it")
    reasons = {
        rule.name
        for program in PROGRAMS
        for rule in program.rules.values()
        if rule.target == OMITTED and pattern.search(rule.name)
    }
    assert reasons == set(NOT_WRITTEN)


def test_options_that_the_form_has_as_text_are_options(tmp_path: Path) -> None:
    typed = "--debiased_estimation_loss --min_timestep 100 --loss_type=huber --seed 5"
    project = read_foreign(write_files(tmp_path, {"a.json": {**KOHYA, "additional_parameters": typed}}))
    resolve_for(project)
    assert project.training_options["debiased_estimation_loss"] is True
    assert project.training_options["min_timestep"] == 100
    assert project.training_options["loss_type"] == "huber"
    assert project.training_options["seed"] == KOHYA["seed"]


def test_more_samples_than_a_run_can_make_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    base = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}
    lines = "\n".join(f"a cat {number} --w 64 --h 64" for number in range(60))
    project = write_files(tmp_path, {"a.json": {**KOHYA, **base, "sample_prompts": lines}})
    describe(photos, project, "--memory", "24")
    assert len((photos / "prompts.txt").read_text(encoding="utf-8").splitlines()) == 50
    assert "left: 10 more sample prompts" in capsys.readouterr().out
