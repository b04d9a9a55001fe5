"""States of other programs' optimizers: every moment goes to the layer that it belongs to."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.adapter import make_network
from networks.options import NetworkOptions
from tests.golden_cases import read_case
from tests.networks.making import load_transformer
from tests.networks.test_lora_image_families import network
from training.optimizers.foreign import RenumberingError, renumber
from training.optimizers.optimizer import restore_foreign_optimizer

IMAGES = read_case("image_lora_modules")[0]["families"]
RECORDED = {
    **{name: [one for one, _ in IMAGES[name]["default"]["modules"]] for name in ("flux", "chroma", "lumina")},
    "hunyuan_image": [one for one, _ in IMAGES["hunyuan_image"]["default"]["modules"]],
    "hunyuan_video": [one for one, *_ in read_case("hv_lora")[0]["lora"]["modules_name_in_out"]],
    "framepack": [one for one, *_ in read_case("framepack_lora")[0]["lora"]["modules_name_in_out"]],
    "wan i2v-14B": read_case("wan_lora_i2v")[0]["lora"]["module_names"],
}
RECORDED["kontext"] = [name for name in RECORDED["flux"] if "mod" not in name]
# in the order in which the trainers' networks register them; not recorded
QWEN = ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out_0", "to_add_out")
MLPS = ("img_mlp_net_0_proj", "img_mlp_net_2", "txt_mlp_net_0_proj", "txt_mlp_net_2")
LTX = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
IN_BLOCK = {
    "qwen_image": ("transformer_blocks", (*(f"attn_{one}" for one in QWEN), *MLPS)),
    "flux_2": (
        "double_blocks",
        [f"{x}_{one}" for x in ("img", "txt") for one in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2")],
    ),
    "z_image": (
        "layers",
        [
            *(f"attention_{one}" for one in ("to_q", "to_k", "to_v", "to_out_0")),
            *(f"feed_forward_{one}" for one in ("w1", "w2", "w3")),
        ],
    ),
    "ltx_2 with sound": (
        "transformer_blocks",
        [f"{part}_{one}" for part in LTX for one in ("to_q", "to_k", "to_v", "to_out_0")],
    ),
}
RECORDED |= {name: [f"lora_unet_{start}_0_{one}" for one in ends] for name, (start, ends) in IN_BLOCK.items()}
RECORDED["flux_2"] += ["lora_unet_single_blocks_0_linear1", "lora_unet_single_blocks_0_linear2"]
# all layers, those outside the blocks too
IN_KREA = [f"attn_{one}" for one in ("wq", "wk", "wv", "gate", "wo")] + ["mlp_gate", "mlp_up", "mlp_down"]
KREA = ("first", "blocks_0", "tmlp_0", "tmlp_2", "txtfusion_layerwise_blocks_0", "txtfusion_projector")
KREA += ("txtfusion_refiner_blocks_0", "txtmlp_1", "txtmlp_3", "last_linear", "tproj_1")
RECORDED["krea2"] = [
    f"lora_unet_{part}{one}"
    for part in KREA
    for one in ([f"_{x}" for x in IN_KREA] if "blocks" in part else [""])
]
FACTORS = {
    "lora": ("lora_down.weight", "lora_up.weight"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "loha of LyCORIS": ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a"),
    "lokr": ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}


def in_their_order(names: Sequence[str], recorded: Sequence[str]) -> list[str]:
    """Names of modules as the trainer numbers them: block by block, each as in the recorded list."""

    def split(name: str) -> tuple[str, int, str]:
        found = re.fullmatch(r"(lora_[a-z0-9]+_.*?)_(\d+)_(.+)", name)
        return (name, 0, "") if found is None else (found[1], int(found[2]), found[3])

    starts = list(dict.fromkeys(split(name)[0] for name in recorded))
    endings = list(dict.fromkeys(split(name)[::2] for name in recorded))

    def place(name: str) -> tuple[int, int, int]:
        start, number, ending = split(name)
        return starts.index(start), number, endings.index((start, ending))

    return sorted(names, key=place)


def write_state(made: nn.Module, theirs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A state with these groups of tensors; the moments of each are filled with its number."""
    order = [name for group in theirs for name in group]
    shapes = {name: one.shape for name, one in made.named_parameters()}
    assert set(order) == shapes.keys()
    kept: dict[int, dict[str, Tensor]] = {}
    for number, name in enumerate(order):
        moments = torch.full(shapes[name], float(number))
        kept[number] = {"step": torch.tensor(1.0), "exp_avg": moments, "exp_avg_sq": moments}
    settings = {"lr": 1.0, "betas": (0.5, 0.5)}
    groups = [{**settings, "params": [order.index(name) for name in group]} for group in theirs]
    return {"state": kept, "param_groups": groups}


