"""LoRAs of every dialect that is around change the same weights in the same way."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from flux_3.names import FLUX_3
from networks.builtin_modules import OWN_MODULES
from networks.lora_format import LoraFormat
from networks.names.layouts import KNOWN
from tests.flux_3.making import tiny_model
from tests.tiny.flux_3 import tiny_state, write_dit
from tests.tiny.loras import make_lora

State = dict[str, Tensor]


def with_alphas(state: State) -> State:
    """With the rank as alpha, which changes nothing."""
    ranks = {name: factor.shape[0] for name, factor in state.items() if name.endswith("lora_A.weight")}
    alphas = {
        name.replace("lora_A.weight", "alpha"): torch.tensor(float(rank)) for name, rank in ranks.items()
    }
    return {**state, **alphas}


def renamed(*pairs: tuple[str, str]) -> Callable[[State], State]:
    def rename(state: State) -> State:
        renamed_state = {}
        for name, tensor in state.items():
            for old, new in pairs:
                name = name.replace(old, new, 1)
            renamed_state[name] = tensor
        return renamed_state

    return rename


PEFT = "base_model.model."
# name -> --target of the file that it is made from, and the change
DIALECTS: dict[str, tuple[str, Callable[[State], State]]] = {
    "released": ("other", dict),
    "with alphas": ("other", with_alphas),
    "down and up": ("other", renamed(("lora_A", "lora_down"), ("lora_B", "lora_up"))),
    "PEFT, released names": ("other", renamed(("diffusion_model.", PEFT))),
    "diffusers": ("diffusers", dict),
    "PEFT": ("diffusers", renamed(("transformer.", PEFT))),
    "bare": ("diffusers", renamed(("transformer.", ""))),
}


@torch.no_grad()
def test_every_dialect_changes_the_same_weights(tmp_path: Path) -> None:
    assert "networks.lora_flux_3" in OWN_MODULES
    dit = write_dit(tmp_path, tiny_state())
    network = make_lora("lora_flux_3", 4, 2.0, tiny_model())
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    ours = tmp_path / "ours.safetensors"
    LoraFormat(KNOWN, FLUX_3).save(network, ours, None, {"ss_base_model_version": FLUX_3.name})

    def merged(lora: Path) -> State:
        made = tmp_path / "merged.safetensors"
        made.unlink(missing_ok=True)
        words = ["--dit", dit, "--lora_weight", lora, "--save_merged_model", made]
        merge_lora.main([str(word) for word in words])
        return load_file(made)

    expected = merged(ours)
    before = load_file(dit)
    assert sum(not torch.equal(before[name], weight) for name, weight in expected.items()) == 54
    for name, (target, change) in DIALECTS.items():
        converted = tmp_path / f"{target}.safetensors"
        convert_lora.main(["--input", str(ours), "--output", str(converted), "--target", target])
        save_file(change(load_file(converted)), tmp_path / "changed.safetensors")
        for key, weight in merged(tmp_path / "changed.safetensors").items():
            torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}", rtol=0, atol=1e-6)
        converted.unlink()
