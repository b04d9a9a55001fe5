"""Training of a ControlNet-LLLite for Stable Diffusion XL."""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.filling import on_meta_device
from dataset.caching.latents import _add_mirrored, _mirror
from encoders.control_pictures import add_controls
from modules.errors import CheckpointError
from protocols.data import CONTROL_PIXELS, CacheEntry, MediaBatch
from protocols.loading import Placement
from stable_diffusion.family import StableDiffusion
from stable_diffusion.lllite_learning import describe_lllite, make_lllite
from stable_diffusion.lllite_modules import Lllite, plan_lllite
from stable_diffusion.sdxl.options import SdxlLlliteTrainingOptions
from tests.faults.messages import run_here, succeed_here
from tests.stable_diffusion.test_lllite import change, tell
from tests.stable_diffusion.test_training_step import CPU, make_batch, make_family, plain_loss
from tests.tiny.control_nets import LLLITE_LAYERS, write_control_net, write_lllite
from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sdxl
from training.loss import NoisyBatch
from training.targets.passes import training_loss

TRAINED = {name: width for name, width in LLLITE_LAYERS.items() if "output_blocks" not in name}
PLACES = {
    "input_blocks_4_1": "down_blocks.1.attentions.0",
    "input_blocks_5_1": "down_blocks.1.attentions.1",
    "middle_block_1": "mid_block.attentions.0",
}
SCRIPT = "sdxl_train_control_net_lllite.py"


def options_of(**values: Any) -> SdxlLlliteTrainingOptions:
    options: SdxlLlliteTrainingOptions = SdxlLlliteTrainingOptions.from_defaults(**values)
    return options


def lllite_family(folder: Path, **values: Any) -> StableDiffusion:
    made = describe_lllite(options_of(**values))
    return make_family("sdxl", folder, custom_network=made)


def with_controls(noisy_batch: NoisyBatch) -> NoisyBatch:
    controls = torch.randint(
        256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(8)
    )
    tensors = {**noisy_batch.batch.tensors, CONTROL_PIXELS: controls}
    return replace(noisy_batch, batch=replace(noisy_batch.batch, tensors=tensors))


