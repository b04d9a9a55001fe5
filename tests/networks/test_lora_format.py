"""LoRA files of each --lora_format: read back to the bit, what they cannot hold, their metadata."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoints.opening import open_checkpoint
from modules.errors import OptionError
from networks.convert import convert_file
from networks.loading import read_lora
from networks.lora_format import LoraFormat, select_format
from networks.metadata import describe_lora
from networks.module_names import FAMILIES, family_named
from networks.names.layouts import COMFYUI, DIFFUSERS, KNOWN, FamilyNames
from networks.options import NetworkOptions
from tests.networks.test_read_by_comfyui import MODELS, places_of, read
from tests.tiny.dits import DITS, TinyDit, dit_called
from tests.tiny.loras import lora_like, make_lora

FORMATS = (KNOWN, COMFYUI, DIFFUSERS)
ONE_EACH = [one for one in DITS if "edit" not in one.name and one.name not in {"ltx_2 2.0", "ltx_2 2.3"}]
TEXTS = {"lora_te1": "clip_l", "lora_te3": "t5"}


def names_of(tiny: TinyDit) -> FamilyNames:
    return next(one for one in FAMILIES if one.network_module == f"networks.{tiny.lora}")


def save(network: nn.Module, folder: Path, name: str, family: FamilyNames, **more: str) -> Path:
    """Write a network's file as a training does, in bfloat16."""
    path = folder / f"{name}.safetensors"
    metadata = {"ss_base_model_version": family.name, **more}
    LoraFormat(name, family).save(network, path, torch.bfloat16, metadata)
    return path


def loaded(tiny: TinyDit, dit: nn.Module, path: Path, **arguments: Any) -> dict[str, Tensor]:
    """The tensors of a new network that starts from a file (--network_weights)."""
    network = make_lora(tiny.lora, 4, 2.0, dit, **arguments)
    network.load_weights(path)
    return network.state_dict()


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


CASES: list[tuple[TinyDit, dict[str, Any]]] = [
    *((tiny, {}) for tiny in ONE_EACH),
    *((tiny, {"split_qkv": "True"}) for tiny in ONE_EACH if tiny.lora in {"lora_flux", "lora_lumina"}),
    (dit_called("flux dev"), {"img_attn_dim": "8"}),  # two ranks, so that alpha / rank differs
]


@pytest.mark.parametrize(("tiny", "arguments"), CASES, ids=lambda one: getattr(one, "name", ""))
def test_a_file_of_every_format_is_the_same_network_to_the_bit(
    tmp_path: Path, tiny: TinyDit, arguments: dict[str, Any]
) -> None:
    """alpha / rank is a power of two."""
    dit, network = tiny.with_lora(2, **arguments)
    family = names_of(tiny)
    files = {name: save(network, tmp_path, name, family) for name in FORMATS}

    expected = loaded(tiny, dit, files[KNOWN], **arguments)

    assert any(name.endswith(".alpha") for name in load_file(files[KNOWN]))
    for name in (COMFYUI, DIFFUSERS):
        found = loaded(tiny, dit, files[name], **arguments)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert metadata_of(files[name])["ss_lora_format"] == name


def test_keys_and_values_that_were_stacked_come_back_with_the_rank_of_each(tmp_path: Path) -> None:
    tiny = dit_called("fibo_2")
    dit, network = tiny.with_lora(1)
    path = save(network, tmp_path, COMFYUI, names_of(tiny))
    cross = "perceiver.layers.0.cross_attention"

    assert load_file(path)[f"diffusion_model.{cross}.to_kv.lora_A.weight"].shape[0] == 2 * 4

    found = loaded(tiny, dit, path)
    for part in ("to_k", "to_v"):
        name = f"lora_unet_{cross}.{part}".replace(".", "_") + ".lora_down.weight"
        assert torch.equal(found[name], network.state_dict()[name].bfloat16().float())


