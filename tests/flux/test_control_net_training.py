"""Training of ControlNets for FLUX.1: against diffusers' class, in runs, and in generation."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux.control_net import make_control_net_settings
from flux.control_net_learning import TrainedFluxControl
from flux.family import Flux, family_for_training
from flux.options import FluxControlNetTrainingOptions
from protocols.data import CONTROL, Batch
from protocols.loading import Placement
from tests.faults.messages import run_here, succeed_here
from tests.flux.making import in_diffusers, run_there, tiny_control_net, tiny_inputs
from tests.tiny.flux import CLIP_DIM, T5_DIM, tiny_state, write_dit, write_tiny_flux
from training.loss import NoisyBatch
from training.targets.passes import training_loss

CPU = torch.device("cpu")
SCRIPT = "flux_train_control_net.py"


def make_family(folder: Path, kind: str = "dev", **values: Any) -> Flux:
    dit = write_dit(folder, tiny_state(kind, text_dim=T5_DIM, pooled_dim=CLIP_DIM))
    sizes = {"embedded_guidance": 3.5, "num_double_layers": 1, "num_single_layers": 2, **values}
    return family_for_training(FluxControlNetTrainingOptions.from_defaults(dit=dit, **sizes))


def make_batch() -> tuple[NoisyBatch, dict[str, Any]]:
    """A batch with its control pictures, and what the transformer is given for it."""
    inputs = {**tiny_inputs("dev"), "t5_mask": None}
    generator = torch.Generator().manual_seed(4)
    shape = inputs["noisy"].shape

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    inputs["t5"] = draw(2, 9, T5_DIM)
    inputs["pooled"] = draw(2, CLIP_DIM)
    inputs["guidance"] = torch.full((2,), 3.5)
    tensors = {
        "latents": draw(*shape),
        CONTROL: draw(*shape),
        "t5_out": inputs["t5"],
        "t5_attn_mask": torch.ones(2, 9, dtype=torch.int64),
        "l_pooled": inputs["pooled"],
    }
    sigmas = inputs["timesteps"] / 1000
    noisy_batch = NoisyBatch(
        batch=Batch(tensors, ("a", "b"), ("0", "1")),
        noise=draw(*shape),
        sigmas=sigmas,
        timesteps=inputs["timesteps"],
        weights=torch.ones(2),
    )
    share = sigmas.view(-1, 1, 1, 1, 1)
    inputs["noisy"] = (1 - share) * tensors["latents"] + share * noisy_batch.noise
    return noisy_batch, inputs


def make_network(family: Flux) -> tuple[nn.Module, TrainedFluxControl]:
    dit = family.load_dit(Placement(CPU)).requires_grad_(False)
    assert family.custom_network is not None
    network = family.custom_network.make(dit, True).requires_grad_(True)
    assert isinstance(network, TrainedFluxControl)
    return dit, network


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_diffusers(tmp_path: Path, checkpointing: bool) -> None:
    theirs = tiny_control_net().requires_grad_(True)
    nn.init.normal_(theirs.controlnet_x_embedder.weight, std=0.1)
    start = tmp_path / "start.safetensors"
    save_file(theirs.state_dict(), start)
    family = make_family(tmp_path, controlnet=start, gradient_checkpointing=checkpointing)
    noisy_batch, inputs = make_batch()
    dit, network = make_network(family)
    if checkpointing:
        from runtime.offload.checkpointing import checkpoint_blocks

        checkpoint_blocks(dit.train(), family.dit)

    loss = training_loss(family, dit, noisy_batch, contextlib.nullcontext)
    loss.backward()

    there = in_diffusers("dev", tiny_state("dev", text_dim=T5_DIM, pooled_dim=CLIP_DIM))
    controls = [noisy_batch.batch.tensor(CONTROL)]
    velocity = torch.cat([run_there(there, inputs, sample, controls, theirs, True) for sample in range(2)])
    target = noisy_batch.noise - noisy_batch.batch.tensor("latents")
    expected = (velocity - target).square().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found = {name.removeprefix("network."): weight for name, weight in network.named_parameters()}
    weights = dict(theirs.named_parameters())
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert weight.grad is not None, name
        gradient = found[name].grad
        assert gradient is not None, name
        scale = max(float(weight.grad.abs().max()), 1e-5)
        torch.testing.assert_close(gradient, weight.grad, rtol=2e-3, atol=2e-3 * scale)
    for parameters in (network.parameters(), theirs.parameters()):
        torch.optim.SGD(parameters, lr=10.0).step()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_a_new_one_copies_the_first_blocks_and_changes_nothing(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    noisy_batch, _ = make_batch()
    dit, network = make_network(family)

    after = training_loss(family, dit, noisy_batch, contextlib.nullcontext)
    after.backward()

    network.set_multiplier(0)
    with torch.no_grad():
        assert torch.equal(training_loss(family, dit, noisy_batch, contextlib.nullcontext), after)
    state = network.network.state_dict()
    there = in_diffusers("dev", tiny_state("dev", text_dim=T5_DIM, pooled_dim=CLIP_DIM)).state_dict()
    own = {name for name in state if name.startswith("controlnet_")}
    assert len(own) == 2 + 2 + 4
    for name, weight in state.items():
        assert torch.equal(weight, torch.zeros_like(weight) if name in own else there[name]), name
    gradient = network.network.controlnet_blocks[0].weight.grad
    assert gradient is not None
    assert gradient.any()
    assert not [name for name, _ in dit.named_parameters() if "controlnet" in name]


def test_files_are_those_that_diffusers_reads(tmp_path: Path) -> None:
    family = make_family(tmp_path)
    _, network = make_network(family)
    path = tmp_path / "saved.safetensors"
    made = family.custom_network
    assert made is not None
    assert made.write is not None

    made.write(network, path, torch.bfloat16, {"modelspec.title": "it"})

    stored = load_file(path)
    config = make_family(tmp_path).files.dit_header().config
    FluxControlNetModel(**make_control_net_settings(config, 1, 2)).load_state_dict(stored)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    again = make_network(make_family(tmp_path, controlnet=path))[1].state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(again[name], tensor.bfloat16().float()), name


# Commands

DATASET = """[general]
resolution = 64
caption_extension = ".txt"

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = "pictures"
conditioning_data_dir = "control"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for place in ("pictures", "control"):
        (tmp_path / place).mkdir()
        for index in range(2):
            pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / place / f"{index}.png")
    for index in range(2):
        (tmp_path / "pictures" / f"{index}.txt").write_text(f"a cat, number {index}", encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    write_tiny_flux(tmp_path / "model")
    return tmp_path


ENCODERS = ["--ae", "model/ae.safetensors", "--clip_l", "model/clip_l.safetensors"]
ENCODERS += ["--t5xxl", "model/t5xxl_fp16.safetensors"]


def words_of(*words: str) -> list[str]:
    learning = ["--max_train_steps", "2", "--seed", "1", "--learning_rate", "0.01", "--cache_latents"]
    learning += ["--cache_text_encoder_outputs", "--num_double_layers", "1", "--num_single_layers", "1"]
    learning += ["--model_prediction_type", "raw"]
    places = ["--dataset_config", "dataset.toml", "--output_dir", "output", "--output_name", "net"]
    return ["--pretrained_model_name_or_path", "model/dit.safetensors", *ENCODERS, *learning, *places, *words]


def picture(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int64))


