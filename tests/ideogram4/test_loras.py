"""LoRAs of every dialect that is around change the same weights in the same way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_pipeline import Ideogram4LoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from modules.errors import CheckpointError
from tests.ideogram4.making import CONFIG, in_diffusers, write_lora
from tests.tiny import fibo_2, lumina
from tests.tiny.hunyuan_encoders import save
from tests.tiny.ideogram4 import in_diffusers_names, tiny_state

State = dict[str, Tensor]
FUSED = ("attention.qkv", "attention.o", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
SPLIT = (*(f"attention.to_{name}" for name in ("q", "k", "v", "out.0")), *FUSED[2:])
RANK, ALPHA = 4, 2.0


def rename(*pairs: tuple[str, str]) -> Callable[[State], State]:
    def renamed(state: State) -> State:
        found = {}
        for name, tensor in state.items():
            for old, new in pairs:
                name = name.replace(old, new, 1)
            found[name] = tensor
        return found

    return renamed


def with_alphas(state: State) -> State:
    """As OneTrainer's first files: split names, down and up, an alpha that is not folded in."""
    found = rename(("lora_A", "lora_down"), ("lora_B", "lora_up"))(state)
    for name in [name for name in found if name.endswith(".lora_up.weight")]:
        found[name] = found[name] * (RANK / ALPHA)
        found[name.replace("lora_up.weight", "alpha")] = torch.tensor(ALPHA)
    return found


# name -> --target of the file that it is made from, and the change
DIALECTS: dict[str, tuple[str, Callable[[State], State]]] = {
    "ComfyUI, ai-toolkit": ("other", dict),
    "diffusers": ("diffusers", dict),
    "musubi-tuner": ("default", dict),
    "OneTrainer of June": ("diffusers", with_alphas),
    "SimpleTuner": ("other", rename(("diffusion_model.", "transformer."))),
    "of the first network": ("diffusers", rename(("transformer.", "conditional_transformer."))),
    "PEFT": ("diffusers", rename(("transformer.", "base_model.model."))),
    "PEFT with default": (
        "diffusers",
        rename(
            ("transformer.", "base_model.model."),
            ("lora_A.", "lora_A.default."),
            ("lora_B.", "lora_B.default."),
        ),
    ),
}


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A LoRA with the names that other LoRA trainers have."""
    return write_lora(tmp_path / "ours.safetensors", RANK, ALPHA)


def convert(lora: Path, target: str) -> Path:
    path = lora.with_name(f"{lora.stem} {target}.safetensors")
    path.unlink(missing_ok=True)
    convert_lora.main(["--input", str(lora), "--output", str(path), "--target", target])
    return path


def merge(dit: Path, lora: Path) -> State:
    path = lora.with_name("merged.safetensors")
    path.unlink(missing_ok=True)
    words = ["--dit", dit, "--lora_weight", lora, "--save_merged_model", path]
    merge_lora.main([str(word) for word in words])
    return load_file(path)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_changes_the_same_weights(known: Path, tmp_path: Path, name: str) -> None:
    """And a file without metadata is told by its names and sizes alone."""
    before = tiny_state()
    dit = save(tmp_path / "dit.safetensors", before)
    expected = merge(dit, known)
    changed = [key for key, weight in expected.items() if not torch.equal(before[key], weight)]
    assert len(changed) == len(FUSED) * CONFIG.num_layers
    target, change = DIALECTS[name]
    path = tmp_path / "changed.safetensors"
    state = change(load_file(convert(known, target)))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)

    for key, weight in merge(dit, path).items():
        torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}", rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "prefix", "layers"),
    [("other", "diffusion_model.", FUSED), ("diffusers", "transformer.", SPLIT)],
)
def test_other_tools_get_names_that_they_read(
    known: Path, target: str, prefix: str, layers: tuple[str, ...]
) -> None:
    """Fused for ComfyUI, split for diffusers, which both know no alpha."""
    assert set(load_file(convert(known, target))) == {
        f"{prefix}layers.{block}.{layer}.lora_{letter}.weight"
        for block in range(CONFIG.num_layers)
        for layer in layers
        for letter in "AB"
    }


def test_our_own_names_are_those_of_musubi_tuner(known: Path) -> None:
    assert set(load_file(known)) == {
        f"lora_unet_layers_{block}_{layer.replace('.', '_')}.{part}"
        for block in range(CONFIG.num_layers)
        for layer in FUSED
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }


def test_an_alpha_that_only_the_metadata_have_is_used(known: Path, tmp_path: Path) -> None:
    """As diffusers' example saves it: rank 16 and its default alpha of 4 are a fourth of the strength."""
    dit = save(tmp_path / "dit.safetensors", tiny_state())
    path = tmp_path / "example.safetensors"
    adapter = {"transformer.r": RANK, "transformer.lora_alpha": RANK / 4}
    state = load_file(convert(known, "diffusers"))
    save_file(state, path, {"lora_adapter_metadata": json.dumps(adapter)})
    key = "layers.0.feed_forward.w1.weight"
    before = tiny_state()[key]

    torch.testing.assert_close(merge(dit, path)[key] - before, (merge(dit, known)[key] - before) / 4)


@pytest.mark.parametrize("target", ["other", "diffusers"])
@torch.no_grad()
def test_diffusers_loads_every_module(known: Path, target: str) -> None:
    """The network changes as by our merge."""
    there = in_diffusers(tiny_state())
    state = Ideogram4LoraLoaderMixin.lora_state_dict(convert(known, target))
    Ideogram4LoraLoaderMixin.load_lora_into_transformer(state, there)
    there.fuse_lora()
    there.unload_lora()
    merged = in_diffusers_names(merge(save(known.with_name("dit.safetensors"), tiny_state()), known))
    for name, weight in there.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-5)


def test_what_ai_toolkit_trains_besides_is_read(tmp_path: Path) -> None:
    """The modulation of the blocks."""
    dit = save(tmp_path / "dit.safetensors", tiny_state())
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(4, 24, generator=generator), torch.randn(384, 4, generator=generator)
    start = "diffusion_model.layers.1.adaln_modulation"
    path = save(
        tmp_path / "toolkit.safetensors", {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    )
    key = "layers.1.adaln_modulation.weight"
    torch.testing.assert_close(merge(dit, path)[key], tiny_state()[key] + up @ down)


def test_a_lokr_of_lycoris_is_read(tmp_path: Path) -> None:
    dit = save(tmp_path / "dit.safetensors", tiny_state())
    generator = torch.Generator().manual_seed(1)
    small, large = torch.randn(8, 8, generator=generator), torch.randn(36, 12, generator=generator)
    start = "lycoris_layers_0_attention_qkv"
    path = save(
        tmp_path / "lokr.safetensors",
        {f"{start}.lokr_w1": small, f"{start}.lokr_w2": large, f"{start}.alpha": torch.tensor(1e9)},
    )
    key = "layers.0.attention.qkv.weight"
    torch.testing.assert_close(merge(dit, path)[key], tiny_state()[key] + torch.kron(small, large))


@pytest.mark.parametrize("family", [fibo_2, lumina], ids=["Fibo", "Lumina"])
def test_a_lora_does_not_fit_another_model_with_blocks_of_that_name(
    known: Path, tmp_path: Path, family: object
) -> None:
    other = save(tmp_path / "other.safetensors", family.tiny_state())  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError):
        merge(other, known)


def test_metadata_name_the_model(known: Path) -> None:
    with safe_open(convert(known, "other"), "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "ideogram4"
