"""ControlNet-LLLite for Anima: against the formulas, in training, and in generation."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anima.configs import DIT, AnimaConfig
from anima.lllite import AttachedLllite, check_file, check_mask, describe_lllite, draw_masks
from anima.lllite_modules import AnimaLllite, LlliteConfig
from anima.model import AnimaModel
from anima.options import AnimaLlliteTrainingOptions, generation_options
from checkpoints.filling import on_meta_device
from encoders.control_pictures import CONTROL_MASK, draw_control_mask
from modules.errors import CheckpointError, OptionError
from protocols.data import CONTROL_PIXELS
from tests.anima.making import tiny_inputs, tiny_model
from tests.faults.messages import succeed_here
from tests.tiny.anima import CONFIG
from tests.tiny.control_nets import write_lllite
from tests.tiny.families import OUTPUT, family_called

FAMILY = family_called("anima")
SCRIPT = "anima_train_control_net_lllite.py"
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "cross_attn.q_proj", "mlp.layer1")
ALL = "self_attn_qkv_cross_q,mlp_fc1_pre"


def options_of(**values: Any) -> AnimaLlliteTrainingOptions:
    sizes = {"cond_emb_dim": 6, "lllite_cond_dim": 24, "lllite_mlp_dim": 10, **values}
    options: AnimaLlliteTrainingOptions = AnimaLlliteTrainingOptions.from_defaults(**sizes)
    return options


def hang(options: AnimaLlliteTrainingOptions, dit: AnimaModel, seed: int | None = None) -> AttachedLllite:
    """Make one in a transformer. seed: of random weights; None: those of a new one."""
    network = describe_lllite(options).make(dit, True)
    assert isinstance(network, AttachedLllite)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for weight in network.parameters():
            nn.init.normal_(weight, std=0.3, generator=generator)
    return network


def condition_plainly(state: Mapping[str, Tensor], controls: Tensor, aspp: bool) -> Tensor:
    """The trunk by its formula. controls: B 3 H W in -1..1."""

    def conv(name: str, x: Tensor, **settings: Any) -> Tensor:
        return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **settings)

    def normed(name: str, x: Tensor, groups: int) -> Tensor:
        return functional.silu(
            functional.group_norm(x, groups, state[f"{name}.weight"], state[f"{name}.bias"])
        )

    h = normed("norm1", conv("conv1", controls, stride=4), 4)  # 12 channels
    h = normed("norm2", conv("conv2", h, padding=1), 4)
    h = normed("norm3", conv("conv3", h, stride=4), 8)
    block = "resblocks.0"
    inner = conv(f"{block}.conv1", normed(f"{block}.norm1", h, 8), padding=1)
    h = h + conv(f"{block}.conv2", normed(f"{block}.norm2", inner, 8), padding=1)
    if aspp:
        views = [normed("aspp.branches.0.1", conv("aspp.branches.0.0", h), 8)]
        for place, wide in ((1, 2), (2, 4), (3, 8)):
            view = conv(f"aspp.branches.{place}.0", h, padding=wide, dilation=wide)
            views.append(normed(f"aspp.branches.{place}.1", view, 8))
        mean = normed("aspp.global_conv.1", conv("aspp.global_conv.0", h.mean((2, 3), keepdim=True)), 8)
        views.append(mean.expand_as(h))
        h = normed("aspp.proj.1", conv("aspp.proj.0", torch.cat(views, 1)), 8)
    tokens = conv("proj", h).flatten(2).transpose(1, 2)
    return functional.layer_norm(tokens, tokens.shape[-1:], state["out_norm.weight"], state["out_norm.bias"])


def change_plainly(state: Mapping[str, Tensor], condition: Tensor, x: Tensor) -> Tensor:
    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    own = condition + state["depth_embed"]
    gamma, beta = linear("cond_to_film", own).chunk(2, -1)
    h = linear("mid", torch.cat([own, functional.silu(linear("down", x))], -1))
    return linear("up", functional.silu(h * (1 + gamma) + beta))


def part_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def join_plainly(controls: Tensor, mask: Tensor | None, hides: bool) -> Tensor:
    """What the trunk sees: -1..1, then the mask as -1 (kept) and 1 (painted anew)."""
    seen = controls * 2 - 1
    if mask is None:
        return seen
    seen = torch.where(mask == 1, torch.zeros(()), seen) if hides else seen
    return torch.cat([seen, torch.where(mask == 1, 1.0, -1.0)], dim=1)


@pytest.mark.parametrize(
    ("aspp", "checkpointing", "masked"),
    [(False, False, None), (True, True, None), (False, False, "seen"), (False, False, "hidden")],
)
def test_output_and_gradients_of_all_weights_are_those_of_the_formulas(
    aspp: bool, checkpointing: bool, masked: str | None
) -> None:
    channels = 3 if masked is None else 4
    options = options_of(
        lllite_target_layers=ALL,
        lllite_use_aspp=aspp,
        lllite_multiplier=0.7,
        lllite_cond_in_channels=channels,
        lllite_inpaint_masked_input=masked == "hidden",
    )
    mask = None if masked is None else (torch.arange(2 * 48 * 64).view(2, 1, 48, 64) % 5 < 2).float()
    inputs = tiny_inputs(rows=3, columns=4)
    controls = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(3))
    dit = tiny_model()
    network = hang(options, dit, seed=9)
    if checkpointing:
        from runtime.offload.checkpointing import checkpoint_blocks

        checkpoint_blocks(dit.train(), DIT)
    network.embed_control(controls, 0.5, mask)
    found = dit(**inputs)
    found.square().mean().backward()

    plain = tiny_model()
    state = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    state = {name: weight.requires_grad_(True) for name, weight in state.items()}
    seen = join_plainly(controls, mask, masked == "hidden")
    condition = condition_plainly(part_of(state, "lllite_conditioning1"), seen, aspp)
    for block in range(CONFIG.num_layers):
        for leaf in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "cross_attn.q_proj",
            "mlp.layer1",
        ):
            layer: Any = plain.get_submodule(f"blocks.{block}.{leaf}")
            weights = part_of(state, f"lllite_dit_blocks_{block}_{leaf.replace('.', '_')}")
            added = partial(change_plainly, weights, condition)
            layer.forward = lambda x, forward=layer.forward, added=added: forward(x + 0.35 * added(x))
    expected = plain(**inputs)
    expected.square().mean().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = {name: weight.grad for name, weight in network.named_parameters()}
    assert gradients.keys() == state.keys()
    largest = max(float(weight.grad.abs().max()) for weight in state.values() if weight.grad is not None)
    for name, weight in state.items():
        assert weight.grad is not None, name
        scale = max(float(weight.grad.abs().max()), 1e-4 * largest)
        torch.testing.assert_close(gradients[name], weight.grad, rtol=2e-3, atol=2e-3 * scale)


def test_a_new_one_is_the_base(tmp_path: Path) -> None:
    inputs = tiny_inputs(rows=3, columns=4)
    dit = tiny_model()
    with torch.no_grad():
        before = dit(**inputs)
        network = hang(options_of(lllite_target_layers=ALL), dit)
        network.embed_control(torch.rand(2, 3, 48, 64), 1.0)
        assert torch.equal(dit(**inputs), before)
        network = hang(options_of(), dit, seed=2)
        network.embed_control(torch.rand(2, 3, 48, 64), 0.0)
        assert torch.equal(dit(**inputs), before)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("self_attn.q_proj", 7_812_320), ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", 23_196_640)],
)
def test_the_released_transformer_has_as_many_weights_as_theirs(layers: str, expected: int) -> None:
    names = tuple(layers.split())
    with on_meta_device():
        network = AnimaLllite(LlliteConfig(layers=names), 28, dict.fromkeys(names, 2048))

    assert sum(weight.numel() for weight in network.parameters()) == expected
    trunk = network.lllite_conditioning1
    assert sum(weight.numel() for weight in trunk.parameters()) == 120_160


def test_targets_are_sorted_and_unknown_ones_named() -> None:
    made = describe_lllite(options_of(lllite_target_layers="mlp_fc1_pre, self_attn_q"))
    assert made.values["lllite.target_atomics"] == "self_attn_q_pre,mlp_fc1_pre"
    assert made.values["lllite.target_layers"] == "mlp_fc1_pre, self_attn_q"
    with pytest.raises(OptionError, match="is unknown"):
        options_of(lllite_target_layers="self_attn_o")
    with pytest.raises(OptionError, match="is odd"):
        options_of(lllite_cond_dim=25)


def test_files_of_other_models_forms_and_depths_are_named(tmp_path: Path) -> None:
    sdxl = write_lllite(tmp_path / "sdxl.safetensors")
    old = tmp_path / "old.safetensors"
    save_file({"lllite_modules.0.up.weight": torch.zeros(1)}, old)
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_blocks_0_mlp_layer1.lora_up.weight": torch.zeros(2, 2)}, lora)
    for path, words in ((sdxl, "for Stable Diffusion XL"), (old, "an older form"), (lora, "a LoRA")):
        with pytest.raises(CheckpointError, match=words):
            describe_lllite(options_of(network_weights=path)).check()
    made = describe_lllite(options_of())
    network = made.make(tiny_model(), True)
    path = tmp_path / "net.safetensors"
    save_file(network.state_dict(), path)
    deeper = describe_lllite(options_of(network_weights=path))
    deeper.check()
    with on_meta_device():
        dit = AnimaModel(AnimaConfig(**{**vars(CONFIG), "num_layers": 4}))
    with pytest.raises(CheckpointError, match="is made for 2 blocks, but the transformer has 4"):
        deeper.make(dit, True)
    with pytest.raises(OptionError, match="--cond_emb_dim is 8"):
        describe_lllite(options_of(network_weights=path, cond_emb_dim=8)).check()


def picture(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int64))


def test_each_batch_gets_new_masks_which_the_seed_draws() -> None:
    inputs = {CONTROL_PIXELS: torch.zeros(3, 3, 48, 64, dtype=torch.uint8)}

    def masks(seed: int) -> Tensor:
        drawn = draw_masks(inputs, "", torch.Generator().manual_seed(seed))[CONTROL_MASK]
        assert isinstance(drawn, Tensor)
        return drawn

    first = masks(1)
    assert first.shape == (3, 1, 48, 64)
    assert set(first.unique().tolist()) == {0, 1}
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, masks(1))
    assert not torch.equal(first, masks(2))


def test_a_mask_belongs_to_a_file_for_inpainting(tmp_path: Path) -> None:
    control = tmp_path / "control.png"
    Image.new("RGB", (64, 64)).save(control)
    for channels, mask, words in ((4, None, "Pass its mask to --mask_image"), (3, control, "takes no mask")):
        path = tmp_path / f"{channels}.safetensors"
        made = describe_lllite(options_of(lllite_cond_in_channels=channels))
        save_file(made.make(tiny_model(), True).state_dict(), path)
        with pytest.raises(OptionError, match=words):
            check_mask(path, check_file(path, "--lllite_weights").config, mask)
    with pytest.raises(OptionError, match="is for masks, which control images of 3 channels lack"):
        options_of(lllite_inpaint_masked_input=True)
    with pytest.raises(OptionError, match="is 3, but .*4.safetensors, whose training continues, has 4"):
        describe_lllite(options_of(network_weights=tmp_path / "4.safetensors")).check()
    five = {**load_file(path), "lllite_conditioning1.conv1.weight": torch.zeros(12, 5, 4, 4)}
    save_file(five, tmp_path / "five.safetensors")
    with pytest.raises(CheckpointError, match="control images of 5 channels"):
        check_file(tmp_path / "five.safetensors", "--lllite_weights")


@pytest.mark.slow
@pytest.mark.parametrize("with_mask", [False, True])
def test_samples_are_the_pictures_of_a_generation(tmp_path: Path, with_mask: bool) -> None:
    FAMILY.prepare(tmp_path)
    dataset = tmp_path / "dataset.toml"
    text = dataset.read_text(encoding="utf-8")
    folder = tmp_path / re.findall(r'image_directory = "(.*)"', text)[0]
    # for inpainting, control images are the images themselves
    controls = folder if with_mask else tmp_path / "control"
    if not with_mask:
        controls.mkdir()
        for path in folder.glob("*.png"):
            Image.open(path).save(controls / path.name)
    dataset.write_text(text + f"control_directory = '{controls}'\n", encoding="utf-8")
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:44] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    for command in (FAMILY.cache_latents, FAMILY.cache_texts):
        succeed_here(*command, folder=tmp_path)
    control = next(controls.glob("*.png"))
    line = f"a red square --n dull --w 64 --h 64 --d 5 --s 2 --l 3 --cn {control} --am 0.5"
    if with_mask:
        line += " --mk mask.png"
    (tmp_path / "samples.txt").write_text(line + "\n", encoding="utf-8")
    words = [*FAMILY.train[1:]]
    del words[words.index("--network_module") : words.index("--network_module") + 2]
    for option in ("--network_dim", "--network_alpha"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    sizes = ["--cond_emb_dim", 6, "--lllite_cond_dim", 24, "--lllite_mlp_dim", 10, "--learning_rate", 0.1]
    samples = ["--sample_prompts", "samples.txt", "--sample_every_n_steps", 2]
    run = [*words, *OUTPUT, *sizes, "--max_train_steps", 2, "--output_name", "net"]
    run += ["--mixed_precision", "no"]
    if with_mask:
        run += ["--lllite_cond_in_channels", 4, "--lllite_inpaint_masked_input"]

    succeed_here(SCRIPT, *run, *samples, folder=tmp_path)

    with safe_open(tmp_path / "output" / "net.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "anima-preview/control-net-lllite"
    assert metadata["lllite.version"] == "2"
    assert metadata["lllite.cond_emb_dim"] == "6"
    assert metadata["lllite.cond_in_channels"] == ("4" if with_mask else "3")
    assert metadata["lllite.inpaint_masked_input"] == str(with_mask).lower()
    names = {name.partition(".")[0] for name in load_file(tmp_path / "output" / "net.safetensors")}
    assert "lllite_dit_blocks_1_self_attn_q_proj" in names
    (sample,) = (tmp_path / "output" / "sample").glob("net_000002_00_*.png")
    network = ["--lllite_weights", "output/net.safetensors", "--control_image", control]
    if with_mask:
        network += ["--mask_image", "mask.png"]
    generate = [*FAMILY.generate, "--prompt", "a red square", "--image_size", 64, 64, "--seed", 5]
    generate += ["--infer_steps", 2, "--guidance_scale", 3]
    if with_mask:
        Image.fromarray(255 - mask).save(tmp_path / "inverse.png")
        inverse = [*network[:-1], "inverse.png", "--lllite_multiplier", 0.5]
        succeed_here(*generate, *inverse, "--save_path", "inverse", folder=tmp_path)
    for name, further in {"with": [*network, "--lllite_multiplier", 0.5], "without": []}.items():
        succeed_here(*generate, *further, "--save_path", name, folder=tmp_path)
    (made,) = (tmp_path / "with").glob("*.png")
    (base,) = (tmp_path / "without").glob("*.png")
    assert (picture(sample) - picture(made)).abs().max() <= 1
    assert (picture(base) - picture(made)).abs().max() > 2
    if with_mask:
        (other,) = (tmp_path / "inverse").glob("*.png")
        assert (picture(other) - picture(made)).abs().max() > 2


def test_the_next_command_has_the_mask_and_the_strength_of_the_sample() -> None:
    options = options_of(lllite_cond_in_channels=4, lllite_multiplier=0.5)
    sample = {"extra": {"mask_path": "mask.png", "control_multiplier": "0.8"}}
    generate = describe_lllite(options).generate
    assert generate is not None

    words = [*generate(Path("net.safetensors"), sample, [])]

    assert words[words.index("--mask_image") + 1] == "mask.png"
    assert generation_options(options, sample)["--lllite_multiplier"] == "0.4"
    assert "--lllite_multiplier" not in generation_options(options, {})  # the training's is repeated


@pytest.mark.parametrize("with_values", [False, True])
def test_a_file_that_is_trained_on_keeps_its_dilations(tmp_path: Path, with_values: bool) -> None:
    """No option says them: what is made, planned and written has those of the file."""
    path = tmp_path / "net.safetensors"
    first = describe_lllite(options_of(lllite_use_aspp=True))
    assert first.values["lllite.aspp_dilations"] == "1,2,4,8"
    state = first.make(tiny_model(), True).state_dict()
    save_file(state, path, {"lllite.aspp_dilations": "1,2,3,6"})
    made = describe_lllite(options_of(lllite_use_aspp=True, network_weights=path))
    made.check()
    assert made.values["lllite.aspp_dilations"] == "1,2,3,6"
    trunk: Any = made.make(tiny_model(), with_values).lllite_conditioning1
    found = {layer.dilation for layer in trunk.aspp.modules() if isinstance(layer, nn.Conv2d)}
    assert found == {(1, 1), (2, 2), (3, 3), (6, 6)}
    save_file(state, path, {"lllite.aspp_dilations": "0,1,2,4"})
    with pytest.raises(CheckpointError, match="aspp_dilations in its metadata is '0,1,2,4'"):
        made.check()


def test_the_seed_of_a_sample_draws_the_mask_that_it_lacks() -> None:
    first, again, other = (draw_control_mask(96, 64, seed=seed)[CONTROL_MASK] for seed in (1, 1, 2))
    assert first.shape == (1, 1, 64, 96)
    assert 0 < first.float().mean() < 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
