"""Z-Image through the command lines equals diffusers: whole pipelines, steps of training, and LoRAs."""

from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import convert_lora
import zimage_generate_image
import zimage_train
from encoders.autoencoder import SCALE, SHIFT
from modules.media.reading import read_image
from networks import convert_z_image_lora_to_comfy
from tests.encoders.test_autoencoder import diffusers_autoencoder
from tests.faults.messages import succeed_here
from tests.parity.running import assert_equal
from tests.parity.training import (
    RANK,
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    mixed,
    normal_share,
    padded,
    shifted,
    shuffled,
)
from tests.tiny.language_models import QWEN3_TEMPLATE, qwen3
from tests.tiny.project import write_plain_pictures
from tests.tiny.z_image import TinyZImage, comfy_state, write_adapter, write_dit, write_tiny_z_image
from tests.z_image.making import in_diffusers, predict_with, tiny_inputs

PROMPT, NEGATIVE, SEED = "a red cat sits down", "dull", 20
HEIGHT, WIDTH, STEPS, FLOW_SHIFT = 48, 80, 4, 3.0
RATE = 20.0
TUNER = numpy.linspace(1, 0.001, STEPS + 1)[:-1].tolist()
# what is asked here -> there; guidance scales count from 0 in both
CASES: dict[str, tuple[list[str], dict[str, object]]] = {
    "turbo": (["--even_steps"], {"guidance_scale": 0.0}),
    "base": (["--even_steps", "--guidance_scale", "3"], {"guidance_scale": 3.0}),
    "levels of the known tuner": (["--guidance_scale", "3"], {"guidance_scale": 3.0, "sigmas": TUNER}),
    "normalised and truncated": (
        ["--even_steps", "--guidance_scale", "3", "--renorm_cfg", "1.1", "--cfg_trunc_ratio", "0.3"],
        {"guidance_scale": 3.0, "cfg_normalization": 1.1, "cfg_truncation": 0.3},
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyZImage:
    return write_tiny_z_image(tmp_path_factory.mktemp("models"))


def theirs(files: TinyZImage) -> ZImagePipeline:
    """diffusers' pipeline with the weights of these files, in float32 on the CPU."""
    vae = diffusers_autoencoder()
    vae.register_to_config(scaling_factor=SCALE, shift_factor=SHIFT)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
        chat_template=QWEN3_TEMPLATE,
    )
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=vae,
        text_encoder=qwen3(),
        tokenizer=tokenizer,
        transformer=in_diffusers(load_file(files.dit)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("how", CASES)
@torch.no_grad()
def test_pictures_equal_those_of_diffusers(files: TinyZImage, tmp_path: Path, how: str) -> None:
    more, settings = CASES[how]
    words = [*files.models, "--prompt", PROMPT, "--vae_dtype", "float32", "--seed", str(SEED), *more]
    words += ["--image_size", str(HEIGHT), str(WIDTH), "--infer_steps", str(STEPS)]
    if settings["guidance_scale"]:
        words += ["--negative_prompt", NEGATIVE]
    words += ["--output_type", "latent_images", "--device", "cpu", "--save_path", str(tmp_path)]

    zimage_generate_image.main(words)

    pipe = theirs(files)

    def make(**output: str) -> Tensor:
        found = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            **settings,
            **output,
        ).images
        return torch.as_tensor(found)

    (latents,) = (load_file(path)["latent"] for path in tmp_path.rglob("*_latent.safetensors"))
    # another order of sums alone; float32
    assert_equal(latents[None].squeeze(2), make(output_type="latent"), "latents", 1e-4)
    (picture,) = tmp_path.rglob("*.png")
    levels = torch.from_numpy(read_image(picture))
    assert (levels - make(output_type="np")[0] * 255).abs().max() < 0.51  # as near as bytes can be


def read_items(folder: Path) -> list[Item]:
    """What our caches hold, latents in model space, in the order of their names."""

    def tensor(path: Path, start: str) -> Tensor:
        (found,) = (value for name, value in load_file(path).items() if start in name)
        return found

    paths = sorted(folder.glob("*_zi.safetensors"))
    texts = [folder / f"{path.name.rsplit('_', 2)[0]}_zi_te.safetensors" for path in paths]
    return [
        Item((tensor(path, "latents_1x6x6_")[:, None] - SHIFT) * SCALE, tensor(text, "varlen_llm_embed_"))
        for path, text in zip(paths, texts, strict=True)
    ]


def gradients(
    files: TinyZImage, modules: dict[str, str], factors: Factors, batch: Sequence[Item], step: int
) -> Factors:
    """Of the loss of a batch, by the factors of a LoRA in diffusers' network."""
    dit = in_diffusers(load_file(files.dit)).requires_grad_(False)
    sigmas = shifted(normal_share(batch, step), 2.2)
    noisy, velocity = mixed(batch, step, sigmas)
    caption, mask = padded(batch)
    times = 1 - (1000 * sigmas + 1) / 1000  # as the known trainer
    given = {"noisy": noisy.squeeze(2), "times": times, "caption": caption, "caption_mask": mask}
    with learning(dit, {name: [path] for name, path in modules.items()}, factors) as found:
        (-predict_with(dit, given) - velocity.squeeze(2)).square().mean().backward()
        return found()


def cache(files: TinyZImage, folder: Path) -> list[str]:
    """Write pictures and their caches with our scripts. Returns the option of the dataset."""
    write_plain_pictures(folder, batch_size=4)
    long = "a blue circle moves left " * 5
    (folder / "clips" / "picture 1.txt").write_text(long, encoding="utf-8")
    dataset = ["--dataset_config", "dataset.toml"]
    reading = ["--text_encoder", files.text_encoder, "--text_encoder_dtype", "float32"]
    vae = ["--vae", files.vae, "--vae_dtype", "float32"]
    succeed_here("zimage_cache_latents.py", *dataset, *vae, folder=folder)
    succeed_here("zimage_cache_text_encoder_outputs.py", *dataset, *reading, folder=folder)
    return dataset


TIMES = ["--timestep_sampling", "shift", "--discrete_flow_shift", 2.2]


def test_two_steps_of_training_equal_those_computed_with_diffusers(files: TinyZImage, tmp_path: Path) -> None:
    """And the LoRA that comes out has the same effect in diffusers as here."""
    dataset = cache(files, tmp_path)
    words = [*dataset, "--dit", files.dit, "--sdpa", *TIMES]
    words += ["--network_module", "networks.lora_zimage", "--network_dim", RANK, *descent(RATE)]
    succeed_here("zimage_train_network.py", *words, folder=tmp_path)

    items = read_items(tmp_path / "cache")
    paths = [name.removesuffix(".weight") for name in load_file(files.dit) if name.endswith(".weight")]
    modules = {
        path.replace(".", "_"): path
        for path in paths
        if path.startswith("layers.") and "_modulation" not in path and "norm" not in path
    }
    assert len(items) == 4
    assert len({-(-len(item.text) // 32) for item in items}) > 1  # so that rows of padding are masked
    assert len(modules) == 14
    output = tmp_path / "out"
    assert_steps_of_descent(
        output,
        modules,
        RATE,
        lambda factors, step: gradients(files, modules, factors, shuffled(items, step), step),
        "z_image",
    )
    assert_same_effect(files, output / "lora.safetensors", tmp_path)


def assert_same_effect(files: TinyZImage, lora: Path, folder: Path) -> None:
    """Load a LoRA of ours with diffusers, and merge it with our tool into models of both layouts."""
    given = tiny_inputs()
    with torch.no_grad():
        without = predict_with(theirs(files).transformer, given)
    other, back = folder / "diffusers.safetensors", folder / "back.safetensors"
    convert_lora.main(["--input", str(lora), "--output", str(other), "--target", "diffusers"])
    comfy = folder / "comfy.safetensors"
    convert_z_image_lora_to_comfy.main([str(lora), str(comfy)])
    convert_z_image_lora_to_comfy.main(["--reverse", str(comfy), str(back)])
    for path in (lora, other, back):
        pipe = theirs(files)
        pipe.load_lora_weights(path)
        with torch.no_grad():
            loaded = predict_with(pipe.transformer, given)
        assert (loaded - without).abs().max() > 1e-2
        if path is lora:
            expected = loaded
        assert_equal(loaded, expected, path.name, 1e-4)

    merged = folder / "merged.safetensors"
    joined = write_dit(folder, comfy_state(load_file(files.dit)), name="joined")
    for path in (lora, comfy):
        found = []
        for dit in (files.dit, joined):
            tool = ["--dit", dit, "--lora_weight", path, "--save_merged_model", merged]
            succeed_here("merge_lora.py", *tool, folder=folder)
            found.append(load_file(merged))
        with torch.no_grad():
            assert_equal(predict_with(in_diffusers(found[0]), given), expected, "merged", 1e-4)
        for name, tensor in comfy_state(found[0]).items():
            torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_training_adapter_is_in_the_steps_alone(files: TinyZImage, tmp_path: Path) -> None:
    """As for Turbo: steps are those on a model merged with it, samples are those of the model without."""
    dataset = cache(files, tmp_path)
    adapter = write_adapter(tmp_path / "adapter.safetensors")
    merged = tmp_path / "merged.safetensors"
    tool = ["--dit", files.dit, "--lora_weight", adapter, "--save_merged_model", merged]
    succeed_here("merge_lora.py", *tool, folder=tmp_path)
    (tmp_path / "samples.txt").write_text("a cat --w 32 --h 32 --s 2 --d 1\n", encoding="utf-8")
    words = [*dataset, *files.models[2:], "--vae_dtype", "float32", "--text_encoder_dtype", "float32"]
    words += ["--sdpa", *TIMES, "--network_module", "networks.lora_zimage", "--network_dim", RANK]
    words += [*descent(0.5), "--sample_prompts", "samples.txt", "--sample_at_first"]
    with_it = ["--training_adapter", adapter]
    runs = {"adapter": [files.dit, *with_it], "merged": [merged], "plain": [files.dit]}
    for name, model in runs.items():
        output = ["--output_dir", name, "--output_name", "lora"]
        succeed_here("zimage_train_network.py", "--dit", *model, *words, *output, folder=tmp_path)

    loras = {name: load_file(tmp_path / name / "lora.safetensors") for name in runs}
    assert loras["adapter"].keys() == loras["merged"].keys()
    for name, tensor in loras["adapter"].items():
        torch.testing.assert_close(tensor, loras["merged"][name], rtol=1e-3, atol=1e-5, msg=name)
    assert any((one - loras["plain"][name]).abs().max() > 1e-3 for name, one in loras["adapter"].items())
    first = {name: sorted((tmp_path / name).rglob("*.png"))[0].read_bytes() for name in runs}
    pixels = {name: read_image(sorted((tmp_path / name).rglob("*.png"))[0]) for name in runs}
    assert (pixels["adapter"] == pixels["plain"]).all()
    assert (pixels["merged"] != pixels["plain"]).any()
    assert first


def test_the_whole_transformer_is_saved_for_diffusers(files: TinyZImage, tmp_path: Path) -> None:
    dataset = cache(files, tmp_path)
    output = ["--output_dir", str(tmp_path / "out"), "--output_name", "whole", "--save_precision", "float"]
    words = [*dataset, "--dit", files.dit, "--sdpa", *TIMES, *output, "--optimizer_type", "sgd"]
    words += ["--learning_rate", 1.0, "--max_train_steps", 1, "--lr_scheduler", "constant", "--seed", 1]
    succeed_here("zimage_train.py", *words, folder=tmp_path)

    before, after = load_file(files.dit), load_file(tmp_path / "out" / "whole.safetensors")
    in_diffusers(after)  # all names and shapes
    still = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert not still
    assert zimage_train.main is not None
