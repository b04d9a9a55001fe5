"""LoRAs of LTX-2: modules by preset, dialects both ways, and what diffusers makes of our files."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_2.checkpoints import FORMAT
from ltx_2.configs import DIT, LORA_PRESETS
from ltx_2.model import LtxModel
from modules.contract.loading import Placement
from networks.apply import LoraPatch
from networks.loading import LoraUse, read_lora
from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from tests.faults.messages import succeed_here
from tests.ltx_2.test_model import assert_both, in_diffusers
from tests.ltx_2.tiny_dit import dit_in_diffusers, dit_inputs, dit_state, tiny_dit, write_dit
from tests.tiny.loras import make_lora

VIDEO, SOUND = {"attn1", "attn2"}, {"audio_attn1", "audio_attn2"}
CROSS = {"audio_to_video_attn", "video_to_audio_attn"}
OF_PRESETS = {
    "t2v": VIDEO | SOUND | CROSS,
    "video_sa": {"attn1"},
    "video_sa_ff": {"attn1", "ff"},
    "video_sa_ca_ff": VIDEO | {"ff"},
    "audio": SOUND | {"audio_ff"},
    "audio_v2a": SOUND | {"audio_ff", "video_to_audio_attn"},
    "full": VIDEO | SOUND | CROSS | {"ff", "audio_ff"},
}
LINEARS = {"to_q", "to_k", "to_v", "to_out_0"}


def make_network(dit: LtxModel, preset: str = "full", **arguments: Any) -> OwnNetwork:
    """A LoRA with random factors."""
    dit.spec = replace(DIT, lora_choice=LORA_PRESETS[preset])
    network = make_lora("lora_ltx2", 4, 2.0, dit, **arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def modules_of(network: OwnNetwork) -> list[tuple[str, str]]:
    """(attention or feed-forward, its layer) of each module."""
    pattern = re.compile(r"lora_unet_transformer_blocks_\d+_(.*?(?:attn\d?|ff))_(.*)")
    return [pattern.fullmatch(name).groups() for name in network.names]  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("preset", LORA_PRESETS)
def test_a_preset_is_for_the_modules_of_its_streams(preset: str) -> None:
    found = modules_of(make_network(tiny_dit(), preset))

    assert {name for name, _ in found} == OF_PRESETS[preset]
    gates = {"to_gate_logits"} if preset == "full" else set()
    assert {layer for name, layer in found if "attn" in name} == LINEARS | gates
    assert {layer for name, layer in found if name.endswith("ff")} <= {"net_0_proj", "net_2"}
    if preset == "t2v":  # the preset that is not asked for
        assert found == modules_of(make_lora("lora_ltx2", 4, 2.0, tiny_dit()))


@pytest.fixture(params=["2.0", "2.3", "2.3 dora"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, tuple[Tensor, ...]]:
    """A version, the file of a LoRA, and what the network predicts with it."""
    version, _, kind = request.param.partition(" ")
    dit = tiny_dit(version)
    network = make_network(dit, dora_wd=bool(kind))
    path = tmp_path / "lora.safetensors"
    save_network(network, path, None, {"ss_base_model_version": "ltx_2"})
    network.attach()
    with torch.no_grad():
        return version, path, dit(**dit_inputs(version))


def convert(path: Path, target: str) -> Path:
    output = path.with_name(f"{target}.safetensors")
    words = ["--input", path, "--output", output, "--target", target]
    succeed_here("convert_lora.py", *words, folder=path.parent)
    return output


@torch.no_grad()
def test_diffusers_pipeline_predicts_with_a_converted_file_what_the_network_does(
    saved: tuple[str, Path, tuple[Tensor, ...]],
) -> None:
    version, path, expected = saved
    given, theirs = dit_inputs(version), dit_in_diffusers(version, dit_state(version))
    plain = in_diffusers(theirs, given)
    pipeline = LTX2Pipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, transformer=theirs, vocoder=None)

    # diffusers leaves out the magnitudes of a DoRA under ComfyUI's names
    has_magnitudes = any(name.endswith("dora_scale") for name in load_file(path))
    for target in ("diffusers",) if has_magnitudes else ("diffusers", "other"):
        pipeline.load_lora_weights(load_file(convert(path, target)))
        assert_both(expected, in_diffusers(theirs, given))
        pipeline.unload_lora_weights()

    assert not torch.allclose(plain[0], expected[0], rtol=1e-2)


@pytest.mark.parametrize(
    ("dialect", "start"),
    [("other", "diffusion_model."), ("diffusers", "transformer."), ("kohya", "lora_unet_model_")],
)
@torch.no_grad()
def test_every_dialect_merged_predicts_what_the_network_does(
    saved: tuple[str, Path, tuple[Tensor, ...]], dialect: str, start: str
) -> None:
    version, path, expected = saved
    written = path.with_name("there.safetensors")
    if dialect == "kohya":  # as the known trainer for LTX-2 names them
        save_file({name.replace("lora_unet_", start): one for name, one in load_file(path).items()}, written)
    else:
        written = convert(path, dialect)
    assert all(name.startswith(start) for name in load_file(written))
    back = convert(written, "default")

    for each in (written, back):
        patch = LoraPatch([LoraUse(read_lora(each), 1.0)])
        model = write_dit(path.parent / "model", version, "official")
        dit = FORMAT.load(model, Placement(torch.device("cpu"), patch=patch))
        assert_both(dit(**dit_inputs(version)), expected)


def test_a_lora_is_merged_into_the_official_file(saved: tuple[str, Path, tuple[Tensor, ...]]) -> None:
    version, path, expected = saved
    model = write_dit(path.parent, version, "official")
    words = ["--dit", model, "--lora_weight", path, "--save_merged_model", "merged.safetensors"]

    succeed_here("merge_lora.py", *words, folder=path.parent)

    with torch.no_grad():
        dit = FORMAT.load(path.parent / "merged.safetensors", Placement(torch.device("cpu")))
        assert_both(dit(**dit_inputs(version)), expected)
