"""LoRAs in a checkpoint: added at run time, merged and pre-calculated; dialects; strengths; refusals."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.errors import CheckpointError, OptionError
from networks.gated_loras import LoraBranch
from networks.kinds.oft_rotation import compute_rotations, rotate_weight
from stable_diffusion.contract import SD1, Model
from stable_diffusion.loras import AdjustableLoras, check_kind, read_networks
from stable_diffusion.network_options import AddedNetworkOptions
from tests.stable_diffusion import loaded
from tests.tiny.stable_diffusion import WRITERS, tokenizer_folder

Fresh = Callable[..., Model]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Loads a new model of a kind."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers = tokenizer_folder(folder / "tokenizers")
    known: dict[str, Model] = {}

    def make(kind: str = "sd1") -> Model:
        if kind not in known:
            known[kind] = loaded.load(WRITERS[kind](folder), "--tokenizer_cache_dir", tokenizers)
        model = known[kind]
        texts = tuple(replace(tower, network=copy.deepcopy(tower.network)) for tower in model.text_encoders)
        return replace(model, unet=copy.deepcopy(model.unet), text_encoders=texts)

    return make


@torch.no_grad()
def add_by_hand(model: Model, changes: Mapping[str, Tensor], multiplier: float = 1.0) -> None:
    """Add changes of weights, by sd-scripts' names of the modules."""
    modules: dict[str, nn.Module] = {
        loaded.kohya_name(path, model.kind.name): one for path, one in model.unet.named_modules() if path
    }
    modules |= loaded.text_modules(model)
    for name, change in changes.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        weight += multiplier * change.reshape(weight.shape)


def plain_changes(path: Path) -> dict[str, Tensor]:
    """alpha / rank * up @ down of each module of a file of plain LoRAs."""
    tensors = load_file(path)
    names = {name.partition(".")[0] for name in tensors}
    changes = {}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        product = up.flatten(1) @ down.flatten(1)
        changes[name] = product * float(tensors[f"{name}.alpha"]) / loaded.RANK
    return changes


@pytest.mark.slow_cases("added")
@pytest.mark.parametrize("words", [[], ["--network_pre_calc"]], ids=["added", "before"])
def test_strengths_are_chosen_for_a_batch_and_weights_come_back_to_the_bit(
    fresh: Fresh, tmp_path: Path, words: list[str]
) -> None:
    plain = fresh()
    one = loaded.write_kohya(tmp_path / "one.safetensors", plain, lambda path: "attn1" in path)
    other = loaded.write_kohya(tmp_path / "two.safetensors", plain, lambda path: "conv2" in path, texts=False)
    model = fresh()
    networks = loaded.put_in(model, one, other, *words)
    assert networks is not None
    wanted = fresh()
    add_by_hand(wanted, plain_changes(one), 0.25)
    add_by_hand(wanted, plain_changes(other), -2)

    networks.set_strengths((0.25, -2.0))
    loaded.assert_same(loaded.results(model), loaded.results(wanted))
    networks.set_strengths((0.25, 0.5), part=0)
    alone = loaded.results(model)
    networks.set_strengths((0.0,))  # the last one counts for the others
    assert all(torch.equal(a, b) for a, b in zip(loaded.results(model), loaded.results(plain), strict=True))
    only_one = fresh()
    add_by_hand(only_one, plain_changes(one), 0.25)
    loaded.assert_same(alone, loaded.results(only_one))
    both = fresh()
    add_by_hand(both, plain_changes(one))
    add_by_hand(both, plain_changes(other))
    networks.set_strengths(None)
    loaded.assert_same(loaded.results(model), loaded.results(both))


@torch.no_grad()
@pytest.mark.parametrize("words", [[], ["--network_pre_calc"], ["--network_merge"]])
def test_rotations_are_added_and_folded_in(fresh: Fresh, tmp_path: Path, words: list[str]) -> None:
    """Files of OFTs, also those with the prefix of sd-scripts' OFTs."""
    wanted, model, tensors = fresh(), fresh(), {}
    for path, module in wanted.unet.named_modules():
        if isinstance(module, nn.Linear) and "attn1.to_q" in path:
            values = 0.1 * torch.randn(module.in_features // 4, 6, generator=torch.Generator().manual_seed(1))
            name = loaded.kohya_name(path, wanted.kind.name).replace("lora_unet_", "oft_unet_")
            tensors[f"{name}.oft_R.weight"] = values
            module.weight += rotate_weight(module.weight, compute_rotations(values, 0.5))
    assert tensors
    save_file(tensors, tmp_path / "oft.safetensors")

    loaded.put_in(model, tmp_path / "oft.safetensors", "--network_mul", 0.5, *words)

    loaded.assert_same(loaded.results(model), loaded.results(wanted))


@torch.no_grad()
@pytest.mark.parametrize("words", [[], ["--network_pre_calc"], ["--network_merge"]])
def test_weights_are_set_at_any_strength(fresh: Fresh, tmp_path: Path, words: list[str]) -> None:
    """A matrix, a convolution and a norm of the U-Net, and a matrix of the text encoder."""
    wanted, model, tensors = fresh(), fresh(), {}
    modules = {
        loaded.kohya_name(path, wanted.kind.name): module for path, module in wanted.unet.named_modules()
    }
    modules |= loaded.text_modules(wanted)
    for number, (name, module) in enumerate(modules.items()):
        if not name.endswith(("attn1_to_q", "norm2", "conv_in", "mlp_fc1")):
            continue
        values = 0.3 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(number))
        tensors[f"{name}.set_weight"] = values
        module.weight.copy_(values)
    endings = {name.removesuffix(".set_weight").rpartition("_")[2] for name in tensors}
    assert endings == {"q", "norm2", "in", "fc1"}
    save_file(tensors, tmp_path / "set.safetensors")

    loaded.put_in(model, tmp_path / "set.safetensors", "--network_mul", 0.5, *words)

    loaded.assert_same(loaded.results(model), loaded.results(wanted))


