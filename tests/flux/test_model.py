"""The FLUX.1 and Chroma transformers against recorded vectors, against diffusers, and against themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flux.configs import ApproximatorConfig
from flux.files import identify, load_dit
from flux.model import Approximator, pack
from modules.errors import CheckpointError
from protocols.loading import Placement
from protocols.steps import Overrides
from runtime.planning.dry_run import allocate_empty_weights, dry_run
from tests.flux.making import in_diffusers, run_there, tiny_inputs, tiny_model
from tests.golden_cases import load_model, read_case
from tests.manifests import tensor_list, write_hollow
from tests.tiny.flux import CONFIGS, tiny_state, write_dit

NEAR = 1e-5  # of the largest value: the same formulas in float32, summed in another order


@pytest.mark.parametrize("case", ["flux_dit_guidance", "flux_dit_noguidance"])
def test_flux_equals_the_recorded_output(case: str) -> None:
    model = load_model(case, load_dit)
    description, stored = read_case(case)
    tolerance = description["tolerance"]["out*"]
    given = (stored["latents"].unsqueeze(2), 1000 * stored["t"], stored["t5"])

    plain = model(*given, None, stored["pooled"], stored.get("guidance"))
    masked = model(*given, stored["t5_mask"], stored["pooled"], stored.get("guidance"))

    assert plain.dtype == torch.float32
    torch.testing.assert_close(pack(stored["latents"].unsqueeze(2)), stored["img"])
    torch.testing.assert_close(pack(plain), stored["out"], **tolerance)
    torch.testing.assert_close(plain.squeeze(2), stored["out_unpacked"], **tolerance)
    torch.testing.assert_close(pack(masked), stored["out_t5_mask"], **tolerance)


def test_chroma_equals_the_recorded_output() -> None:
    model = load_model("chroma_dit", load_dit)
    description, stored = read_case("chroma_dit")
    timesteps = 1000 * stored["t"]

    rows = model.distilled_guidance_layer(timesteps, torch.zeros_like(timesteps))
    velocity = model(stored["latents"].unsqueeze(2), timesteps, stored["t5"], stored["t5_mask"])

    torch.testing.assert_close(rows, stored["mod_vectors"], rtol=0, **description["tolerance"]["mod_vectors"])
    torch.testing.assert_close(pack(velocity), stored["out"], **description["tolerance"]["out"])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lengths", [(5, 3), (9, 8), (4, 4)])
def test_forward_equals_diffusers_with_the_same_weights(kind: str, lengths: tuple[int, ...]) -> None:
    inputs, there = tiny_inputs(kind, lengths), in_diffusers(kind)

    velocity = tiny_model(kind)(**inputs)

    expected = torch.cat([run_there(there, inputs, sample) for sample in range(len(lengths))])
    assert velocity.shape == (2, 16, 1, 6, 8)
    assert (velocity - expected).abs().max() <= NEAR * expected.abs().max()


def test_leaving_the_guidance_out_is_not_a_guidance_of_zero() -> None:
    model, inputs = tiny_model("dev"), tiny_inputs("dev")
    zero = model(**inputs | {"guidance": torch.zeros(2)})

    assert not torch.equal(model(**inputs, overrides=Overrides(embedded_guidance=False)), zero)


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learning"])
def test_the_approximator_has_gradients_if_it_learns(learns: bool) -> None:
    model = tiny_model("chroma").requires_grad_(True)
    model.get_submodule("distilled_guidance_layer").requires_grad_(learns)

    model(**tiny_inputs("chroma")).square().mean().backward()

    grads: dict[str, Any] = {name: one.grad for name, one in model.named_parameters()}
    of_approximator = [grad for name, grad in grads.items() if name.startswith("distilled_guidance_layer")]
    assert of_approximator
    assert all((grad is not None) is learns for grad in of_approximator)
    assert all(grad is not None for name, grad in grads.items() if "linear1" in name)


def test_the_network_of_modulations_can_be_rehearsed() -> None:
    """Every run on a GPU begins with one, in which numbers of the host and of the device must not mix."""
    with torch.device("meta"):
        network = Approximator(ApproximatorConfig(64, 80, 5), rows=30, out_dim=128, eps=1e-6)

    with dry_run() as ledger:
        allocate_empty_weights(network, ledger)
        times = torch.empty(1, device=ledger.device)
        rows = network(times, times)

    assert rows.shape == (1, 30, 128)


def test_a_pruned_model_has_the_blocks_of_its_file(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state("dev", double_blocks=1, single_blocks=2))

    dit = load_dit(path, Placement(torch.device("cpu")))

    assert (dit.config.double_blocks, dit.config.single_blocks, len(dit.single_blocks)) == (1, 2, 2)


@pytest.mark.parametrize("manifest", ["hunyuanvideo-t2v-dit-diffusers", "clip-l-text"])
def test_other_models_are_refused_and_not_claimed(tmp_path: Path, manifest: str) -> None:
    path = write_hollow(tmp_path / "other.safetensors", tensor_list(manifest))

    assert identify(path) is None
    with pytest.raises(CheckpointError, match="is not a FLUX.1 or Chroma transformer; it looks like"):
        load_dit(path, Placement(torch.device("meta")))
