"""Qwen-Image-Layered from a folder of layers to files, by the commands that users type."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import qwen_image_cache_latents
import qwen_image_cache_text_encoder_outputs
import qwen_image_generate_image
import qwen_image_train
import qwen_image_train_network
from tests.tiny.dit_files import TinyModel
from tests.tiny.qwen_image import write_tiny_qwen_image
from training.reports.history import history_path

LAYERED = ["--model_version", "layered"]
SAMPLE = "a cat --ci {} --f 2 --w 32 --h 32 --s 2 --d 7 --l 1"


def write_layers_of(folder: Path, name: str, count: int) -> None:
    """Write a picture, its caption, and layers with a square each."""
    numbers = numpy.random.default_rng(len(name) + count)
    full = Image.new("RGBA", (48, 32))
    for index in range(1, count + 1):
        pixels = numpy.zeros((32, 48, 4), numpy.uint8)
        pixels[..., :3] = numbers.integers(0, 256, 3)
        pixels[:, :, 3] = 255 if index == 1 else 0
        pixels[4 * index : 4 * index + 12, 8:24, 3] = 255
        layer = Image.fromarray(pixels)
        layer.save(folder / f"{name}_{index}.png")
        full.alpha_composite(layer)
    full.convert("RGB").save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"a {name}", encoding="utf-8")


class Project:
    """A folder of pictures with layers, cached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: TinyModel = write_tiny_qwen_image(folder / "model", layered=True)
        self.pictures = folder / "pictures ü"
        self.pictures.mkdir()
        for name, count in (("cat", 2), ("dog", 2), ("bird", 3)):
            write_layers_of(self.pictures, name, count)
        lines = ["[general]", "resolution = [48, 32]", 'caption_extension = ".txt"', "batch_size = 2"]
        lines += ["[[datasets]]", f'image_directory = "{self.pictures.as_posix()}"']
        lines += [f'cache_directory = "{(folder / "cache").as_posix()}"', "multiple_target = true"]
        self.dataset = ["--dataset_config", str(folder / "dataset.toml")]
        (folder / "dataset.toml").write_text("\n".join(lines), encoding="utf-8")
        self.vae = ["--vae", str(self.files.vae), "--vae_dtype", "float32"]
        self.texts = ["--text_encoder", str(self.files.text_encoder), "--text_encoder_dtype", "float32"]

    def cache(self) -> None:
        on_cpu = [*self.dataset, *LAYERED, "--device", "cpu"]
        qwen_image_cache_latents.main([*self.vae, *on_cpu])
        qwen_image_cache_text_encoder_outputs.main([*self.texts, *on_cpu])

    def train(self, main: Any, output: str, *words: str) -> Path:
        models = ["--dit", str(self.files.dit), *self.vae, *self.texts, *LAYERED, *self.dataset]
        saved = ["--output_dir", str(self.folder / output), "--output_name", "made"]
        steps = ["--max_train_steps", "2", "--seed", "3", "--timestep_sampling", "shift"]
        main([*models, *saved, *steps, "--discrete_flow_shift", "2.5", "--sdpa", *words])
        return self.folder / output / "made.safetensors"

    def train_lora(self, output: str, *words: str) -> Path:
        network = ["--network_module", "networks.lora_qwen_image", "--network_dim", "4"]
        network += ["--network_alpha", "64"]  # two steps show
        rate = ["--learning_rate", "3e-2", "--optimizer_type", "adamw"]
        return self.train(qwen_image_train_network.main, output, *network, *rate, *words)

    def generate(self, output: str, *words: str) -> Path:
        folder = self.folder / output
        models = ["--dit", str(self.files.dit), *self.vae, *self.texts, *LAYERED]
        asked = ["--prompt", "a cat", "--control_image_path", str(self.pictures / "cat.png")]
        asked += ["--output_layers", "2", "--image_size", "32", "32", "--infer_steps", "2", "--seed", "7"]
        plain = ["--guidance_scale", "1", "--device", "cpu", "--save_path", str(folder)]
        qwen_image_generate_image.main([*models, *asked, *plain, *words])
        return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("layers of"))
    project.cache()
    return project