def test_the_first_files_are_merged_and_the_others_have_strengths(fresh: Fresh, tmp_path: Path) -> None:
    plain = fresh()
    one = loaded.write_kohya(tmp_path / "one.safetensors", plain, lambda path: "attn1" in path)
    other = loaded.write_kohya(tmp_path / "two.safetensors", plain, lambda path: "conv2" in path)
    model = fresh()
    networks = loaded.put_in(model, one, other, "--network_merge_n_models", 1, "--network_mul", 0.5)
    assert networks is not None
    assert len(networks) == 1
    wanted = fresh()
    add_by_hand(wanted, plain_changes(one), 0.5)
    add_by_hand(wanted, plain_changes(other), 3)

    networks.set_strengths((3.0,))
    loaded.assert_same(loaded.results(model), loaded.results(wanted))
    with pytest.raises(OptionError, match="--am has 2 strengths for 1 networks"):
        networks.set_strengths((1, 1))


def test_added_merged_and_calculated_before_are_the_same(fresh: Fresh, tmp_path: Path) -> None:
    plain, wanted = fresh("sdxl"), fresh("sdxl")
    path = loaded.write_kohya(tmp_path / "x.safetensors", plain, loaded.in_places)
    add_by_hand(wanted, plain_changes(path), 0.7)
    expected = loaded.results(wanted)

    for words in ([], ["--network_merge"], ["--network_pre_calc"]):
        model = fresh("sdxl")
        loaded.put_in(model, path, "--network_mul", 0.7, *words)
        loaded.assert_same(loaded.results(model), expected)
    for changed, before in zip(expected, loaded.results(plain), strict=True):
        assert float((changed - before).abs().max()) > 0.01 * float(before.std())


def test_norms_change_at_run_time_and_when_merged(fresh: Fresh, tmp_path: Path) -> None:
    model, merged, wanted = fresh(), fresh(), fresh()
    named = [path for path, one in model.unet.named_modules() if isinstance(one, nn.GroupNorm | nn.LayerNorm)]
    norms = {path: wanted.unet.get_submodule(path) for path in named}
    change = {
        loaded.kohya_name(path, "sd1"): {
            "w_norm": loaded.random(*norm.weight.shape, seed=path),
            "b_norm": loaded.random(*norm.weight.shape, seed=f"{path} b"),
        }
        for path, norm in norms.items()
    }
    path = loaded.write(tmp_path / "x.safetensors", change)
    for name, norm in norms.items():
        norm.weight += 0.5 * change[loaded.kohya_name(name, "sd1")]["w_norm"]
        norm.bias += 0.5 * change[loaded.kohya_name(name, "sd1")]["b_norm"]

    loaded.put_in(model, path, "--network_mul", 0.5)
    loaded.put_in(merged, path, "--network_mul", 0.5, "--network_merge")

    loaded.assert_same(loaded.results(model), loaded.results(wanted))
    loaded.assert_same(loaded.results(merged), loaded.results(wanted))


def test_names_of_released_files_and_of_both_numbers_of_the_text_encoder(
    fresh: Fresh, tmp_path: Path
) -> None:
    """SD 1 with the names that SDXL's LoRAs have."""
    model, same = fresh(), fresh()
    modules = loaded.unet_modules(model, loaded.in_places)
    own = {loaded.kohya_name(path, "sd1"): loaded.low_rank(path, one) for path, one in modules.items()}
    ldm = {loaded.kohya_name(path, "sdxl"): loaded.low_rank(path, one) for path, one in modules.items()}
    texts = {name: loaded.low_rank(name, one) for name, one in loaded.text_modules(model).items()}
    first = {name.replace("lora_te_", "lora_te1_"): factors for name, factors in texts.items()}
    assert own.keys() != ldm.keys()

    loaded.put_in(same, loaded.write(tmp_path / "own.safetensors", {**own, **texts}))
    loaded.put_in(model, loaded.write(tmp_path / "ldm.safetensors", {**ldm, **first}))

    loaded.assert_same(loaded.results(model), loaded.results(same))


