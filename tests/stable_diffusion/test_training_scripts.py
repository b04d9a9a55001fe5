"""The scripts that train Stable Diffusion, as users type them, on tiny checkpoints."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.commands import assert_user_error, run_script
from tests.tiny.stable_diffusion import (
    tokenizer_folder,
    write_folder,
    write_sd1,
    write_sd2,
    write_sdxl,
)

DATASET = """[general]
resolution = 64
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 32

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = "pictures"
"""
NPZ = """[general]
resolution = [64, 64]
caption_extension = ".txt"
cache_format = "npz"

[[datasets]]
image_directory = "pictures"
"""
LINE = "a red cat --n ugly --w 64 --h 64 --d 5 --s 3 --l 4"
STEPS = ["--max_train_steps", "2", "--seed", "1", "--learning_rate", "0.01", "--output_dir", "output"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for index, size in enumerate([(64, 64), (64, 64), (96, 48)]):
        pixels = generator.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(f"a cat, number {index}", encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (tmp_path / "npz.toml").write_text(NPZ, encoding="utf-8")
    (tmp_path / "samples.txt").write_text(f"{LINE}\n", encoding="utf-8")
    tokenizer_folder(tmp_path / "tokenizers")
    return tmp_path


def train(folder: Path, script: str, model: Path, *words: str, data: str = "dataset.toml") -> str:
    files = ["--pretrained_model_name_or_path", str(model), "--tokenizer_cache_dir", "tokenizers"]
    process = run_script(script, *files, "--dataset_config", data, *STEPS, *words, folder=folder)
    return process.stdout + process.stderr


def picture(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int64))


HATS = "with a small hat " * 30
LONG = f"a (very:0.7) long [red] cat {HATS}--n (ugly:1.2) --w 64 --h 64 --d 5 --s 3 --l 4"
# script, line of the sample, sampler, further words of training and of gen_img.py
SAMPLED: dict[str, tuple[str, str, str, list[str], list[str]]] = {
    "plain": ("sdxl_train_network.py", LINE, "euler_a", [], []),
    "brackets": ("sdxl_train_network.py", LINE.replace("red", "(red:1.3)"), "heun", [], []),
    "chunks": (
        *("sdxl_train_network.py", LONG, "ddim"),
        ["--max_token_length", "225"],
        ["--max_embeddings_multiples", "3"],
    ),
    "short in chunks": (
        *("sdxl_train_network.py", LINE, "k_dpm_2"),
        ["--max_token_length", "225"],
        ["--max_embeddings_multiples", "3"],
    ),
    "clip skip": ("train_network.py", LONG, "dpmsolver++", ["--clip_skip", "2"], ["--clip_skip", "2"]),
    "no guidance": ("train_network.py", LINE.replace("--l 4", "--l 0.5"), "lms", [], []),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLED)
def test_samples_are_the_pictures_of_gen_img(folder: Path, case: str) -> None:
    script, line, sampler, words, further = SAMPLED[case]
    model = write_sdxl(folder) if script.startswith("sdxl") else write_sd1(folder)
    (folder / "samples.txt").write_text(f"{line}\n", encoding="utf-8")
    learning = ["--network_dim", "4", "--text_encoder_lr", "0.01", "--cache_latents", *words]
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2", "--sample_sampler", sampler]
    train(folder, script, model, "--output_name", "lora", *learning, *samples, "--sample_at_first")

    files = ["--ckpt", model, "--tokenizer_cache_dir", "tokenizers", "--sampler", sampler, *further]
    lora = ["--network_module", "networks.lora", "--network_weights", "output/lora.safetensors"]
    for name, networks in {"with": lora, "without": []}.items():
        outputs = ["--prompt", line, "--outdir", name]
        run_script("gen_img.py", *files, *outputs, *networks, folder=folder)

    (first,) = (folder / "output" / "sample").glob("lora_e000000_00_*.png")
    (sample,) = (folder / "output" / "sample").glob("lora_000002_00_*.png")
    (generated,) = (folder / "with").glob("*.png")
    (base,) = (folder / "without").glob("*.png")
    assert torch.equal(picture(first), picture(base))
    assert torch.equal(picture(sample), picture(generated))
    assert (picture(sample) - picture(base)).abs().max() > 2


def test_a_lora_of_sdxl_has_the_names_of_released_files_and_loads_in_diffusers(folder: Path) -> None:
    model = write_folder("sdxl", folder / "model")
    words = ["--network_dim", "4", "--network_args", "conv_dim=2", "--cache_latents", "--min_snr_gamma", "5"]
    train(folder, "sdxl_train_network.py", model, "--output_name", "lora", *words)

    with safe_open(folder / "output" / "lora.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        down = file.get_tensor("lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight")
    assert down.shape == (2, 32, 3, 3)
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_up.weight" in names
    assert "lora_te1_text_model_encoder_layers_2_mlp_fc1.alpha" in names  # the last layer, which is not read
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in names
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["ss_min_snr_gamma"] == "5.0"
    assert json.loads(metadata["ss_tag_frequency"])["pictures"]["a cat"] == 3
    assert "modelspec.license" not in metadata  # of whatever checkpoint it was
    state, _ = StableDiffusionXLPipeline.lora_state_dict(
        folder / "output", weight_name="lora.safetensors", unet_config=None
    )[:2]
    assert len(state) > 100


@pytest.mark.slow
def test_npz_caches_are_read_and_written_as_sd_scripts_has_them(folder: Path) -> None:
    model = write_sdxl(folder)
    files = ["--pretrained_model_name_or_path", model, "--dataset_config", "npz.toml"]
    run_script("sdxl_cache_latents.py", *files, folder=folder)
    tokenizers = ["--tokenizer_cache_dir", "tokenizers"]
    run_script("sdxl_cache_text_encoder_outputs.py", *files, *tokenizers, folder=folder)

    with np.load(folder / "pictures" / "2_0096x0048_sdxl.npz") as latents:
        assert latents["original_size"].tolist() == [96, 48]
        assert latents["crop_ltrb"].tolist() == [0, 16, 64, 48]
        assert latents["latents"].shape == (4, 8, 8)
        raw = latents["latents"]
        assert 0.3 < raw.std() < 3  # not scaled by 0.13025
    with np.load(folder / "pictures" / "0_te_outputs.npz") as texts:
        assert texts["hidden_state1"].shape == texts["hidden_state2"].shape == (77, 64)
        assert texts["pool2"].shape == (64,)

    for path in (folder / "pictures").glob("*.npz"):  # as another program writes them
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if not name.startswith("reelsmith")}
        np.savez(path, **arrays)
    words = ["--network_train_unet_only", "--output_name", "lora", "--skip_cache_check"]
    to_disk = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
    output = train(folder, "sdxl_train_network.py", model, *words, *to_disk, data="npz.toml")
    assert "3 captions, 0 of them to encode" in output
    with np.load(folder / "pictures" / "2_0096x0048_sdxl.npz") as latents:
        assert (latents["latents"] == raw).all()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_stable_diffusion_1_and_2_train_from_caches(folder: Path, version: str) -> None:
    model = write_sd1(folder) if version == "sd1" else write_sd2(folder)
    files = ["--ckpt", model, "--dataset_config", "npz.toml"]
    run_script("sd_cache_latents.py", *files, folder=folder)
    run_script(
        "sd_cache_text_encoder_outputs.py", *files, "--tokenizer_cache_dir", "tokenizers", folder=folder
    )
    words = ["--network_train_unet_only", "--output_name", "lora", "--network_dim", "4"]
    blocks = ["--network_args", "down_lr_weight=0,1,1,1,1,1", "up_lr_weight=sine", "mid_lr_weight=0.5"]
    if version == "sd2":
        words += ["--v2", "--v_parameterization", "--zero_terminal_snr", "--min_snr_gamma", "5"]
    train(folder, "train_network.py", model, *words, *blocks, data="npz.toml")

    with safe_open(folder / "output" / "lora.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight" in names
    assert metadata["ss_base_model_version"] == ("sd_v1" if version == "sd1" else "sd_v2_v")
    assert metadata["ss_sd_model_name"] == model.name
    assert len(metadata["ss_sd_model_hash"]) == 8
    lora = ["--network_module", "networks.lora", "--network_weights", "output/lora.safetensors"]
    given = ["--ckpt", model, "--tokenizer_cache_dir", "tokenizers", "--outdir", "made", *lora]
    run_script("gen_img.py", *given, "--prompt", LINE, folder=folder)
    assert [*(folder / "made").glob("*.png")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--v2"], "train_network.py --v2"),
        (["--zero_terminal_snr"], "needs a model that predicts v"),
        (["--scale_v_pred_loss_like_noise_pred"], "models that predict v"),
        (["--v_pred_like_loss", "1", "--v_parameterization"], "models that predict noise"),
        (["--blocks_to_swap", "2"], "a U-Net"),
        (["--weighted_captions"], "captions are read as they are"),
        (["--network_args", "block_dims=4,4"], "2 values, but this model has"),
        (["--network_args", "up_lr_weight=no"], "not a number of at least 0"),
    ],
)
def test_what_is_not_built_is_refused_by_name(folder: Path, words: list[str], reason: str) -> None:
    model = write_sdxl(folder)
    files = ["--pretrained_model_name_or_path", model, "--dataset_config", "dataset.toml", *STEPS]

    process = run_script(
        "sdxl_train_network.py", *files, "--output_name", "lora", *words, folder=folder, check=False
    )

    assert process.returncode in (1, 2)
    assert reason in process.stderr.replace("\n", " ")
    assert words[0] in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_pndm_makes_samples_of_four_steps_and_more(folder: Path) -> None:
    model = write_sdxl(folder)
    files = ["--pretrained_model_name_or_path", model, "--dataset_config", "dataset.toml", *STEPS]
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2", "--sample_sampler", "pndm"]

    process = run_script("sdxl_train_network.py", *files, *samples, folder=folder, check=False)

    assert process.returncode == 2
    assert "--s 3: the sampler pndm begins with 4 steps of a different kind" in process.stderr
    assert "Traceback" not in process.stderr
    (folder / "samples.txt").write_text(LINE.replace("--s 3", "--s 4"), encoding="utf-8")
    train(folder, "sdxl_train_network.py", model, "--output_name", "lora", *samples)
    assert [*(folder / "output" / "sample").glob("lora_000002_00_*.png")]


def test_checkpoints_of_another_kind_name_the_script_that_trains_them(folder: Path) -> None:
    files = ["--dataset_config", "dataset.toml", *STEPS, "--output_name", "lora"]
    option = "--pretrained_model_name_or_path"
    cases = {
        "sdxl_train_network.py": (write_sd1(folder), "train_network.py"),
        "train_network.py": (write_sd1(folder, channels=9, name="paint.safetensors"), "inpainting"),
    }
    for script, (model, reason) in cases.items():
        process = run_script(script, option, model, *files, folder=folder, check=False)

        assert process.returncode == 1
        assert reason in process.stderr
        assert option in process.stderr


# `ss_*` of the known trainers' train_network.py, except for the commit of their program
KNOWN_KEYS = """
    adaptive_noise_scale base_model_version batch_size_per_device bucket_info bucket_no_upscale cache_latents
    caption_dropout_every_n_epochs caption_dropout_rate caption_tag_dropout_rate clip_skip color_aug
    dataset_dirs datasets debiased_estimation enable_bucket epoch face_crop_aug_range flip_aug fp8_base
    fp8_base_unet full_fp16 gradient_accumulation_steps gradient_checkpointing huber_c huber_scale
    huber_schedule ip_noise_gamma ip_noise_gamma_random_strength keep_tokens learning_rate loss_type lowram
    lr_scheduler lr_warmup_steps max_bucket_reso max_grad_norm max_token_length max_train_steps
    max_validation_steps min_bucket_reso min_snr_gamma mixed_precision multires_noise_discount
    multires_noise_iterations network_alpha network_args network_dim network_dropout network_module
    new_sd_model_hash noise_offset noise_offset_random_strength num_batches_per_epoch num_epochs
    num_reg_images num_train_images num_validation_images optimizer output_name prior_loss_weight random_crop
    reg_dataset_dirs resize_interpolation resolution scale_weight_norms sd_model_hash sd_model_name seed
    session_id shuffle_caption steps tag_frequency text_encoder_lr total_batch_size training_comment
    training_finished_at training_started_at unet_lr v2 vae_name validate_every_n_epochs
    validate_every_n_steps validation_seed validation_split zero_terminal_snr
