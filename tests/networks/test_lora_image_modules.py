"""Which modules the image families' LoRAs take, with which ranks and learning rates: the recorded lists."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from modules.contract.family import DitSpec
from modules.errors import OptionError
from networks.lora_network import OwnNetwork
from tests.golden_cases import read_case
from tests.manifests import tensor_list
from tests.tiny.loras import make_lora

MODULES: dict[str, Any] = {
    "flux": "lora_flux",
    "chroma": "lora_flux",
    "hunyuan_image": "lora_hunyuan_image",
    "lumina": "lora_lumina",
}
PUBLISHED = {
    "flux": ("flux1-dev-dit", 304),
    "chroma": ("chroma1-dit", 228),
    "hunyuan_image": ("hunyuanimage2.1-dit", 320),
    "lumina": ("lumina2-dit", 180),
}
CLIP = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)
T5 = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
GEMMA = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))


def skeleton(shapes: Mapping[str, tuple[int, ...]], lists: tuple[str, ...] = ()) -> nn.Module:
    """A network with Linear layers of these names, on the meta device."""
    root = nn.Module()
    root.spec = DitSpec(block_lists=lists)  # type: ignore[assignment]
    with torch.device("meta"):
        for path, (rows, columns) in shapes.items():
            *parents, leaf = path.split(".")
            module = root
            for name in parents:
                if not hasattr(module, name):
                    module.add_module(name, nn.Module())
                module = module.get_submodule(name)
            module.add_module(leaf, nn.Linear(columns, rows))
    return root


def dit(family: str, depth: int | None = None) -> nn.Module:
    manifest, _ = PUBLISHED[family]
    shapes = {
        name.removesuffix(".weight"): shape[:2]
        for name, (_, shape) in tensor_list(manifest).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    number = r"(?:blocks|layers)\.(\d+)\."
    kept = {
        path: shape
        for path, shape in shapes.items()
        if depth is None or (found := re.search(number, path)) is None or int(found[1]) < depth
    }
    return skeleton(kept)


def encoder(start: str, endings: tuple[str, ...], depth: int) -> nn.Module:
    paths = [f"{start}.{n}.{ending}" for n in range(depth) for ending in endings]
    return skeleton(dict.fromkeys(paths, (8, 8)), (start,))


def encoders(which: str) -> dict[str, nn.Module]:
    if which == "Gemma2 too":
        return {"lora_te": encoder("layers", GEMMA, 1)}
    if which.startswith("CLIP-L"):
        return {"lora_te1": encoder("encoder.layers", CLIP, 2), "lora_te3": encoder("blocks", T5, 1)}
    return {}


def network(family: str, which: str, arguments: list[str]) -> OwnNetwork:
    pairs = dict(argument.split("=", 1) for argument in arguments)
    texts = encoders(which)
    return make_lora(MODULES[family], 4, 1.0, texts=texts, dit=dit(family, 2), **pairs)


RECORDED = read_case("image_lora_modules")[0]["families"]


@pytest.mark.parametrize(
    ("family", "which"), [(family, which) for family, cases in RECORDED.items() for which in cases]
)
def test_modules_and_ranks_are_the_recorded_ones(family: str, which: str) -> None:
    case = RECORDED[family][which]

    made = network(family, which, case["network_args"])

    assert {name: layer.rank for name, layer in zip(made.names, made.layers, strict=True)} == dict(
        case["modules"]
    )
    if "learning_rates" in case:
        groups, _ = made.parameter_groups(**case["given"])
        names = {id(parameter): name for name, parameter in made.named_parameters()}
        rates = {names[id(one)]: group["lr"] for group in groups for one in group["params"]}
        assert rates == pytest.approx(case["learning_rates"])


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_model_has_the_known_number_of_modules(family: str) -> None:
    made = make_lora(MODULES[family], 1, 1.0, dit(family))

    assert len(made.layers) == PUBLISHED[family][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"train_double_block_indices": "0,19"}, "no block 19"),
        ({"train_single_block_indices": "5-3"}, "write all, none, or numbers"),
        ({"train_blocks": "triple"}, "give one of all, double, single"),
        ({"in_dims": "[1,2]"}, "write 5 ranks"),
        ({"img_attn_dims": "4"}, "Did you mean img_attn_dim"),
        ({"network_reg_dims": "img_attn"}, "is no pair"),
        ({"network_reg_lrs": "(=1e-3"}, "is not a regular expression"),
        ({"ggpo_sigma": "0.1"}, "need each other"),
        ({"split_qkv": "True", "dora_wd": "True"}, "cannot be used together"),
        ({"train_blocks": "single", "single_dim": "0", "single_mod_dim": "0"}, "no module left"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words).replace(r"\ ", " ")):
        make_lora("lora_flux", 4, 1.0, dit("flux"), **arguments)


def test_the_last_pattern_that_fits_counts_and_overlaps_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made = network("flux", "", ["network_reg_dims=img=8,img_attn=2"])

    ranks = dict(zip(made.names, (layer.rank for layer in made.layers), strict=True))
    assert (
        ranks["lora_unet_double_blocks_1_img_attn_qkv"],
        ranks["lora_unet_double_blocks_1_img_mlp_0"],
    ) == (2, 8)
    assert "4 modules fit 'img' and the later 'img_attn', which counts (2)" in caplog.text


def test_each_text_encoder_has_its_learning_rate_and_lora_plus_its_ratio() -> None:
    made = network(
        "flux",
        "CLIP-L and T5",
        ["train_t5xxl=True", "loraplus_unet_lr_ratio=2", "loraplus_text_encoder_lr_ratio=3"],
    )

    groups, names = made.parameter_groups(1.0, text_encoder_lr=[0.5, 0.25])

    rates = {name: group["lr"] for name, group in zip(names, groups, strict=True)}
    assert rates == {
        **{"unet": 1.0, "unet plus": 2.0},
        **{"lora_te1": 0.5, "lora_te1 plus": 1.5, "lora_te3": 0.25, "lora_te3 plus": 0.75},
    }


def test_a_part_with_learning_rate_0_is_not_trained() -> None:
    made = network("flux", "CLIP-L", [])

    _, names = made.parameter_groups(1.0, text_encoder_lr=[0.0])

    assert names == ["unet"]