@pytest.mark.parametrize("name", [COMFYUI, DIFFUSERS])
def test_an_alpha_that_is_no_power_of_two_of_the_rank_comes_back_rounded(tmp_path: Path, name: str) -> None:
    tiny = dit_called("wan t2v")
    dit = tiny.make(1)
    network = make_lora(tiny.lora, 6, 1.0, dit)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    path = tmp_path / "lora.safetensors"
    LoraFormat(name, names_of(tiny)).save(network, path, None, {"ss_base_model_version": "wan"})

    fresh = make_lora(tiny.lora, 6, 1.0, dit)
    fresh.load_weights(path)

    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[key], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "name", "start", "count"),
    [
        ("wan t2v", KNOWN, "lora_unet_blocks_0_", 3),
        ("wan t2v", COMFYUI, "diffusion_model.blocks.0.", 2),
        ("wan t2v", DIFFUSERS, "transformer.blocks.0.attn1.", 2),
        ("hunyuan t2v", COMFYUI, "diffusion_model.double_blocks.0.img_attn_qkv.", 2),
        ("hunyuan_image", COMFYUI, "lora_unet_double_blocks_0_img_attn_qkv.", 3),
        ("z_image", COMFYUI, "diffusion_model.layers.0.attention.to_q.", 2),
        ("flux dev", COMFYUI, "transformer.transformer_blocks.0.attn.to_q.", 2),
        ("flux_2", COMFYUI, "diffusion_model.double_blocks.0.img_attn.qkv.", 2),
        ("krea2", COMFYUI, "diffusion_model.blocks.0.attn.wq.", 2),
        ("krea2", DIFFUSERS, "transformer.transformer_blocks.0.attn.to_q.", 2),
        ("ltx_2 2.5", COMFYUI, "diffusion_model.transformer_blocks.0.attn1.to_q.", 2),
        ("framepack", DIFFUSERS, "transformer.transformer_blocks.0.attn.to_q.", 2),
    ],
)
def test_names_are_those_of_the_tool(tmp_path: Path, family: str, name: str, start: str, count: int) -> None:
    tiny = dit_called(family)
    _, network = tiny.with_lora(2)

    tensors = load_file(save(network, tmp_path, name, names_of(tiny)))

    module = (
        next(key for key in tensors if key.startswith(start)).partition(".lora_")[0].removesuffix(".alpha")
    )
    assert sum(key.startswith(f"{module}.") for key in tensors) == count
    assert len(tensors) % count == 0
    known = f"{family} {name}" == "hunyuan_image comfyui" or name == KNOWN
    assert any(key.endswith(".alpha") for key in tensors) == known


IN_COMFYUI = {
    **{"wan": "wan t2v", "hunyuan_video": "hunyuan t2v", "hunyuan_image": "hunyuan_image"},
    **{"flux": "flux dev", "chroma": "flux chroma", "lumina": "lumina", "flux_2": "flux_2"},
    **{"ltx_2": "ltx_2 2.0", "qwen_image": "qwen_image", "krea2": "krea2", "z_image": "z_image"},
}


@pytest.mark.parametrize("kind", ["", "loha", "lokr"])
@pytest.mark.parametrize("name", IN_COMFYUI)
@torch.no_grad()
def test_comfyui_reads_a_file_of_its_format_whole(tmp_path: Path, name: str, kind: str) -> None:
    """By its rule: see test_read_by_comfyui.py. Neither the default names of some families, see there."""
    tiny, model = dit_called(IN_COMFYUI[name]), MODELS[name]
    dit = tiny.make(2)
    network = make_lora(kind or tiny.lora, 4, 2.0, dit)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path / "lora.safetensors"
    LoraFormat(COMFYUI, names_of(tiny)).save(network, path, None, {"ss_base_model_version": name})
    state = dit.state_dict()
    known = tmp_path / "known.safetensors"
    LoraFormat(KNOWN, names_of(tiny)).save(network, known, None, {"ss_base_model_version": name})

    there = model.there(state)
    found = read(load_file(path), places_of(there, model.is_hunyuan, model.parts(there)), there)

    assert found.unread == set()
    changes = read(load_file(known), places_of(state), state).changes
    assert changes
    for key, change in model.there(
        {**{one: torch.zeros_like(two) for one, two in state.items()}, **changes}
    ).items():
        torch.testing.assert_close(
            found.changes.get(key, torch.zeros_like(change)), change, rtol=1e-4, atol=2e-5
        )


