"""Training of ControlNets for Stable Diffusion."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from protocols.data import CONTROL_PIXELS
from protocols.loading import Placement
from stable_diffusion.control_net_files import load_control_net
from stable_diffusion.control_net_learning import TrainedControlNet, make_control_net
from stable_diffusion.family import StableDiffusion, with_control_net
from stable_diffusion.options import read_gen_img
from stable_diffusion.sd1.options import Sd1ControlNetTrainingOptions
from stable_diffusion.training_options import list_generation_command
from tests.faults.messages import run_here, succeed_here
from tests.stable_diffusion import test_lllite_training
from tests.stable_diffusion.test_lllite_training import LINE, picture, with_controls, words_of
from tests.stable_diffusion.test_training_step import CPU, KINDS, make_batch, make_family, plain_loss
from tests.tiny.control_nets import control_net, ldm_control_net, write_control_net, write_lllite
from tests.tiny.stable_diffusion import write_sd1, write_sdxl
from training.targets.passes import training_loss

folder = test_lllite_training.folder


def family_of(kind: str, tmp_path: Path, path: Path | None) -> StableDiffusion:
    family = make_family(kind, tmp_path)
    new_layers_lr = 0.5 if kind == "sdxl" else None
    return with_control_net(family, path, new_layers_lr=new_layers_lr, gradient_checkpointing=False)


class Controlled(nn.Module):
    """A U-Net with what a ControlNet of diffusers adds."""

    def __init__(self, unet: Any, network: ControlNetModel, controls: Tensor) -> None:
        super().__init__()
        self.unet, self.network, self.controls = unet, network, controls

    def forward(self, noisy: Tensor, timesteps: Tensor, **inputs: Any) -> Any:
        down, middle = self.network(
            noisy, timesteps, controlnet_cond=self.controls, return_dict=False, **inputs
        )
        return self.unet(
            noisy,
            timesteps,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            **inputs,
        )


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_loss_and_gradients_are_those_of_diffusers(kind: str, tmp_path: Path) -> None:
    path = write_control_net(tmp_path / "start.safetensors", kind)
    family = family_of(kind, tmp_path, path)
    noisy_batch = with_controls(make_batch(family, (20, 999)))
    unet = family.load_dit(Placement(CPU)).requires_grad_(False)
    assert family.custom_network is not None
    network = family.custom_network.make(unet, True).requires_grad_(True)

    loss = training_loss(family, unet, noisy_batch, contextlib.nullcontext)
    loss.backward()

    plain = UNet2DConditionModel.from_pretrained(tmp_path / kind / "unet").requires_grad_(False)
    theirs = control_net(kind).requires_grad_(True)
    controls = noisy_batch.batch.tensor(CONTROL_PIXELS).float() / 255
    expected = plain_loss(Controlled(plain, theirs, controls), family, noisy_batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    found = {name.removeprefix("network."): weight.grad for name, weight in network.named_parameters()}
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for name, weight in theirs.named_parameters():
        gradient = found[name]
        assert weight.grad is not None
        assert gradient is not None, name
        scale = max(float(weight.grad.abs().max()), 1e-5)
        torch.testing.assert_close(gradient, weight.grad, rtol=2e-3, atol=2e-3 * scale)


def test_a_new_one_copies_the_u_net_and_changes_nothing(tmp_path: Path) -> None:
    family = family_of("sdxl", tmp_path, None)
    noisy_batch = with_controls(make_batch(family, (20, 999)))
    unet = family.load_dit(Placement(CPU)).requires_grad_(False)
    with torch.no_grad():
        before = training_loss(
            replace(family, custom_network=None), unet, noisy_batch, contextlib.nullcontext
        )
    assert family.custom_network is not None

    network = family.custom_network.make(unet, True)

    assert isinstance(network, TrainedControlNet)
    with torch.no_grad():
        assert torch.equal(training_loss(family, unet, noisy_batch, contextlib.nullcontext), before)
    state = network.network.state_dict()
    for name, weight in unet.state_dict().items():
        if name in state:
            assert torch.equal(state[name], weight), name
    groups, names = network.prepare_optimizer_params(0.25)
    assert names == ["control_net copy", "control_net own"]
    assert [group["lr"] for group in groups] == [0.25, 0.5]
    own = {name for name, _ in network.network.named_parameters() if name.startswith("controlnet_")}
    assert len(groups[1]["params"]) == len(own)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_files_have_the_names_that_other_programs_read(kind: str, tmp_path: Path) -> None:
    family = family_of(kind, tmp_path, None)
    unet = family.load_dit(Placement(CPU))
    assert family.custom_network is not None
    network = make_control_net(
        write_control_net(tmp_path / "start.safetensors", kind), None, False, KINDS[kind], unet, True
    )
    path = tmp_path / "saved.safetensors"

    write = family.custom_network.write
    assert write is not None
    write(network, path, torch.float16, {"modelspec.title": "it"})

    stored = load_file(path)
    state = network.network.state_dict()
    if kind == "sdxl":
        assert stored.keys() == state.keys()
    else:
        assert stored.keys() == ldm_control_net(state).keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    words = KINDS[kind].title
    again: Any = load_control_net(path, unet.config, words, device=CPU, dtype=torch.float32)  # type: ignore[arg-type]
    for name, tensor in state.items():
        assert torch.equal(again.state_dict()[name], tensor.half().float()), name
    if kind == "sdxl":
        plain = ControlNetModel.from_config(network.network.config)
        plain.load_state_dict(stored)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_samples_are_the_pictures_of_gen_img_and_a_resumed_run_is_the_same(kind: str, folder: Path) -> None:
    model = write_sdxl(folder) if kind == "sdxl" else write_sd1(folder)
    script = "sdxl_train_control_net.py" if kind == "sdxl" else "train_controlnet.py"
    (folder / "samples.txt").write_text(f"{LINE} --cn control/0.png --am 0.8\n", encoding="utf-8")
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2"]
    saving = ["--save_every_n_steps", "1", "--save_state", "--gradient_checkpointing"]

    succeed_here(script, *words_of(model, *samples, *saving), folder=folder)
    state = str(next((folder / "output").glob("*000001-state")))
    resumed = ["--resume", state, "--output_dir", "resumed", "--gradient_checkpointing"]
    succeed_here(script, *words_of(model, *resumed), folder=folder)

    saved = folder / "output" / "net.safetensors"
    again = load_file(folder / "resumed" / "net.safetensors")
    for name, tensor in load_file(saved).items():
        assert torch.equal(tensor, again[name]), name
    with safe_open(saved, "pt") as file:
        assert file.metadata()["modelspec.architecture"].endswith("/controlnet")
    files = ["--ckpt", model.name, "--tokenizer_cache_dir", "tokenizers", "--sampler", "ddim"]
    files += ["--prompt", LINE, "--control_net_models", "output/net.safetensors"]
    control = ["--guide_image_path", "control/0.png", "--control_net_multipliers", "0.8"]
    succeed_here("gen_img.py", *files, *control, "--outdir", "with", folder=folder)
    (sample,) = (folder / "output" / "sample").glob("net_000002_00_*.png")
    (generated,) = (folder / "with").glob("*.png")
    assert (picture(sample) - picture(generated)).abs().max() <= 1


@pytest.mark.parametrize("strength", ["0.8", None])
def test_the_next_command_has_the_settings_of_the_model_and_the_sample(
    tmp_path: Path, strength: str | None
) -> None:
    paths = [tmp_path / name for name in ("model.safetensors", "net.safetensors", "control.png")]
    for path in paths:
        path.touch()
    model, net, control = paths
    given = {"v_parameterization": True, "zero_terminal_snr": True, "clip_skip": 2, "max_token_length": 150}
    options = Sd1ControlNetTrainingOptions.from_defaults(ckpt=model, **given)
    extra = {} if strength is None else {"control_multiplier": strength}
    sample = {"prompt": "a cat", "control_path": control, "solver": "euler_a", "extra": extra}

    command = list_generation_command(options, "--control_net_models", net, sample, [])

    read = read_gen_img(None, command[1:])
    assert read.model.v_parameterization
    assert read.sampling.zero_terminal_snr
    assert (read.text.clip_skip, read.text.max_embeddings_multiples) == (2, 2)
    assert read.sampling.sampler == "euler_a"
    assert read.control.control_net_multipliers == (None if strength is None else (0.8,))


def test_mistakes_are_named_before_anything_is_loaded(folder: Path) -> None:
    model = write_sdxl(folder)
    words = words_of(model)
    of_sd1 = write_control_net(folder / "sd1_control.safetensors", "sd1")
    lllite = write_lllite(folder / "lllite.safetensors")

    def rejection(*further: str) -> str:
        code, told = run_here("sdxl_train_control_net.py", *words, *further, folder=folder)
        assert code != 0
        assert "Traceback" not in told
        return told

    told = rejection("--controlnet_model_name_or_path", of_sd1.name)
    assert "is a ControlNet for Stable Diffusion 1.x" in told
    assert "--controlnet_model_name_or_path" in told
    assert "looks like a ControlNet-LLLite" in rejection("--controlnet_model_name_or_path", lllite.name)
    assert "has no such setting" in rejection("--network_dim", "4")
    assert "fp8 rounds them" in rejection("--fp8_base")