def restore(made: Any, theirs: Sequence[Sequence[str]], version: str) -> None:
    """Resume such a state, and look at the moments of every layer."""
    optimizer = torch.optim.AdamW(made.parameter_groups(1e-4)[0])
    groups = [group["params"] for group in optimizer.param_groups]
    names = {one: f"network.{name}" for name, one in made.named_parameters()}

    found = renumber(write_state(made, theirs), groups, names, version)

    restore_foreign_optimizer(optimizer, found, torch.device("cpu"))
    own = dict(made.named_parameters())
    for number, name in enumerate(name for group in theirs for name in group):
        assert set(optimizer.state[own[name]]["exp_avg"].unique().tolist()) == {number}, name
    assert {group["lr"] for group in optimizer.param_groups} <= {1e-4, 4e-4}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.5)}


def version_of(family: Any) -> str:
    version: str = family.metadata.get("base_model_version", family.name)
    return version


@pytest.mark.slow_cases(
    "chroma", "flux_2", "hunyuan_image", "kontext", "krea2", "ltx_2 with sound", "wan i2v-14B"
)
@pytest.mark.parametrize("name", RECORDED)
def test_moments_of_a_known_trainer_go_to_the_layers_they_belong_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, dit = load_transformer(name, tmp_path, monkeypatch)

    for kind, factors in FACTORS.items():
        module = family.lora_module if kind == "lora" else f"networks.{kind.partition(' ')[0]}"
        options = NetworkOptions(network_module=module, network_dim=2)
        made = make_network(options, module, dit, seed=1).module
        modules = in_their_order(made.names, RECORDED[name])
        own = dict(made.named_parameters())
        theirs = [one for name in modules for factor in factors if (one := f"{name}.{factor}") in own]

        restore(made, [theirs], version_of(family))


def test_groups_of_the_up_factors_and_of_text_encoders_are_those_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, dit = load_transformer("qwen_image", tmp_path, monkeypatch)
    options = NetworkOptions(network_args=("loraplus_lr_ratio=4",))
    made: Any = make_network(options, family.lora_module, dit, seed=1)
    modules = in_their_order(made.names, RECORDED["qwen_image"])
    restore(made, [[f"{one}.lora_{part}.weight" for one in modules] for part in ("down", "up")], "qwen_image")

    case = IMAGES["flux"]["CLIP-L and T5 too"]
    names = [name for name, _ in case["modules"]]
    starts = ("lora_te1", "lora_te3", "lora_unet")
    in_te = [[name for name in names if name.startswith(start)] for start in starts]
    groups = [[f"{one}.lora_{part}.weight" for one in some for part in ("down", "up")] for some in in_te]
    made = network("flux", "CLIP-L and T5 too", case["network_args"]).to_empty(device="cpu")
    restore(made, groups, "flux1")


def test_a_state_whose_layers_are_not_known_is_not_used() -> None:
    made = network("flux", "default", [])
    names = {one: f"network.{name}" for name, one in made.named_parameters()}
    groups: list[list[nn.Parameter]] = [list(made.parameters())]
    theirs = [list(dict(made.named_parameters()))]
    state = write_state(made, theirs)

    with pytest.raises(RenumberingError, match="is not in that folder"):
        renumber({}, groups, names, "flux1")
    other = {one: name.replace("img_attn", "own_attn") for one, name in names.items()}
    with pytest.raises(RenumberingError, match="the order in which"):
        renumber(state, groups, other, "flux1")
    state["state"][0]["exp_avg"] = torch.zeros(1, 1)
    with pytest.raises(RenumberingError, match="--optimizer_type"):
        renumber(state, groups, names, "flux1")
    with pytest.raises(RenumberingError, match="cannot be read"):
        renumber({"state": {}}, groups, names, "flux1")