def test_a_file_that_another_tool_has_changed_is_read_as_it_is(tmp_path: Path) -> None:
    tiny = dit_called("wan t2v")
    _, network = tiny.with_lora(1)
    path = save(network, tmp_path, COMFYUI, names_of(tiny))
    metadata, tensors = metadata_of(path), load_file(path)
    assert json.loads(metadata["reelsmith_folded"]) == {"4": 0.5}
    save_file({name: tensor.float() for name, tensor in tensors.items()}, path, metadata)

    lora = read_lora(path)

    assert all(float(one) == 4 for name, one in lora.tensors.items() if name.endswith(".alpha"))
    assert "reelsmith_folded" not in lora.metadata


@pytest.mark.parametrize("value", ["", "[]", '{"4": "x"}', '{"4": NaN}', '{"4": -1}', '{"x": 1}', "{" * 2000])
def test_what_the_metadata_say_of_alphas_may_be_nonsense(tmp_path: Path, value: str) -> None:
    tiny = dit_called("wan t2v")
    _, network = tiny.with_lora(1)
    path = save(network, tmp_path, COMFYUI, names_of(tiny))
    save_file(load_file(path), path, {**metadata_of(path), "reelsmith_folded": value})

    lora = read_lora(path)

    assert all(float(one) == 4 for name, one in lora.tensors.items() if name.endswith(".alpha"))


def test_a_description_has_the_alpha_that_was_trained_with(tmp_path: Path) -> None:
    tiny = dit_called("wan t2v")
    _, network = tiny.with_lora(1)
    with open_checkpoint(save(network, tmp_path, DIFFUSERS, names_of(tiny))) as file:
        assert "rank 4, alpha 2, 10 layers" in (describe_lora(file) or "")


@pytest.mark.parametrize("name", FORMATS)
def test_a_converted_file_says_the_format_that_it_has(tmp_path: Path, name: str) -> None:
    tiny = dit_called("z_image")
    _, network = tiny.with_lora(1)
    path = save(network, tmp_path, name, names_of(tiny))

    for target, expected in (("default", KNOWN), ("other", COMFYUI), ("diffusers", DIFFUSERS)):
        convert_file(path, tmp_path / "there" / "x.safetensors", target)
        metadata = metadata_of(tmp_path / "there" / "x.safetensors")
        assert metadata["ss_lora_format"] == expected
        assert "reelsmith_folded" not in metadata


def test_alphas_come_back_in_a_converted_file(tmp_path: Path) -> None:
    tiny = dit_called("flux_2")
    _, network = tiny.with_lora(1)
    files = [save(network, tmp_path, name, names_of(tiny)) for name in (KNOWN, DIFFUSERS)]

    convert_file(files[1], tmp_path / "back.safetensors", "default")

    saved, back = load_file(files[0]), load_file(tmp_path / "back.safetensors")
    assert saved.keys() == back.keys()
    assert all(torch.equal(back[name].float(), tensor.float()) for name, tensor in saved.items())


def options(**given: Any) -> NetworkOptions:
    return replace(NetworkOptions.from_defaults(), **given)


DORA = ("dora_wd=True",)