def hang_plainly(unet: nn.Module, state: Mapping[str, Tensor], controls: Tensor) -> None:
    """Change a U-Net by the formula. controls: B 3 H W in -1..1."""
    for name in {name.partition(".")[0] for name in state}:
        weights = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if f"{name}." in key}
        block, _, rest = name.removeprefix("lllite_unet_").partition("_transformer_blocks_")
        number, attention, kind = rest.split("_", 2)
        layer: Any = unet.get_submodule(f"{PLACES[block]}.transformer_blocks.{number}.{attention}.{kind}")
        added = partial(change, weights, tell(weights, controls).flatten(2).transpose(1, 2))
        layer.forward = lambda x, forward=layer.forward, added=added: forward(x + added(x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_all_weights_are_those_of_the_formula(
    checkpointing: bool, tmp_path: Path
) -> None:
    path = write_lllite(tmp_path / "start.safetensors", layers=TRAINED)
    family = lllite_family(tmp_path, network_weights=path)
    noisy_batch = with_controls(make_batch(family, (20, 999)))
    unet: Any = family.load_dit(Placement(CPU)).requires_grad_(False)
    assert family.custom_network is not None
    network = family.custom_network.make(unet, True).requires_grad_(True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()

    loss = training_loss(family, unet, noisy_batch, contextlib.nullcontext)
    loss.backward()

    plain = UNet2DConditionModel.from_pretrained(tmp_path / "sdxl" / "unet").requires_grad_(False)
    state = {name: tensor.requires_grad_(True) for name, tensor in load_file(path).items()}
    hang_plainly(plain, state, noisy_batch.batch.tensor(CONTROL_PIXELS).float() / 127.5 - 1)
    expected = plain_loss(plain, family, noisy_batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found = dict(network.named_parameters())
    assert found.keys() == state.keys()
    largest = max(float(tensor.grad.abs().max()) for tensor in state.values() if tensor.grad is not None)
    for name, tensor in state.items():
        assert tensor.grad is not None, name
        # a bias before the keys changes nothing but by rounding
        scale = max(float(tensor.grad.abs().max()), 1e-4 * largest)
        torch.testing.assert_close(found[name].grad, tensor.grad, rtol=2e-3, atol=2e-3 * scale)


def test_a_new_one_is_the_base_and_learns_up_first(tmp_path: Path) -> None:
    family = lllite_family(tmp_path, network_dim=8, cond_emb_dim=6)
    noisy_batch = with_controls(make_batch(family, (20, 999)))
    unet = family.load_dit(Placement(CPU)).requires_grad_(False)
    with torch.no_grad():
        before = training_loss(
            replace(family, custom_network=None), unet, noisy_batch, contextlib.nullcontext
        )
    network = make_lllite(options_of(network_dim=8, cond_emb_dim=6), unet, True)

    loss = training_loss(family, unet, noisy_batch, contextlib.nullcontext)
    loss.backward()

    assert torch.equal(loss.detach(), before)
    with_gradient = {
        name for name, weight in network.named_parameters() if weight.grad is not None and weight.grad.any()
    }
    assert {name.split(".", 1)[1] for name in with_gradient} == {"up.0.weight", "up.0.bias"}
    assert {name.partition(".")[0] for name in with_gradient} == set(TRAINED)
    network.set_multiplier(0)
    for weight in network.parameters():
        nn.init.ones_(weight)
    with torch.no_grad():
        assert torch.equal(training_loss(family, unet, noisy_batch, contextlib.nullcontext), before)


def test_the_released_u_net_has_136_modules() -> None:
    levels = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    with on_meta_device():
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=levels,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
        )
        parts = plan_lllite(unet, width=32, rank=64)
        network = Lllite(parts)

    assert len(parts) == 136
    assert sum(weight.numel() for weight in network.parameters()) == 22_969_600
    assert [part.reduction for part in parts.values()].count(16) == 16
    shape = network.state_dict()[
        "lllite_unet_middle_block_1_transformer_blocks_9_attn1_to_k.conditioning1.4.weight"
    ]
    assert shape.shape == (32, 16, 2, 2)


def test_the_control_picture_is_mirrored_with_its_picture() -> None:
    frames = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 1, 4, 6, 3)
    media = MediaBatch(frames, ("a", "b"), ((0, 1), (0, 1)), control=(frames,))
    entries = [[CacheEntry({"latents": torch.zeros(4, 1, 1, 1)})] for _ in range(2)]

    (first,), _ = add_controls(entries, media)
    (mirrored,), _ = add_controls(entries, _mirror(media))
    tensors = _add_mirrored(first, mirrored).tensors

    assert torch.equal(tensors[CONTROL_PIXELS], frames[0, 0].permute(2, 0, 1))
    assert torch.equal(tensors[f"{CONTROL_PIXELS}_flipped"], frames[0, 0].flip(1).permute(2, 0, 1))


# Commands

DATASET = """[general]
resolution = 64
caption_extension = ".txt"

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = "pictures"
conditioning_data_dir = "control"
flip_aug = true
"""
LINE = "a red cat --n ugly --w 64 --h 64 --d 5 --s 2 --l 4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for place in ("pictures", "control"):
        (tmp_path / place).mkdir()
        for index in range(3):
            pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / place / f"{index}.png")
    for index in range(3):
        (tmp_path / "pictures" / f"{index}.txt").write_text(f"a cat, number {index}", encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    tokenizer_folder(tmp_path / "tokenizers")
    return tmp_path


def words_of(model: Path, *words: str) -> list[str]:
    files = ["--pretrained_model_name_or_path", model.name, "--tokenizer_cache_dir", "tokenizers"]
    learning = ["--max_train_steps", "2", "--seed", "1", "--learning_rate", "0.05", "--cache_latents"]
    places = ["--dataset_config", "dataset.toml", "--output_dir", "output", "--output_name", "net"]
    return [*files, *learning, *places, *words]


def picture(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int64))


@pytest.mark.slow
def test_samples_are_the_pictures_of_gen_img_and_a_resumed_run_is_the_same(folder: Path) -> None:
    model = write_sdxl(folder)
    lines = f"{LINE} --cn control/0.png --am 0.8\n{LINE}\n"
    (folder / "samples.txt").write_text(lines, encoding="utf-8")
    sizes = ["--network_dim", "8", "--cond_emb_dim", "6", "--network_dropout", "0.1"]
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2"]
    saving = ["--save_every_n_steps", "1", "--save_state"]

    told = succeed_here(SCRIPT, *words_of(model, *sizes, *samples, *saving), folder=folder)
    state = str(next((folder / "output").glob("*000001-state")))
    resumed = [*sizes, "--resume", state, "--output_dir", "resumed"]
    succeed_here(SCRIPT, *words_of(model, *resumed), folder=folder)

    assert "generated without control" in told
    saved = folder / "output" / "net.safetensors"
    assert load_file(saved).keys() == load_file(folder / "resumed" / "net.safetensors").keys()
    for name, tensor in load_file(saved).items():
        assert torch.equal(tensor, load_file(folder / "resumed" / "net.safetensors")[name]), name
    with safe_open(saved, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert {name.partition(".")[0] for name in names} == set(TRAINED)
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/control-net-lllite"
    assert metadata["ss_network_dim"] == "8"
    assert metadata["ss_cond_emb_dim"] == "6"
    assert "ss_network_alpha" not in metadata
    files = [
        "--ckpt",
        model.name,
        "--tokenizer_cache_dir",
        "tokenizers",
        "--prompt",
        LINE,
        "--sampler",
        "ddim",
    ]
    control = ["--guide_image_path", "control/0.png", "--control_net_multipliers", "0.8"]
    network = ["--control_net_lllite_models", "output/net.safetensors"]
    succeed_here("gen_img.py", *files, *network, *control, "--outdir", "with", folder=folder)
    succeed_here("gen_img.py", *files, "--outdir", "without", folder=folder)
    (sample,) = (folder / "output" / "sample").glob("net_000002_00_*.png")
    (plain,) = (folder / "output" / "sample").glob("net_000002_01_*.png")
    (generated,) = (folder / "with").glob("*.png")
    (base,) = (folder / "without").glob("*.png")
    assert torch.equal(picture(plain), picture(base))
    assert (picture(sample) - picture(generated)).abs().max() <= 1
    assert (picture(sample) - picture(base)).abs().max() > 2


@pytest.mark.slow
def test_a_plan_counts_the_modules(folder: Path) -> None:
    words = words_of(write_sdxl(folder), "--network_dim", "8", "--cond_emb_dim", "6", "--plan")
    files = ["--dataset_config", "dataset.toml", "--ckpt", "sdxl.safetensors"]
    succeed_here("sdxl_cache_latents.py", *files, folder=folder)
    tokenizers = ["--tokenizer_cache_dir", "tokenizers"]
    succeed_here("sdxl_cache_text_encoder_outputs.py", *files, *tokenizers, folder=folder)
    words.remove("--cache_latents")
    printed = io.StringIO()

    assert run_here(SCRIPT, *words, folder=folder, printed=printed)[0] == 0
    assert "network (ControlNet-LLLite)" in printed.getvalue()
    assert "LoRA" not in printed.getvalue()


def rejection(folder: Path, *words: str) -> str:
    code, told = run_here(SCRIPT, *words, folder=folder)
    assert code != 0
    assert "Traceback" not in told
    return told


def test_mistakes_are_named_before_anything_is_loaded(folder: Path) -> None:
    model, sd1 = write_sdxl(folder), write_sd1(folder)
    words = words_of(model)
    wide = write_lllite(folder / "wide.safetensors", layers=TRAINED)
    control_net = write_control_net(folder / "control_net.safetensors", "sdxl")
    anima = write_lllite(folder / "anima.safetensors", layers={"lllite_dit_blocks_0_self_attn_q_proj": 8})

    assert "is odd" in rejection(folder, *words, "--cond_emb_dim", "7")
    assert "no program reads a mask" in rejection(folder, *words, "--lllite_cond_in_channels", "4")
    assert "wide.safetensors, whose training continues, has 8" in rejection(
        folder, *words, "--network_weights", wide.name, "--network_dim", "4"
    )
    assert "is not a ControlNet-LLLite" in rejection(folder, *words, "--network_weights", control_net.name)
    assert "of another model" in rejection(folder, *words, "--network_weights", anima.name)
    assert "It has no alpha" in rejection(folder, *words, "--network_alpha", "4")
    assert "Set mask_directory" in rejection(folder, *words, "--masked_loss")
    assert "is Stable Diffusion 1.x" in rejection(folder, *words_of(sd1))
    (folder / "control" / "3.png").write_bytes((folder / "control" / "0.png").read_bytes())
    assert "1 control image without an image of the same name: 3.png" in rejection(folder, *words)
    (folder / "control" / "3.png").unlink()
    (folder / "control" / "1.png").unlink()
    assert "control images for 1; needed: 1.png" in rejection(folder, *words)
    text = DATASET.replace('conditioning_data_dir = "control"\n', "")
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    assert "Set conditioning_data_dir" in rejection(folder, *words)


def test_control_pictures_of_another_shape_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from dataset.config import load_dataset_config
    from dataset.control_pairs import check_pairs

    Image.new("RGB", (128, 64)).save(folder / "control" / "1.png")
    with contextlib.chdir(folder):
        check_pairs(load_dataset_config(Path("dataset.toml")), "it")

    assert "1 control image with a different aspect ratio than the image" in caplog.text
    assert "1.png (128x64 and 64x64)" in caplog.text


def test_the_metadata_of_a_file_that_is_trained_on_have_its_sizes(tmp_path: Path) -> None:
    default = describe_lllite(options_of())
    assert default.values == {"ss_network_dim": 64, "ss_cond_emb_dim": 32}
    path = write_lllite(tmp_path / "net.safetensors")
    tensors = load_file(path)
    (rank,) = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("down.0.weight")}
    convolutions = [name for name in tensors if "conditioning1" in name and name.endswith("weight")]
    width = tensors[max(convolutions)].shape[0]
    assert (rank, width) != (64, 32)
    assert describe_lllite(options_of(network_weights=path)).values == {
        "ss_network_dim": rank,
        "ss_cond_emb_dim": width,
    }
    missing = describe_lllite(options_of(network_weights=tmp_path / "none.safetensors"))
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        missing.check()