def pixels_of(folder: Path, ending: str) -> numpy.ndarray:
    (path,) = folder.glob(f"*{ending}.png")
    return numpy.array(Image.open(path)).astype(int)


def test_caches_are_those_of_the_known_tuner(project: Project) -> None:
    tensors = load_file(project.folder / "cache" / "bird_0048x0032_qil.safetensors")

    (name,) = tensors
    assert name == "latents_1x4x6_float32"
    assert tensors[name].shape == (16, 4, 4, 6)
    assert (project.folder / "cache" / "bird_qil_te.safetensors").is_file()


def test_a_sample_of_a_training_is_what_the_generation_script_makes_of_its_lora(project: Project) -> None:
    prompts = project.folder / "prompts.txt"
    prompts.write_text(SAMPLE.format(project.pictures / "cat.png"), encoding="utf-8")

    lora = project.train_lora("lora", "--sample_prompts", str(prompts), "--sample_every_n_steps", "2")

    made = project.generate("with", "--lora_weight", str(lora))
    without = project.generate("without")
    sample = project.folder / "lora" / "sample"
    for ending in ("_layer0", "_layer1", "_layer2", "_composite"):
        assert abs(pixels_of(sample, ending) - pixels_of(made, ending)).max() <= 1
    assert abs(pixels_of(sample, "_layer1") - pixels_of(without, "_layer1")).max() > 4
    lines = history_path(project.folder / "lora", "made").read_text(encoding="utf-8").splitlines()
    (shown,) = [row["files"] for row in map(json.loads, lines) if "samples" in row]
    assert [name.endswith("_composite.png") for name in shown.values()] == [True]  # on the run's page
    with safe_open(lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "qwen_image_layered"
    assert metadata["modelspec.architecture"].startswith("Qwen-Image-Layered")


def test_without_the_whole_picture_layers_alone_are_learned_and_made(project: Project) -> None:
    prompts = project.folder / "alone.txt"
    prompts.write_text(SAMPLE.format(project.pictures / "cat.png"), encoding="utf-8")
    samples = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "2"]

    project.train_lora("alone", "--remove_first_image_from_target", *samples)
    made = project.generate("made alone", "--remove_first_image_from_target")

    samples_folder = project.folder / "alone" / "sample"
    for folder, sheets in (
        (samples_folder, ["sheet"]),
        (made, []),
    ):  # a run shows its composites side by side
        endings = sorted(path.stem.rpartition("_")[2] for path in folder.glob("*.png"))
        assert endings == ["composite", "layer1", "layer2", *sheets]


def test_a_whole_model_keeps_the_tensor_of_layers_and_makes_pictures(project: Project) -> None:
    full = project.train(
        qwen_image_train.main, "whole", "--optimizer_type", "adamw", "--learning_rate", "1e-3"
    )

    before, after = load_file(project.files.dit), load_file(full)
    assert before.keys() == after.keys()
    name = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(before[name], after[name].to(before[name].dtype))
    folder = project.generate("of whole", "--dit", str(full))
    assert pixels_of(folder, "_composite").shape == (32, 32, 4)


def test_latents_are_decoded_later_to_the_same_layers(project: Project) -> None:
    folder = project.generate("latents", "--output_type", "latent_images")
    (latents,) = folder.glob("*_latent.safetensors")

    options = ["--latent_path", str(latents), *project.vae, *LAYERED, "--device", "cpu"]
    qwen_image_generate_image.main([*options, "--save_path", str(project.folder / "decoded")])

    for ending in ("_layer0", "_layer1", "_layer2", "_composite"):
        decoded = pixels_of(project.folder / "decoded", ending)
        assert (decoded == pixels_of(folder, ending)).all()
    assert json.dumps(load_file(latents)["latent"].shape) == "[16, 3, 4, 4]"