@pytest.mark.parametrize(
    ("family", "name", "module", "arguments", "texts", "words"),
    [
        ("framepack", COMFYUI, "", (), {}, "ComfyUI has no FramePack, so that it has no names"),
        ("wan", COMFYUI, "", DORA, {}, "divides the magnitudes of a DoRA by the norms of the frozen weights"),
        ("ltx2_v1", DIFFUSERS, "", DORA, {}, "diffusers leaves the magnitudes of LTX-2's DoRAs out"),
        ("wan", DIFFUSERS, "networks.loha", (), {}, "diffusers cannot read a LoHa for this model"),
        ("flux_2", DIFFUSERS, "networks.loha", (), {}, "diffusers cannot read a LoHa for this model"),
        ("qwen_image", DIFFUSERS, "networks.lokr", (), {}, "diffusers cannot read a LoKr for this model"),
        ("flux", DIFFUSERS, "", (), TEXTS, "cannot load LoRAs for the text encoder t5"),
        (
            "sdxl",
            DIFFUSERS,
            "",
            DORA,
            {"lora_te1": "text_encoder"},
            "cannot load DoRA magnitudes",
        ),
        ("lumina", DIFFUSERS, "", (), {"lora_te": "gemma2"}, "cannot load LoRAs for the text encoder gemma2"),
        (
            "wan",
            COMFYUI,
            "lycoris.kohya",
            (),
            {},
            "files of --network_module lycoris.kohya have that package",
        ),
        (
            "wan",
            DIFFUSERS,
            "lycoris.kohya",
            (),
            {},
            "files of --network_module lycoris.kohya have that package",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(
    family: str, name: str, module: str, arguments: tuple[str, ...], texts: dict[str, str], words: str
) -> None:
    module = module or "networks.lora"

    with pytest.raises(OptionError, match=f"^--lora_format {name}: .*{words}.*Use --lora_format known"):
        select_format(options(lora_format=name, network_args=arguments), family, module, texts)


@pytest.mark.parametrize(
    ("family", "name", "module", "arguments", "texts"),
    [
        ("wan", DIFFUSERS, "", DORA, {}),
        ("flux_2", DIFFUSERS, "networks.lokr", (), {}),
        ("z_image", DIFFUSERS, "networks.lokr", (), {}),
        ("hunyuan_video", COMFYUI, "networks.loha", (), {}),
        ("flux", DIFFUSERS, "", (), {"lora_te1": "clip_l"}),
        ("flux", COMFYUI, "", (), TEXTS),
        ("lumina", COMFYUI, "", (), {"lora_te": "gemma2"}),
        ("framepack", DIFFUSERS, "", (), {}),
        ("wan", KNOWN, "networks.loha", (), {}),
    ],
)
def test_what_a_format_holds_is_not_refused(
    family: str, name: str, module: str, arguments: tuple[str, ...], texts: dict[str, str]
) -> None:
    asked = options(lora_format=name, network_args=arguments)

    found = select_format(asked, family, module or "networks.lora", texts)

    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    ("family", "module", "arguments", "expected"),
    [
        *(
            (one.name, "networks.lora", (), KNOWN)
            for one in FAMILIES
            if one.name not in {"hidream_o1", "ltx_2", "moss_image"}
        ),
        *((name, "networks.lora", (), COMFYUI) for name in ("hidream_o1", "moss_image")),  # as published ones
        *((name, "networks.lora", (), COMFYUI) for name in ("ltx_2", "ltx2_v1")),
        *(("ltx_2", f"networks.{kind}", (), COMFYUI) for kind in ("loha", "lokr")),
        ("ltx_2", "networks.lora", DORA, KNOWN),
        ("ltx_2", "lycoris.kohya", (), None),
    ],
)
def test_without_the_option_only_ltx_2_has_the_names_of_its_official_code(
    family: str,
    module: str,
    arguments: tuple[str, ...],
    expected: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")

    found = select_format(options(network_args=arguments), family, module, {})

    assert (None if found is None else found.name) == expected
    assert ("(--lora_format known): ComfyUI divides" in caplog.text) == bool(arguments)


def test_a_layer_that_a_format_cannot_hold_is_refused_before_the_first_step() -> None:
    """Its halves stand the other way round in diffusers."""
    dit = dit_called("flux_2").make(1)
    module = "lora_unet_final_layer_adaLN_modulation_1"
    rows, columns = dit.get_submodule("final_layer.adaLN_modulation.1").weight.shape
    begun = {f"{module}.lokr_w1": torch.ones(2, 2), f"{module}.lokr_w2": torch.ones(rows // 2, columns // 2)}
    network = lora_like("lokr", begun, dit)  # as of --dim_from_weights

    with pytest.raises(
        OptionError, match=r"diffusers cannot store 1 of .*final_layer.*Use --lora_format known"
    ):
        LoraFormat(DIFFUSERS, family_named("flux_2")).check(network)
