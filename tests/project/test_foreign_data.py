"""`new --from`: sizes, lengths and buckets of datasets, sample prompts, and settings of several keys."""

import json
from pathlib import Path
from typing import Any

import pytest

from dataset.config import load_dataset_config
from modules.text_files import parse_toml
from project.foreign.reading import read_foreign
from project.prompt_lines import plain
from tests.project.test_foreign_project import (
    AI_TOOLKIT,
    BACKENDS,
    KOHYA,
    LTX_TRAINER,
    ONETRAINER,
    SIMPLETUNER,
    describe,
    resolve_for,
    write_files,
)
from tests.project.test_new import write_photos
from tests.tiny.project import write_clips

XL = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}


def read_tables(folder: Path) -> dict[str, Any]:
    return parse_toml((folder / "dataset.toml").read_text(encoding="utf-8"))


def list_prompts(folder: Path) -> list[str]:
    return (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()


def backend(name: str, resolution: int, **keys: Any) -> dict[str, Any]:
    """A backend of SimpleTuner over the same folder."""
    return {"id": name, "type": "local", "instance_data_dir": "photos", "resolution": resolution, **keys}


def test_a_folder_that_is_listed_once_for_each_size_is_trained_at_all(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    backends = [backend("a", 512, repeats=1), backend("b", 1024, repeats=1), BACKENDS[1]]
    files = {"config.json": {**SIMPLETUNER, "--resolution": 512}, "multidatabackend.json": backends}
    describe(photos, write_files(tmp_path, files), "--memory", "24")
    tables = load_dataset_config(photos / "dataset.toml").datasets
    assert [table.buckets.resolution for table in tables] == [(1024, 1024), (512, 512)]
    assert [table.learning.num_repeats for table in tables] == [2, 2]


def test_sizes_of_images_in_subsets_are_tables_with_the_same_subsets(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    write_photos(photos / "reg" / "1_cat", captions=False)
    text = AI_TOOLKIT.replace('"black-forest-labs/FLUX.1-dev"', '"stabilityai/stable-diffusion-xl-base-1.0"')
    text = text.replace("is_flux", "is_xl").replace("[ 512, 768, 1024 ]", "[ 512, 1024 ]")
    describe(photos, write_files(tmp_path, {"a.yaml": text}), "--memory", "24")
    tables = load_dataset_config(photos / "dataset.toml").datasets
    found = [(table.buckets.resolution, table.learning.is_reg) for table in tables]
    assert found == [(size, is_reg) for size in [(1024, 1024), (512, 512)] for is_reg in (False, True)]
    assert len({table.cache_directory for table in tables}) == 4


@pytest.mark.parametrize(("resolution", "sizes"), [("512", 1), ("512,768", 2)])
def test_onetrainer_draws_one_of_its_sizes_so_an_epoch_is_no_longer(
    resolution: str, sizes: int, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)  # 3 images
    project = {**ONETRAINER, "resolution": resolution, "concept_file_name": "", "batch_size": 1}
    describe(photos, write_files(tmp_path, {"a.json": project}), "--memory", "24")
    training = parse_toml((photos / "run.toml").read_text(encoding="utf-8"))["training"]
    assert len(load_dataset_config(photos / "dataset.toml").datasets) == sizes
    assert training["max_train_steps"] == 10 * 3


def wan_job(**dataset: Any) -> str:
    """A job of AI Toolkit for Wan2.1, in JSON."""
    process = {
        "type": "sd_trainer",
        "network": {"type": "lora", "linear": 8},
        "datasets": [{"folder_path": "clips", "resolution": [64], **dataset}],
        "train": {"steps": 9, "lr": 1e-4},
        "model": {"name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "arch": "wan21:1b"},
        "sample": {"prompts": ["a cat"], "num_frames": 42, "width": 64, "height": 64, "guidance_scale": 5},
    }
    return json.dumps({"job": "extension", "config": {"name": "a", "process": [process]}})


@pytest.mark.parametrize(
    ("frames", "lengths"),
    [(9, [9]), (8, [5]), (1, [1]), (33, [9])],
    ids=["fits", "rounded", "images", "long"],
)
def test_lengths_of_clips_are_those_of_the_project(
    frames: int, lengths: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    write_clips(clips)
    describe(clips, write_files(tmp_path, {"a.json": wan_job(num_frames=frames)}), "--memory", "24")
    (table,) = read_tables(clips)["datasets"]
    assert table["target_frames"] == lengths
    told = capsys.readouterr().out
    assert ("target_frames = " in told) is True
    # a sample has frames too, at a length of the model
    assert list_prompts(clips) == ["a cat --w 64 --h 64 --f 41 --l 5"]


def test_lengths_without_clips_have_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = tmp_path / "clips"
    write_photos(clips)
    describe(clips, write_files(tmp_path, {"a.json": wan_job(num_frames=33)}), "--memory", "24")
    assert "target_frames" not in str(read_tables(clips))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "datasets[0].num_frames" in line]
    assert "without effect there and here" in line


@pytest.mark.parametrize(
    ("keys", "general", "told"),
    [
        # of values that are defaults of the keys, `new` would choose others
        (
            {"max_resolution": "1024,1024", "min_bucket_reso": 256, "max_bucket_reso": 1024},
            {"min_bucket_reso": 256, "max_bucket_reso": 1024, "enable_bucket": True},
            "min_bucket_reso",
        ),
        (
            {"max_resolution": "128,128", "min_bucket_reso": 256, "max_bucket_reso": 1024},
            {"min_bucket_reso": 128, "max_bucket_reso": 1024},
            "min_bucket_reso = 256: min_bucket_reso = 128, because files are trained at 128x128",
        ),
        (
            {"max_resolution": "512,512", "max_bucket_reso": 256},
            {"max_bucket_reso": 512},
            "max_bucket_reso = 256: max_bucket_reso = 512",
        ),
        (
            {"min_bucket_reso": 320, "bucket_no_upscale": True},
            {"bucket_no_upscale": True},
            "without effect there and here: min_bucket_reso",
        ),
        (
            {"enable_bucket": False, "min_bucket_reso": 320, "bucket_no_upscale": True},
            {"enable_bucket": False},
            "without effect there and here: ",
        ),
    ],
)
def test_buckets_are_those_of_the_project(
    keys: dict[str, Any],
    general: dict[str, Any],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    project = {**KOHYA, **XL, "enable_bucket": True, "caption_extension": ".txt", **keys}
    describe(photos, write_files(tmp_path, {"a.json": project}), "--memory", "24")
    found = read_tables(photos)
    assert found["general"].items() >= general.items()
    kept = {"min_bucket_reso", "max_bucket_reso", "bucket_no_upscale"} & found["general"].keys()
    assert kept == general.keys() - {"enable_bucket"}
    load_dataset_config(photos / "dataset.toml")
    assert told in " ".join(capsys.readouterr().out.split())


LTX_SAMPLES = """
  samples:
    - prompt: "a fox -5 degrees -- runs"
      conditions: []
    - prompt: "a cat"
  video_dims: [576, 448, 49]
  negative_prompt: "blurry"
  seed: 7
  inference_steps: 30
  guidance_scale: 4.5
  skip_initial_validation: true
"""
LTX_PROMPTS = LTX_SAMPLES.replace(
    '''  samples:
    - prompt: "a fox -5 degrees -- runs"
      conditions: []
    - prompt: "a cat"''',
    """  prompts: ["a fox -5 degrees -- runs", "a cat"]""",
)


@pytest.mark.parametrize("samples", [LTX_SAMPLES, LTX_PROMPTS], ids=["tables", "older files"])
def test_samples_of_ltx_trainer_are_those_of_the_run(
    samples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    write_clips(clips)
    text = LTX_TRAINER.replace("  generate_audio: false\n", samples.lstrip("\n"))
    text = text.replace('"/d/ltx-2.3.safetensors"', "null").replace('"/d/gemma"', "null")
    describe(clips, write_files(tmp_path, {"a.yaml": text}), "--memory", "24", "--task", "v")
    more = "--w 576 --h 448 --f 49 --s 30 --l 4.5 --d 7 --n blurry"
    assert list_prompts(clips) == [f"a fox -5 degrees runs {more}", f"a cat {more}"]
    told = " ".join(capsys.readouterr().out.split())
    assert "sample a fox -5 degrees runs: a line of prompts.txt has no -- in its prompt" in told
    training = parse_toml((clips / "run.toml").read_text(encoding="utf-8"))["training"]
    assert training["sample_at_first"] is False


def test_older_files_of_ltx_trainer_say_what_is_given_and_heard(tmp_path: Path) -> None:
    old = "training_strategy:\n  name: text_to_video\n  first_frame_conditioning_p: 0.3\n  with_audio: {}\n"
    for is_on, task in (("true", "av"), ("false", "v")):
        project = read_foreign(write_files(tmp_path, {"a.yaml": old.format(is_on)}))
        assert project.new_options["task"] == task
        assert project.training_options["ltx2_first_frame_conditioning_p"] == 0.3


def test_one_guidance_is_the_embedded_one_of_models_that_have_it(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos)
    text = AI_TOOLKIT.replace(
        "sample_every: 125", "sample_every: 125\n        guidance_scale: 4\n        seed: 1"
    )
    describe(photos, write_files(tmp_path, {"a.yaml": text}), "--memory", "24", "--trigger_word", "ohwx")
    (line,) = list_prompts(photos)
    assert line.startswith("a ohwx ")
    assert "--g 4 " in line
    assert "--l " not in line


@pytest.mark.parametrize(
    ("resolution", "sizes"),
    [("512", ["512x512"]), ("1.0", ["1024x1024"]), ("1024x768,512", ["1024x768", "512x512"])],
)
def test_simpletuner_makes_a_sample_at_each_size(resolution: str, sizes: list[str], tmp_path: Path) -> None:
    values = {"validation_prompt": "a cat", "validation_resolution": resolution}
    project = read_foreign(write_files(tmp_path, {"config.json": {**SIMPLETUNER, **values}}))
    assert [f"{sample.size[0]}x{sample.size[1]}" for sample in project.samples if sample.size] == sizes


def test_values_of_a_sample_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    values = {
        "validation_prompt": "a cat",
        "validation_guidance": "high",
        "validation_num_inference_steps": "2.5",
        "validation_seed": -1,
    }
    project = read_foreign(write_files(tmp_path, {"config.json": {**SIMPLETUNER, **values}}))
    (sample,) = project.samples
    assert (sample.steps, sample.guidance, sample.seed) == (None, None, None)
    told = "\n".join(project.omission_lines)
    assert "validation_guidance = high of a sample: it is not a number" in told
    assert "validation_num_inference_steps = 2.5 of a sample: it is not a whole number" in told
    assert "seed" not in told


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a -5 degree night, -style", "a -5 degree night, -style"),
        ("a cat -- on ice --raw", "a cat on ice raw"),
        ("a cat -w 512", "a cat w 512"),
        ("# a cat\n\nand a dog", "a cat and a dog"),
    ],
)
def test_a_prompt_keeps_the_dashes_that_begin_no_option(text: str, line: str) -> None:
    assert plain(text) == line


def toolkit(train: str = "", network: str = "") -> str:
    """The job of AI Toolkit with further keys of its training, or another network."""
    text = AI_TOOLKIT.replace("        lr: 1e-4\n", f"        lr: 1e-4\n{train}")
    return (
        text.replace('        type: "lora"\n        linear: 12\n        linear_alpha: 6\n', network)
        if network
        else text
    )


LOKR = "        type: lokr\n        linear: 16\n        lokr_factor: 4\n        lokr_full_rank: {}\n"
PIPE = "micro_batch_size_per_gpu = 1\n[adapter]\ntype = 'lora'\nrank = 4\n[model]\ntype = 'flux'\n"
FLUX_REPOSITORY = {
    "--pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "--model_family": "flux",
}
FLOW = {"model_type": "FLUX_DEV_1", "base_model_name": "black-forest-labs/FLUX.1-dev"}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.yaml", toolkit("        timestep_type: sigmoid\n"), {"timestep_sampling": "sigmoid"}),
        ("a.yaml", toolkit("        timestep_type: linear\n"), {"timestep_sampling": "uniform"}),
        # no such distribution is here: the page's stays
        ("a.yaml", toolkit("        timestep_type: weighted\n"), {"timestep_sampling": None}),
        (
            "a.yaml",
            toolkit("        timestep_type: linear\n        noise_scheduler: ddpm\n"),
            {"timestep_sampling": None},
        ),
        (
            "a.yaml",
            toolkit("        force_first_sample: false\n        skip_first_sample: true\n"),
            {"sample_at_first": False},
        ),
        (
            "a.yaml",
            toolkit(network=LOKR.format("true")),
            {"network_dim": 1_000_000, "network_alpha": 1_000_000, "network_args": ["factor=4"]},
        ),
        (
            "a.yaml",
            toolkit(network=LOKR.format("false")),
            {"network_dim": 16, "network_alpha": 1, "network_args": ["factor=4"]},
        ),
        # the page's default network has neither
        (
            "a.yaml",
            toolkit(network=LOKR.format("true").replace("lokr\n", "lora\n", 1)),
            {"network_dim": 16, "network_args": None},
        ),
        ("a.toml", PIPE + "shift = 3\n", {"timestep_sampling": "shift", "discrete_flow_shift": 3}),
        (
            "a.toml",
            PIPE + "flux_shift = true\nshift = 3\n",
            {"timestep_sampling": "flux_shift", "discrete_flow_shift": None},
        ),
        (
            "a.toml",
            PIPE + "timestep_sample_method = 'logit_normal'\nsigmoid_scale = 1.3\n",
            {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.3},
        ),
        ("a.toml", PIPE + "timestep_sample_method = 'uniform'\n", {"timestep_sampling": "uniform"}),
        ("a.toml", PIPE, {"timestep_sampling": None}),
        (
            "a.json",
            {**SIMPLETUNER, **FLUX_REPOSITORY, "flow_schedule_shift": 3, "flow_sigmoid_scale": 1.2},
            {"timestep_sampling": "shift", "discrete_flow_shift": 3, "sigmoid_scale": 1.2},
        ),
        (
            "a.json",
            {
                **SIMPLETUNER,
                **FLUX_REPOSITORY,
                "flow_schedule_shift": 3,
                "flow_schedule_auto_shift": True,
            },
            {"timestep_sampling": None, "discrete_flow_shift": None},
        ),
        (
            "a.json",
            {
                **ONETRAINER,
                **FLOW,
                "timestep_distribution": "LOGIT_NORMAL",
                "timestep_shift": 2.5,
                "noising_weight": 0.2,
            },
            {"timestep_sampling": "shift", "discrete_flow_shift": 2.5, "sigmoid_scale": 1.2},
        ),
        (
            "a.json",
            {
                **ONETRAINER,
                **FLOW,
                "timestep_distribution": "UNIFORM",
                "timestep_shift": 1.0,
                "noising_weight": 0.2,
            },
            {"timestep_sampling": "uniform", "discrete_flow_shift": None, "sigmoid_scale": None},
        ),
        (
            "a.json",
            {**ONETRAINER, **FLOW, "timestep_distribution": "UNIFORM", "timestep_shift": 3.0},
            {"timestep_sampling": None, "discrete_flow_shift": None},
        ),
        ("a.json", {**ONETRAINER, "mse_strength": 0.0, "mae_strength": 1.0}, {"loss_type": "l1"}),
        ("a.json", {**ONETRAINER, "mse_strength": 0.5, "mae_strength": 0.5}, {"loss_type": None}),
        (
            "a.json",
            {**ONETRAINER, "min_noising_strength": 0.0, "max_noising_strength": 1.0},
            {"max_timestep": None},
        ),
        (
            "a.json",
            {**KOHYA, "LoRA_type": "LyCORIS/LoKr", "decompose_both": True, "conv_dim": 4},
            {"network_args": ["decompose_both=True", "conv_dim=4"]},
        ),
        ("a.json", {**KOHYA, "clip_skip": 2}, {"clip_skip": None}),
    ],
)
def test_keys_that_make_one_setting_together_are_that_setting(
    name: str, content: Any, expected: dict[str, Any], tmp_path: Path
) -> None:
    project = read_foreign(write_files(tmp_path, {name: content}))
    resolve_for(project)
    found = {key: project.training_options.get(key) for key in expected}
    assert {key: sorted(value) if isinstance(value, list) else value for key, value in found.items()} == {
        key: sorted(value) if isinstance(value, list) else value for key, value in expected.items()
    }


def test_a_concept_has_its_own_sizes_if_it_says_so(tmp_path: Path) -> None:
    image = {"resolution_override": "256,512", "enable_resolution_override": True}
    concept = {"path": "photos", "image": image}
    project = read_foreign(write_files(tmp_path, {"a.json": {**ONETRAINER, "concepts": [concept]}}))
    assert project.general_keys["resolution"] == ((512, 512), (256, 256))
    image["enable_resolution_override"] = False
    project = read_foreign(write_files(tmp_path, {"a.json": {**ONETRAINER, "concepts": [concept]}}))
    assert project.general_keys["resolution"] == ((768, 768),)
