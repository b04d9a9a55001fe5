"""ControlNet-LLLite, and the tools for LoRAs of Stable Diffusion."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import merge_lora
from modules.errors import CheckpointError
from networks import extract_lora_from_models, sdxl_merge_lora
from networks.delta import read_delta
from networks.loading import read_lora
from networks.module_factors import group_by_module
from stable_diffusion.contract import SD1, SDXL, UnetCall
from stable_diffusion.lllites import check_lllites, load_lllites
from stable_diffusion.network_options import ControlOptions
from tests.stable_diffusion import loaded
from tests.tiny.control_nets import lllite_state, write_control_net, write_lllite
from tests.tiny.stable_diffusion import WRITERS, tokenizer_folder, unet_state, write_sd1, write_sdxl

PLACES = {
    "input_blocks_4_1": "down_blocks.1.attentions.0",
    "input_blocks_5_1": "down_blocks.1.attentions.1",
    "middle_block_1": "mid_block.attentions.0",
    "output_blocks_0_1": "up_blocks.0.attentions.0",
    "output_blocks_2_1": "up_blocks.0.attentions.2",
}
CONVOLUTION = {"lllite_unet_input_blocks_4_0_out_layers_3": 128}


def options_of(*paths: Path, **values: tuple[float, ...]) -> ControlOptions:
    return ControlOptions.from_defaults(control_net_lllite_models=paths, **values)


def tell(weights: dict[str, Tensor], guides: Tensor) -> Tensor:
    """What a layer is told of guides, R 3 H W in -1..1."""
    first, second = ("conditioning1.0", "conditioning1.2")
    told = functional.conv2d(guides, weights[f"{first}.weight"], weights[f"{first}.bias"], stride=4)
    return functional.conv2d(told.relu(), weights[f"{second}.weight"], weights[f"{second}.bias"], stride=4)


def change(weights: dict[str, Tensor], told: Tensor, x: Tensor) -> Tensor:
    """What is added to the input of a layer that convolves, or multiplies."""
    apply, axis = (functional.conv2d, 1) if x.ndim == 4 else (functional.linear, 2)
    x = apply(x, weights["down.0.weight"], weights["down.0.bias"]).relu()
    x = apply(torch.cat([told, x], axis), weights["mid.0.weight"], weights["mid.0.bias"]).relu()
    return apply(x, weights["up.0.weight"], weights["up.0.bias"])


def wrap(unet: UNet2DConditionModel, state: dict[str, Tensor], guides: Tensor, multiplier: float) -> None:
    """Change a U-Net for good, by the formula."""
    for name in {name.partition(".")[0] for name in state}:
        weights = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if name + "." in key}
        # lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q
        block, _, rest = name.removeprefix("lllite_unet_").partition("_transformer_blocks_")
        number, attention, kind = rest.split("_", 2)
        layer = unet.get_submodule(f"{PLACES[block]}.transformer_blocks.{number}.{attention}.{kind}")
        added = partial(change, weights, tell(weights, guides).flatten(2).transpose(1, 2))
        layer.forward = lambda x, forward=layer.forward, added=added: forward(x + multiplier * added(x))


def test_the_u_net_with_two_is_as_described(tmp_path: Path) -> None:
    guides = [loaded.write_guide(tmp_path / f"{seed}.png", seed) for seed in range(2)]
    paths = [write_lllite(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (60, 61)]
    model, call = loaded.model_of("sdxl"), loaded.call_of("sdxl")
    lllites = load_lllites(options_of(*paths, control_net_multipliers=(0.8, 0.5)), model)
    assert lllites is not None
    before = loaded.run_unet(model.unet, call)

    with torch.no_grad(), lllites.apply_to_batch([loaded.picture(*guides)], 64, 64) as idea:
        assert idea is not None
        found = loaded.run_unet(model.unet, idea(call))

    plain = loaded.unet_of("sdxl")
    for seed, guide, multiplier in zip((60, 61), guides, (0.8, 0.5), strict=True):
        wrap(plain, lllite_state(seed=seed), loaded.pixels(guide).repeat(2, 1, 1, 1) * 2 - 1, multiplier)
    torch.testing.assert_close(found, loaded.run_unet(plain, call), atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-2
    assert torch.equal(loaded.run_unet(model.unet, call), before)  # nothing is left in it


def test_a_layer_that_convolves_is_changed_at_its_places(tmp_path: Path) -> None:
    guide, path = loaded.write_guide(tmp_path / "guide.png"), tmp_path / "net.safetensors"
    write_lllite(path, layers=CONVOLUTION, convolution=True)
    model, call = loaded.model_of("sdxl"), loaded.call_of("sdxl")
    lllites = load_lllites(options_of(path), model)
    layer = model.unet.get_submodule("down_blocks.1.resnets.0.conv2")
    seen: list[Tensor] = []
    assert lllites is not None

    with torch.no_grad(), lllites.apply_to_batch([loaded.picture(guide)], 64, 48) as idea:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        assert idea is not None
        loaded.run_unet(model.unet, idea(call))
    loaded.run_unet(model.unet, call)

    state = {
        name.partition(".")[2]: tensor for name, tensor in lllite_state(CONVOLUTION, convolution=True).items()
    }
    told = tell(state, loaded.pixels(guide).repeat(2, 1, 1, 1) * 2 - 1)
    torch.testing.assert_close(seen[0], seen[1] + change(state, told, seen[1]), atol=1e-5, rtol=1e-5)


def made_with(folder: Path, width: int, height: int, *calls: UnetCall) -> list[Tensor]:
    """What the U-Net makes of calls in a batch of that size, with a net and a guide."""
    path, guide = write_lllite(folder / "net.safetensors"), loaded.write_guide(folder / "guide.png")
    model = loaded.model_of("sdxl")
    lllites = load_lllites(options_of(path), model)
    assert lllites is not None
    with torch.no_grad(), lllites.apply_to_batch([loaded.picture(guide)], width, height) as idea:
        assert idea is not None
        return [loaded.run_unet(model.unet, idea(call)) for call in calls]


def test_guides_follow_latents_that_grow(tmp_path: Path) -> None:
    small, large = (loaded.call_of("sdxl", size=size) for size in ((32, 24), (64, 48)))

    assert torch.equal(made_with(tmp_path, 64, 48, small, large)[1], made_with(tmp_path, 64, 48, large)[0])


def test_sizes_that_levels_round_up_fit(tmp_path: Path) -> None:
    call = loaded.call_of("sdxl", size=(72, 40))

    assert made_with(tmp_path, 72, 40, call)[0].shape == call.sample.shape


# Wrong files


def test_other_files_are_named(tmp_path: Path) -> None:
    def lllite(name: str, layer: str, width: int = 16) -> Path:
        return write_lllite(tmp_path / f"{name}.safetensors", layers={layer: width})

    wide = lllite("wide", "lllite_unet_middle_block_1_transformer_blocks_0_attn1_to_q", 640)
    paths = {
        "looks like": write_control_net(tmp_path / "control.safetensors", "sdxl"),
        "another model": lllite("dit", "lllite_dit_blocks_0_q"),
        "does not have": lllite("far", "lllite_unet_input_blocks_99_1_x"),
        "no such file": tmp_path / "missing.safetensors",
    }

    for words, path in paths.items():
        with pytest.raises(CheckpointError, match=words):
            check_lllites(options_of(path), SDXL)
    with pytest.raises(CheckpointError, match=r"is for Stable Diffusion XL, but --ckpt is .* 1\.x"):
        check_lllites(options_of(wide), SD1)
    with pytest.raises(CheckpointError, match="640 channels, but the model takes 128 channels"):
        load_lllites(options_of(wide), loaded.model_of("sdxl"))


CPU = torch.device("cpu")


def merge(tool: str, source: Path, path: Path, output: Path, multiplier: float) -> None:
    if tool == "merge_lora":
        words = ["--dit", source, "--lora_weight", path, "--lora_multiplier", multiplier, "--device", "cpu"]
        merge_lora.main([*map(str, words), "--save_merged_model", str(output)])
    else:
        words = ["--sd_model", source, "--models", path, "--ratios", multiplier, "--save_to", output]
        sdxl_merge_lora.main([str(word) for word in words])


def extract(source: Path, tuned: Path, output: Path, *others: object) -> None:
    words = ["--model_org", source, "--model_tuned", tuned, "--save_to", output, "--device", "cpu"]
    extract_lora_from_models.main([str(word) for word in (*words, "--clamp_quantile", 1, *others)])


TEXT_LAYER = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def write_text_lora(path: Path) -> Path:
    """A LoRA for one layer of the first text encoder, which adds 1 to all weights."""
    return loaded.write(
        path, {TEXT_LAYER: {"lora_down.weight": torch.ones(1, 64), "lora_up.weight": torch.ones(128, 1)}}
    )


@pytest.mark.slow_cases("sdxl-sdxl_merge_lora")
@pytest.mark.parametrize(
    ("kind", "tool"),
    [
        ("sd1", "merge_lora"),
        pytest.param("sd2", "merge_lora", marks=pytest.mark.slow),
        ("sdxl", "sdxl_merge_lora"),
    ],
)
def test_merged_into_a_checkpoint_and_extracted_again_it_acts_as_when_added(
    tmp_path: Path, kind: str, tool: str
) -> None:
    tokenizer_folder(tmp_path / "tokenizers")
    source, output = WRITERS[kind](tmp_path), tmp_path / "merged.safetensors"
    model = loaded.load(source, "--tokenizer_cache_dir", tmp_path / "tokenizers")
    path = loaded.write_kohya(
        tmp_path / "x.safetensors", model, lambda place: loaded.in_places(place) and place != "conv_in"
    )
    loaded.put_in(model, path, "--network_mul", 0.5)

    merge(tool, source, path, output, 0.5)

    merged = loaded.load(output, "--tokenizer_cache_dir", tmp_path / "tokenizers")
    loaded.assert_same(loaded.results(merged), loaded.results(model))
    before, after = load_file(source), load_file(output)
    assert before.keys() == after.keys()
    kept = [name for name in before if name.startswith("first_stage_model.")]
    assert all(torch.equal(before[name], after[name]) for name in kept)

    extracted = tmp_path / "extracted.safetensors"
    extract(source, output, extracted, "--dim", 3, "--conv_dim", 3)

    again = loaded.load(source, "--tokenizer_cache_dir", tmp_path / "tokenizers")
    loaded.put_in(again, extracted)
    loaded.assert_same(loaded.results(again), loaded.results(merged), 1e-3)
    with safe_open(extracted, "pt") as file:
        version = file.metadata()["ss_base_model_version"]
        names = set(file.keys())
    assert version == {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[kind]
    assert ("lora_unet_middle_block_1_proj_in.alpha" in names) == (kind == "sdxl")


def test_unchanged_text_encoders_are_left_out_and_other_models_refused(tmp_path: Path) -> None:
    source, tuned, lora = write_sdxl(tmp_path), tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors"
    tensors = load_file(source)
    tensors["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"][:64] += 0.5
    save_file(tensors, tuned)

    extract(source, tuned, lora)

    found = load_file(lora)
    assert {each.split("_")[1] for each in found} == {"unet", "te2"}
    changes = {
        module: read_delta(factors).compute_change(CPU) for module, factors in group_by_module(found).items()
    }
    layer = "lora_te2_text_model_encoder_layers_0_self_attn"
    largest = {key: float(one.abs().max()) for key, one in changes.items() if one is not None}
    assert largest[f"{layer}_q_proj"] > 0.1
    assert largest[f"{layer}_k_proj"] < 1e-3
    with pytest.raises(CheckpointError, match="are not the same model"):
        extract(source, write_sd1(tmp_path), lora)


@pytest.mark.slow
def test_loras_are_added_up_to_one_with_the_names_that_others_read(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path / "tokenizers")
    model = loaded.load(write_sdxl(tmp_path), "--tokenizer_cache_dir", tmp_path / "tokenizers")
    one = loaded.write_kohya(tmp_path / "one.safetensors", model, loaded.in_places)
    other = loaded.write_kohya(tmp_path / "two.safetensors", model, lambda path: path.endswith("attn2.to_k"))
    total = tmp_path / "sum.safetensors"

    words = ["--models", one, other, "--ratios", 0.5, -2, "--save_to", total, "--concat"]
    sdxl_merge_lora.main([str(word) for word in words])

    both = loaded.load(model.path, "--tokenizer_cache_dir", tmp_path / "tokenizers")
    loaded.put_in(both, one, other, "--network_mul", 0.5, -2)
    loaded.put_in(model, total)
    loaded.assert_same(loaded.results(model), loaded.results(both))
    assert read_lora(total).metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert set(load_file(one)) <= set(load_file(total))


def test_old_names_of_text_encoders_and_positions_left_out_make_no_difference(tmp_path: Path) -> None:
    source, old = write_sd1(tmp_path), tmp_path / "old.safetensors"
    text = "cond_stage_model.transformer."
    tensors = {name.replace(f"{text}text_model.", text): one for name, one in load_file(source).items()}
    tensors.pop(f"{text}embeddings.position_ids")
    save_file(tensors, old)
    merged, extracted = tmp_path / "merged.safetensors", tmp_path / "extracted.safetensors"

    merge("sdxl_merge_lora", old, write_text_lora(tmp_path / "lora.safetensors"), merged, 0.5)

    changed = f"{text}encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(load_file(merged)[changed], tensors[changed] + 0.5)
    extract(old, merged, extracted)
    delta = read_delta(group_by_module(load_file(extracted))[TEXT_LAYER]).compute_change(CPU)
    assert delta is not None
    torch.testing.assert_close(delta, torch.full((128, 64), 0.5), atol=1e-4, rtol=1e-4)
    # a fine-tuned file that has what the original leaves out
    save_file({**load_file(merged), f"{text}embeddings.position_ids": torch.arange(77)[None]}, merged)
    extract(old, merged, extracted)


def test_a_lora_for_text_encoders_that_the_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    lora, output = write_text_lora(tmp_path / "lora.safetensors"), tmp_path / "merged.safetensors"
    alone = tmp_path / "unet.safetensors"
    save_file(unet_state("sd1"), alone)

    for source in (write_sdxl(tmp_path), alone):
        with pytest.raises(CheckpointError, match="changes only text encoders, which .* does not contain"):
            merge("merge_lora", source, lora, output, 1.0)
    assert not output.exists()