def test_samples_are_the_pictures_of_a_generation_and_a_resumed_run_is_the_same(folder: Path) -> None:
    line = "a red cat --w 64 --h 64 --d 5 --s 2 --cn control/0.png --am 0.8"
    (folder / "samples.txt").write_text(f"{line}\n", encoding="utf-8")
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2"]
    saving = ["--save_every_n_steps", "1", "--save_state", "--gradient_checkpointing"]

    succeed_here(SCRIPT, *words_of(*samples, *saving), folder=folder)
    state = str(next((folder / "output").glob("*000001-state")))
    resumed = ["--resume", state, "--output_dir", "resumed", "--gradient_checkpointing"]
    succeed_here(SCRIPT, *words_of(*resumed, "--double_blocks_to_swap", "1"), folder=folder)

    saved = folder / "output" / "net.safetensors"
    again = load_file(folder / "resumed" / "net.safetensors")
    stored = load_file(saved)
    assert stored["controlnet_blocks.0.weight"].any()
    for name, tensor in stored.items():
        assert torch.equal(tensor, again[name]), name
    with safe_open(saved, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "flux-1-dev/controlnet"
    generate = [
        "--dit",
        "model/dit.safetensors",
        *ENCODERS,
        "--prompt",
        "a red cat",
        "--image_size",
        "64",
        "64",
    ]
    generate += ["--seed", "5", "--infer_steps", "2"]
    network = [
        "--controlnet_model_name_or_path",
        "output/net.safetensors",
        "--control_image",
        "control/0.png",
    ]
    for name, further in {"with": [*network, "--control_multiplier", "0.8"], "without": []}.items():
        succeed_here("flux_generate_image.py", *generate, *further, "--save_path", name, folder=folder)
    (sample,) = (folder / "output" / "sample").glob("net_000002_00_*.png")
    (made,) = (folder / "with").glob("*.png")
    (base,) = (folder / "without").glob("*.png")
    assert (picture(sample) - picture(made)).abs().max() <= 1
    assert (picture(sample) - picture(base)).abs().max() > 2


@pytest.mark.parametrize("strength", ["0.8", None])
def test_the_next_command_has_the_strength_of_the_sample(tmp_path: Path, strength: str | None) -> None:
    sample = {"extra": {} if strength is None else {"control_multiplier": strength}}
    network = make_family(tmp_path).custom_network
    assert network is not None
    assert network.generate is not None

    words = [*network.generate(Path("net.safetensors"), sample, ["flux_generate_image.py"])]

    found = words[words.index("--control_multiplier") + 1] if "--control_multiplier" in words else None
    assert found == strength


def test_mistakes_are_named_before_anything_is_loaded(folder: Path) -> None:
    def rejection(*further: str) -> str:
        code, told = run_here(SCRIPT, *words_of(*further), folder=folder)
        assert code != 0
        assert "Traceback" not in told
        return told

    theirs = tiny_control_net().state_dict()
    save_file(theirs, folder / "start.safetensors")
    start = ["--controlnet_model_name_or_path", "start.safetensors"]
    assert "--num_single_layers is 1, but start.safetensors has 2" in rejection(*start)
    assert "has 2 of them. Use fewer" in rejection("--num_double_layers", "3")
    assert "has no such setting" in rejection("--network_dim", "4")
    assert "Pass the ControlNet to start from" in rejection("--network_weights", "start.safetensors")
    assert "and fp8 rounds them" in rejection("--fp8_base")
    assert "it is --fp8_base" in rejection("--fp8_base_unet")
    assert "each process would" in rejection("--context_parallel", "2")
    assert "Set mask_directory" in rejection("--masked_loss")
    assert "the ControlNet adds to all tokens" in rejection("--tread", "0.5", "--tread_blocks", "1", "2")
    chroma = write_dit(folder, tiny_state("chroma", text_dim=T5_DIM), name="chroma")
    assert "is Chroma" in rejection("--pretrained_model_name_or_path", chroma.name)
    in_fp8 = tiny_state("dev", dtype=torch.float8_e4m3fn, text_dim=T5_DIM, pooled_dim=CLIP_DIM)
    save_file(in_fp8, folder / "fp8.safetensors")
    told = rejection("--pretrained_model_name_or_path", "fp8.safetensors")
    assert "fp8.safetensors is rounded to 8 bits or fewer" in told
    (folder / "control" / "1.png").unlink()
    assert "needed: 1.png" in rejection()
    text = DATASET.replace('conditioning_data_dir = "control"\n', "")
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    assert "Set conditioning_data_dir" in rejection()
