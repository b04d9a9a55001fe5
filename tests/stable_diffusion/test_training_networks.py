"""What learns in Stable Diffusion: other kinds of networks, rates of parts, as the scripts train them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from stable_diffusion.noise import make_noise_spec
from stable_diffusion.training_options import LossWeightOptions
from tests.commands import run_script
from tests.stable_diffusion.test_training_scripts import LINE, folder, picture, train  # noqa: F401
from tests.tiny.stable_diffusion import write_sd1, write_sdxl

# of a network: words of the command, and a convolution's and a text encoder's tensors with their shapes
KINDS: dict[str, tuple[list[str], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "LoHa": (
        ["--network_module", "networks.loha", "--network_args", "conv_dim=3", "conv_alpha=1.5"],
        {"hada_w1_a": (32, 3), "hada_w1_b": (3, 288), "hada_w2_a": (32, 3), "hada_w2_b": (3, 288)},
        {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64)},
    ),
    "LoKr": (
        ["--network_module", "networks.lokr", "--network_args", "conv_dim=1", "factor=4"],
        {"lokr_w1": (4, 4), "lokr_w2_a": (8, 1), "lokr_w2_b": (1, 72)},
        {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)},
    ),
    "DoRA": (
        ["--network_args", "conv_dim=3", "dora_wd=True"],
        {"lora_down.weight": (3, 32, 3, 3), "lora_up.weight": (32, 3, 1, 1), "dora_scale": (32, 1, 1, 1)},
        {"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "dora_scale": (64, 1)},
    ),
}


def shapes_of(tensors: dict[str, Tensor], module: str) -> dict[str, tuple[int, ...]]:
    start = f"{module}."
    parts = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return {part: tuple(tensor.shape) for part, tensor in parts.items() if part != "alpha"}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_other_kinds_are_read_and_merged(
    folder: Path,  # noqa: F811
    kind: str,
    version: str,
) -> None:
    words, of_convolution, of_text = KINDS[kind]
    is_xl = version == "sdxl"
    model = write_sdxl(folder) if is_xl else write_sd1(folder)
    script = "sdxl_train_network.py" if is_xl else "train_network.py"
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", "2", "--sample_sampler", "euler"]
    learning = ["--output_name", "x", "--network_dim", "2", "--cache_latents", *words, *samples]
    train(folder, script, model, *learning)

    path = folder / "output" / "x.safetensors"
    tensors = load_file(path)
    block = "input_blocks_1_0_in_layers_2" if is_xl else "down_blocks_0_resnets_0_conv1"
    assert shapes_of(tensors, f"lora_unet_{block}") == of_convolution
    encoder = "lora_te2" if is_xl else "lora_te"
    assert shapes_of(tensors, f"{encoder}_text_model_encoder_layers_0_self_attn_q_proj") == of_text
    (sample,) = (folder / "output" / "sample").glob("x_000002_00_*.png")

    files = ["--ckpt", model, "--tokenizer_cache_dir", "tokenizers", "--sampler", "euler", "--prompt", LINE]
    networks = ["--network_module", "networks.lora", "--network_weights"]
    images: dict[str, Any] = {"base": []}
    images["added"] = [*networks, path]
    images["folded in"] = [*networks, path, "--network_merge"]
    merged = folder / "merged.safetensors"
    merge = ["--sd_model", model, "--save_to", merged, "--models", path, "--ratios", "1"]
    run_script("networks/sdxl_merge_lora.py", *merge, folder=folder)
    made: dict[str, Tensor] = {}
    for name, further in images.items():
        run_script("gen_img.py", *files, *further, "--outdir", name, folder=folder)
        made[name] = picture(next((folder / name).glob("*.png")))
    run_script("gen_img.py", "--ckpt", merged, *files[2:], "--outdir", "merged", folder=folder)
    made["merged"] = picture(next((folder / "merged").glob("*.png")))

    for name in ("added", "folded in", "merged"):
        # sums in another order
        assert (picture(sample) - made[name]).abs().max() <= 3, name
    assert (picture(sample) - made["base"]).abs().max() > 6


@pytest.mark.slow
def test_rates_of_parts_and_bounds_act_as_written(folder: Path) -> None:  # noqa: F811
    """The first step of SGD is the gradient times the rate: ratios of rates are those of the up factors."""
    model = write_sd1(folder)
    zero = ["down_lr_weight=1,0,1,1,1,1"]  # the first is the first convolution
    rates = ["loraplus_unet_lr_ratio=4", "loraplus_text_encoder_lr_ratio=2", "mid_lr_weight=0.5"]
    default = [
        *("--optimizer_type", "SGD", "--max_grad_norm", "0", "--min_timestep", "500"),
        *("--max_timestep", "500", "--network_dim", "2", "--cache_latents", "--max_train_steps", "1"),
    ]
    results: dict[str, dict[str, Tensor]] = {}
    for name, arguments in {"plain": zero, "rates": [*zero, *rates]}.items():
        words = [
            *default,
            "--output_name",
            name,
            "--logging_dir",
            f"{name} logs",
            "--network_args",
            *arguments,
        ]
        train(folder, "train_network.py", model, *words)
        results[name] = load_file(folder / "output" / f"{name}.safetensors")

    plain, changed = results["plain"], results["rates"]
    assert plain.keys() == changed.keys()
    assert not any("down_blocks_0_attentions_0_" in name for name in plain)  # its block has the rate 0
    assert any("down_blocks_0_attentions_1_" in name for name in plain)
    for name, tensor in plain.items():
        if ".lora_up." not in name:
            assert torch.equal(changed[name], tensor), name  # up factors of 0 give down factors no gradient
            continue
        factor = 2.0 if name.startswith("lora_te") else 4.0
        if "_mid_block_" in name:
            factor *= 0.5
        assert tensor.any(), name
        assert torch.equal(changed[name], factor * tensor), name  # powers of two are exact
    log = next((folder / "rates logs").rglob("*tfevents*")).parent
    events = EventAccumulator(str(log)).Reload().Scalars("loss/current")
    assert [event.step for event in events] == [1]


def test_weights_stay_finite_where_the_last_timestep_is_noise_alone() -> None:
    """A file's mark of a zero terminal SNR with one of noise: the SNR is that of the betas as they were."""
    for predicts_v in (False, True):
        spec = make_noise_spec(predicts_v, True, weights=LossWeightOptions.from_defaults(min_snr_gamma=5.0))
        factors = torch.tensor(spec.loss_factors)
        assert spec.table[-1] == 1.0
        assert torch.isfinite(factors).all()
        assert (factors > 0).all()


@pytest.mark.slow
def test_min_snr_gamma_with_a_zero_terminal_snr_needs_v(folder: Path) -> None:  # noqa: F811
    model = write_sdxl(folder)
    files = ["--pretrained_model_name_or_path", model, "--dataset_config", "dataset.toml"]
    words = ["--output_dir", "output", "--output_name", "x", "--min_snr_gamma", "5", "--zero_terminal_snr"]

    process = run_script("sdxl_train_network.py", *files, *words, folder=folder, check=False)

    assert process.returncode == 2
    assert "--zero_terminal_snr needs a model that predicts v" in process.stderr