def test_layers_tell_each_lora_and_let_its_output_be_changed(fresh: Fresh, tmp_path: Path) -> None:
    model, plain = fresh(), fresh()
    one = loaded.write_kohya(tmp_path / "one.safetensors", plain, lambda path: "attn" in path, texts=False)
    other = loaded.write_kohya(tmp_path / "two.safetensors", plain, lambda path: "conv1" in path, texts=False)
    networks = loaded.put_in(model, one, other)
    assert networks is not None
    assert networks.layers is not None
    first, second = networks.layers

    assert set(first) == set(loaded.unet_modules(plain, lambda path: "attn" in path))
    assert set(second) == set(loaded.unet_modules(plain, lambda path: "conv1" in path))
    for layer in first.values():
        layer.apply_region = torch.zeros_like
    wanted = fresh()
    add_by_hand(wanted, plain_changes(other))
    loaded.assert_same(loaded.results(model), loaded.results(wanted))


# What is refused


def of_flux(path: Path) -> Path:
    factors = {
        "lora_down.weight": loaded.random(2, 8, seed="a"),
        "lora_up.weight": loaded.random(24, 2, seed="b"),
    }
    return loaded.write(
        path, {"lora_unet_double_blocks_0_img_mod_lin": factors}, {"ss_base_model_version": "flux1"}
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network_module", "networks.lora", "networks.lora"], "--network_module has 2 names for 1 files"),
        (["--network_merge", "--network_merge_n_models", 1], "pass one"),
        (["--network_merge_n_models", 2], "there are 1 --network_weights"),
        (["--network_merge", "--network_pre_calc"], "pass one"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, words: list[object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        loaded.options("--network_weights", of_flux(tmp_path / "x.safetensors"), *words)


def test_a_lora_of_another_family_or_kind_is_named(fresh: Fresh, tmp_path: Path) -> None:
    cross = {
        "lora_down.weight": loaded.random(2, 2048, seed="a"),
        "lora_up.weight": loaded.random(32, 2, seed="b"),
    }
    place = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    wide = "is a LoRA for Stable Diffusion XL, by its sizes; --ckpt is Stable Diffusion 1.x"
    flux = "is a LoRA for flux, not for Stable Diffusion"
    for path, message in (
        (of_flux(tmp_path / "flux.safetensors"), flux),
        (loaded.write(tmp_path / "wide.safetensors", {place: cross}), wide),
    ):
        given = loaded.options("--network_weights", path).networks
        with pytest.raises(CheckpointError, match=message):
            check_kind(read_networks(given), SD1)


def test_what_a_file_says_of_itself_is_shown(
    fresh: Fresh, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    factors = {name: loaded.low_rank(name, one) for name, one in loaded.text_modules(fresh()).items()}
    said = {"ss_base_model_version": "sd_v2", "ss_tag_frequency": '{"10_cat": {"cat": 3}}'}
    path = loaded.write(tmp_path / "x.safetensors", factors, said)
    check_kind(read_networks(loaded.options("--network_weights", path, "--network_show_meta").networks), SD1)

    assert '"10_cat": {' in caplog.text
    assert "was trained for Stable Diffusion 2.x according to its metadata, and is used with" in caplog.text


@pytest.mark.parametrize("layers", [None, [{}, {}]], ids=["before", "added"])
def test_strengths_that_were_interrupted_are_set_again(layers: list[dict[str, LoraBranch]] | None) -> None:
    """Ctrl-C cancels a prompt of --interactive; the next one has the strengths that it asks for."""
    weights, interrupts = [0.0, 0.0], [False]

    def use(multipliers: tuple[float, ...]) -> None:
        weights[0] = multipliers[0]
        if interrupts[0]:
            interrupts[0] = False
            raise KeyboardInterrupt
        weights[1] = multipliers[1]

    networks = AdjustableLoras((1.0, 1.0), use, layers)
    interrupts[0] = True
    with pytest.raises(KeyboardInterrupt):
        networks.set_strengths((0.25, 0.5))

    networks.set_strengths(None)
    assert weights == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("networks.boft", "--network_module networks.boft is for BOFT: it is not supported"),
        ("networks.control_net_lllite", "--control_net_lllite_models takes it"),
        ("my.module", "--network_module my.module: modules of other programs are not supported"),
    ],
)
def test_modules_that_are_not_read_are_refused(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.touch()
    with pytest.raises(OptionError, match=message):
        AddedNetworkOptions.from_defaults(network_module=(name,), network_weights=(path,))