"""
OF_FLOWS = "discrete_flow_shift guidance_scale sigmoid_scale weighting_scheme model_prediction_type"


def test_metadata_are_those_that_tag_browsers_and_model_managers_read(folder: Path) -> None:
    model = write_sd1(folder)
    regular = folder / "regular"
    regular.mkdir()
    shutil.copy(folder / "pictures" / "2.png", regular / "a.png")
    data = DATASET + 'num_repeats = 2\n[[datasets.subsets]]\nimage_dir = "regular"\nis_reg = true\n'
    (folder / "regular.toml").write_text(data + 'class_tokens = "Person"\n', encoding="utf-8")
    words = ["--clip_skip", "2", "--debiased_estimation_loss", "--split_attn", "--resolution", "64,64"]
    train(folder, "train_network.py", model, *words, "--max_train_steps", "1", data="regular.toml")

    with safe_open(folder / "output" / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    names = {key.removeprefix("ss_") for key in metadata if key.startswith("ss_")}
    assert {*KNOWN_KEYS.split()} <= names
    assert not names & {*OF_FLOWS.split()}
    expected = {
        "ss_num_train_images": "6",
        "ss_num_reg_images": "1",
        "ss_resolution": "(64, 64)",
        "ss_total_batch_size": "2",
        "ss_clip_skip": "2",
        "ss_v2": "False",
        "ss_keep_tokens": "0",
        "ss_debiased_estimation": "True",
        "ss_vae_name": "None",
        "ss_new_sd_model_hash": hashlib.sha256(model.read_bytes()).hexdigest(),
        "modelspec.encoder_layer": "2",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert json.loads(metadata["ss_dataset_dirs"]) == {"pictures": {"n_repeats": 2, "img_count": 3}}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"regular": {"n_repeats": 1, "img_count": 1}}
    info = json.loads(metadata["ss_bucket_info"])
    assert info["buckets"] == {"0": {"resolution": [64, 64], "count": 7}}
    assert info["mean_img_ar_error"] == 0.5  # two pictures of four are 2:1
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags["pictures"]["a cat"] == 3
    assert tags["regular"] == {"person": 1}
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert [subset["is_reg"] for subset in dataset["subsets"]] == [False, True]
    assert dataset["tag_frequency"] == tags
    assert dataset["subsets"][0] | {"img_count": 3, "num_repeats": 2} == dataset["subsets"][0]


@pytest.mark.slow
def test_older_npz_without_size_in_their_name_are_read(folder: Path) -> None:
    model = write_sdxl(folder)
    words = ["--cache_latents_to_disk", "--network_train_unet_only", "--network_dim", "4"]
    train(folder, "sdxl_train_network.py", model, *words)
    images = folder / "pictures"
    for path in [*images.glob("*_sdxl.npz")]:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if not name.startswith("reelsmith")}
        np.savez(images / f"{path.name.partition('_')[0]}.npz", **arrays)
        path.unlink()

    output = train(folder, "sdxl_train_network.py", model, *words, "--overwrite")

    assert "an older program" in output
    assert not [*images.glob("*_sdxl.npz")]
    (images / "2.npz").write_bytes(b"no npz")  # damaged: made again under the new name
    train(folder, "sdxl_train_network.py", model, *words, "--overwrite")
    assert [path.name for path in images.glob("*_sdxl.npz")] == ["2_0096x0048_sdxl.npz"]


def test_texts_of_another_base_are_refused_by_name(folder: Path) -> None:
    model = write_sdxl(folder)
    files = ["--dataset_config", "npz.toml", "--tokenizer_cache_dir", "tokenizers"]
    option = "--pretrained_model_name_or_path"
    run_script("sdxl_cache_latents.py", option, model, *files[:2], folder=folder)
    run_script("sdxl_cache_text_encoder_outputs.py", option, model, *files, folder=folder)
    state = load_file(model)
    other = folder / "other.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in state.items()}, other)
    words = [option, other, *files, *STEPS, "--network_train_unet_only"]

    process = run_script("sdxl_train_network.py", *words, folder=folder, check=False)

    assert_user_error(
        process,
        "it was not made by the text encoder of the trained checkpoint",
        "sdxl_cache_text_encoder_outputs.py",
    )
    run_script("sdxl_train_network.py", *words, "--skip_cache_check", folder=folder)
