"""Networks of any module behind the trainer's one interface."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modules.errors import CheckpointError, OptionError
from networks.adapter import ForeignNetwork, NormReport, make_network
from networks.metadata import save_network
from networks.options import NetworkOptions
from tests.networks.making import inputs, tiny_dit, wan_network

OURS, FOREIGN = "networks.lora_wan", "tests.networks.foreign_network"
FULL = {"network_args": ("algo=full",)}  # which takes the model's weights away


def options(**changed: Any) -> NetworkOptions:
    values: dict[str, Any] = dict.fromkeys(NetworkOptions.__dataclass_fields__)
    return NetworkOptions(**{**values, "network_alpha": 1.0, "dim_from_weights": False, **changed})


@pytest.mark.parametrize(("module", "given"), [(OURS, {}), (FOREIGN, {}), (FOREIGN, FULL)])
def test_a_network_of_any_module_learns(tmp_path: Path, module: str, given: dict[str, Any]) -> None:
    dit = tiny_dit(tmp_path).train()
    network = make_network(options(network_module=module, network_dim=8, **given), OURS, dit, seed=1)
    groups, names = network.parameter_groups(1e-2)
    optimizer = torch.optim.AdamW(groups)
    network.module.train()
    losses = []
    for step in range(8):
        network.set_dropout_seed(step)
        loss = dit(**inputs(dit)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    assert losses[-1] < 0.95 * losses[0]
    assert names == ["unet"]
    assert groups[0]["lr"] == 1e-2
    assert all(not parameter.requires_grad for parameter in dit.parameters())


@pytest.mark.parametrize("module", [OURS, FOREIGN])
def test_initial_values_and_dropout_follow_the_seeds(tmp_path: Path, module: str) -> None:
    outputs = []
    for noise, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(noise)  # what was drawn before has no influence
        dit = tiny_dit(tmp_path).train()
        network = make_network(
            options(network_module=module, network_dropout=0.3 if module == OURS else None), OURS, dit, seed=1
        )
        with torch.no_grad():
            for parameter in network.module.parameters():
                parameter.add_(0.05)
        network.set_dropout_seed(seed)
        outputs.append(dit(**inputs(dit)))

    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_foreign_module_gets_rank_alpha_and_arguments(tmp_path: Path) -> None:
    made: Any = make_network(
        options(network_module=FOREIGN, network_alpha=3.0, network_args=("algo=a=b",)),
        OURS,
        tiny_dit(tmp_path),
        1,
    )

    assert (made.module.dim, made.module.alpha, made.module.arguments) == (4, 3.0, {"algo": "a=b"})
    made.set_multiplier(0.5)
    assert made.module.multiplier == 0.5


def test_a_model_keeps_the_weights_that_a_network_takes_away(tmp_path: Path) -> None:
    dit = tiny_dit(tmp_path)
    before, expected = {name: tensor.clone() for name, tensor in dit.state_dict().items()}, dit(**inputs(dit))

    make_network(options(network_module=FOREIGN, **FULL), OURS, dit, seed=1)

    assert list(dit.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())
    torch.testing.assert_close(dit(**inputs(dit)), expected)


@pytest.mark.parametrize("wrong", ["NaN", "shape", "names"])
def test_weights_that_do_not_fit_a_foreign_network_are_refused(tmp_path: Path, wrong: str) -> None:
    dit = tiny_dit(tmp_path)
    network = make_network(options(network_module=FOREIGN), OURS, dit, seed=1)
    save_network(network.module, tmp_path / "x.safetensors", None, {})
    tensors = load_file(tmp_path / "x.safetensors")
    if wrong == "names":
        tensors = {f"lora_unet_{name}.diff_b": tensor for name, tensor in tensors.items()}
    else:
        tensors["blocks_1_ffn_0"] = torch.full((256,), torch.nan) if wrong == "NaN" else torch.ones(100)
    save_file(tensors, tmp_path / "x.safetensors")
    expected = {
        "NaN": r"NaN or infinite: blocks_1_ffn_0 \(256 of 256 values\)",
        "shape": r"in 1 of 20 tensors:\n  blocks_1_ffn_0 has \[100\], here \[256\]",
        "names": "has none of this network's 20 tensors, such as blocks_0",
    }

    with pytest.raises(CheckpointError, match=expected[wrong]):
        make_network(
            options(network_module=FOREIGN, network_weights=tmp_path / "x.safetensors"),
            OURS,
            tiny_dit(tmp_path),
            seed=1,
        )


def test_scaling_norms_reports_and_is_refused_where_it_is_not_offered(tmp_path: Path) -> None:
    dit = tiny_dit(tmp_path)
    network = make_network(options(scale_weight_norms=0.5), OURS, dit, seed=1)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.fill_(0.1)

    report = NormReport.of(network.scale_norms(0.5, torch.device("cpu")).tolist())

    assert report.keys_scaled == 20
    assert report.max_norm == pytest.approx(0.5)
    with pytest.raises(OptionError, match="--scale_weight_norms cannot be used"):
        make_network(options(scale_weight_norms=0.5, network_module=FOREIGN), OURS, dit, seed=1)


def test_foreign_modules_report_scaled_norms_as_plain_numbers(tmp_path: Path) -> None:
    class Scaling(torch.nn.Module):
        def apply_max_norm_regularization(
            self, max_norm: float, device: torch.device
        ) -> tuple[int, float, float]:
            return 2, max_norm / 2, max_norm

    network = ForeignNetwork(Scaling(), tiny_dit(tmp_path))

    assert NormReport.of(network.scale_norms(0.5, torch.device("cpu")).tolist()) == NormReport(2, 0.25, 0.5)


def test_dim_from_weights_is_refused_where_the_module_lacks_it(tmp_path: Path) -> None:
    dit = tiny_dit(tmp_path)
    save_network(wan_network(dit), tmp_path / "x.safetensors", None, {})

    with pytest.raises(OptionError, match="--dim_from_weights cannot be used"):
        make_network(
            options(
                network_module=FOREIGN, network_weights=tmp_path / "x.safetensors", dim_from_weights=True
            ),
            OURS,
            dit,
            seed=1,
        )
