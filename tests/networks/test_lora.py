"""The LoRA network on Wan: fidelity, which modules take part, dropout, gradients, saving and loading."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modules.errors import CheckpointError, OptionError
from networks.lora_layer import Dropouts, LoraLayer
from networks.metadata import save_network
from protocols.family import DitSpec
from tests.golden_cases import make_input, read_case
from tests.networks import making
from tests.tiny.loras import lora_like, make_lora


@pytest.mark.parametrize(
    ("case", "joins"),
    [("wan_lora_t2v", False), ("wan_lora_t2v", True), ("wan_lora_i2v", True)],
)
def test_forward_loss_and_gradients_equal_the_recorded_ones(case: str, joins: bool) -> None:
    description, tensors = read_case(case)
    settings = description["lora"]
    dit = making.golden_dit(description)
    network = make_lora("lora_wan", settings["rank"], settings["alpha"], dit)
    network.set_multiplier(settings["multiplier"])
    assert [[name, list(t.shape), str(t.dtype)[6:]] for name, t in network.state_dict().items()] == settings[
        "tensors"
    ]
    making.golden_lora(network, settings["weights_model_key"], settings["lora_up_extra_scale"])
    network.attach()
    if joins:
        making.join_all(network)
    sigmas = torch.tensor(description["t_in_0_1"]).view(-1, 1, 1, 1, 1)
    noisy = (1 - sigmas) * tensors["latents"] + sigmas * tensors["noise"]
    image = None
    if "y" in tensors:
        noisy = torch.cat([noisy, tensors["y"]], dim=1)
        rule = description["inputs_by_rule"]["clip_fea"]
        image = make_input(case, "clip_fea", rule["shape"], rule["scale"])

    out = dit(noisy, tensors["timesteps"], [tensors["context_0"], tensors["context_1"]], image)
    loss = nn.functional.mse_loss(out, tensors["noise"] - tensors["latents"])
    loss.backward()

    torch.testing.assert_close(out, tensors["out"], **description["tolerance"]["out"])
    making.assert_recorded(making.own_gradients(network), dit, loss, description, tensors)


@pytest.mark.parametrize(
    "which", ["default", "exclude_ffn", "include_norm_modulation_head", "only_self_attn_q"]
)
def test_patterns_choose_the_recorded_modules(which: str) -> None:
    description, _ = read_case("lora_merge_convert")
    expected = description["module_lists"][which]

    network = make_lora("lora_wan", 4, 2.0, making.golden_dit(description), **expected["network_args"])

    assert list(dict.fromkeys(name.partition(".")[0] for name in network.state_dict())) == expected["modules"]


@pytest.mark.parametrize("arguments", [{"dropout": 0.3}, {"rank_dropout": "0.3"}, {"module_dropout": "0.5"}])
def test_dropout_follows_the_seed_and_rests_in_eval_mode(tmp_path: Path, arguments: dict[str, float]) -> None:
    dit = making.tiny_dit(tmp_path)
    network = making.wan_network(dit, **arguments)
    network.attach()
    outputs = []
    for seed in (1, 1, 2):
        network.train()
        network.set_dropout_seed(seed)
        outputs.append(dit(**making.inputs(dit)))

    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    network.eval()
    assert not torch.equal(dit(**making.inputs(dit)), outputs[0])


def test_rank_dropout_drops_whole_ranks_of_a_sample() -> None:
    linear = nn.Linear(8, 8)
    layer = LoraLayer(linear, 4, 4.0)
    with torch.no_grad():
        layer.lora_down.weight.copy_(torch.eye(4, 8))
        layer.lora_up.weight.copy_(torch.eye(8, 4))
    layer.dropouts, layer.index = Dropouts(rank=0.5), 0
    layer.seed.value = 3

    change = layer(torch.ones(2, 16, 8)) - linear(torch.ones(2, 16, 8))

    ranks = change[:, :, :4]
    assert torch.equal(ranks, ranks[:, :1].expand_as(ranks))
    assert set(ranks.round(decimals=4).unique().tolist()) <= {0.0, 2.0}


def test_dropout_keeps_the_mean_in_bf16_too() -> None:
    layer = LoraLayer(nn.Linear(8, 8, bias=False), 8, 8.0)
    with torch.no_grad():
        layer.lora_down.weight.copy_(torch.eye(8))
        layer.lora_up.weight.copy_(torch.eye(8))
    layer.dropouts, layer.index = Dropouts(neuron=0.1), 0
    layer.to(torch.bfloat16)
    x = torch.rand(1, 20_000, 8, generator=torch.Generator().manual_seed(1)).add(1).bfloat16()

    change = (layer.train()(x.float()) - layer._original_forward(x.float())).detach().double()

    kept = change != 0
    # 1 / 0.9 in bf16 is off by 1.6e-3
    assert float((change / x)[kept].mean()) == pytest.approx(1 / 0.9, rel=3e-4)


def test_norms_above_the_limit_are_scaled_down_to_it(tmp_path: Path) -> None:
    network = making.wan_network(making.tiny_dit(tmp_path), alpha=2.0)
    with torch.no_grad():
        network.layers[0].lora_up.weight.mul_(1e-3)

    @torch.no_grad()
    def norms() -> list[float]:
        return [
            float((layer.scale * layer.lora_up.weight @ layer.lora_down.weight).norm())
            for layer in network.layers
        ]

    before = norms()
    limit = sorted(before)[len(before) // 2]
    scaled, mean, largest = network.scale_norms(limit, torch.device("cpu"))

    expected = [min(norm, limit) for norm in before]
    assert norms() == pytest.approx(expected, rel=1e-5)
    assert scaled == sum(norm > limit for norm in before)
    assert largest == pytest.approx(limit, rel=1e-5)
    assert mean == pytest.approx(sum(expected) / len(expected), rel=1e-5)


class Convolutions(nn.Module):
    """A block with a convolution of 1 and one of 3."""

    spec = DitSpec(("blocks",))

    def __init__(self) -> None:
        super().__init__()
        three = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.blocks = nn.ModuleList([nn.ModuleDict({"one": nn.Conv2d(4, 6, 1), "three": three})])


def test_convolutions_larger_than_one_take_part_only_with_conv_dim() -> None:
    dit = Convolutions()
    three = dit.blocks[0]["three"]  # type: ignore[index]
    assert len(make_lora("lora_wan", 2, 1.0, dit).layers) == 1
    full = make_lora("lora_wan", 2, 1.0, Convolutions(), conv_dim="3", conv_alpha="0")
    assert [layer.scale for layer in full.layers] == [0.5, 1.0]  # alpha 0 means the rank
    network = make_lora("lora_wan", 2, 1.0, dit, conv_dim="3", conv_alpha="1")
    making.randomize(network)
    pixels = torch.randn(1, 4, 8, 8)
    before = three(pixels)
    network.attach()

    factors, name = network.state_dict(), "lora_unet_blocks_0_three"
    down, up = factors[f"{name}.lora_down.weight"], factors[f"{name}.lora_up.weight"]
    assert (down.shape, up.shape) == ((3, 4, 3, 3), (6, 3, 1, 1))
    delta = torch.einsum("orxy,rikl->oikl", up, down) / 3
    expected = before + nn.functional.conv2d(pixels, delta, padding=1, stride=2)
    torch.testing.assert_close(three(pixels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("alpha", "scale"), [(torch.zeros(()), 1.0), (torch.full((1,), 2.0), 0.5)])
def test_alphas_as_other_tools_store_them_count(tmp_path: Path, alpha: torch.Tensor, scale: float) -> None:
    dit = making.tiny_dit(tmp_path)
    tensors = making.wan_network(dit).state_dict()
    save_file(
        {name: alpha.clone() if name.endswith(".alpha") else t for name, t in tensors.items()},
        tmp_path / "x.safetensors",
    )
    network = making.wan_network(dit, alpha=3.0)

    assert network.load_weights(tmp_path / "x.safetensors") == []

    assert {layer.scale for layer in network.layers} == {scale}


def test_what_does_not_fit_a_network_is_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dit = making.tiny_dit(tmp_path)
    save_network(
        making.wan_network(making.tiny_dit(tmp_path / "i2v", "i2v")), tmp_path / "x.safetensors", None, {}
    )
    network = making.wan_network(dit, exclude_patterns="[r'.*ffn.*']")

    with caplog.at_level(logging.WARNING):
        errors = network.load_weights(tmp_path / "x.safetensors")

    assert "lora_unet_blocks_0_cross_attn_k_img is not in this network" in errors
    assert "lora_unet_blocks_1_ffn_2 is not in this network" in errors
    assert len(errors) == 8
    assert "16 modules loaded, 8 not" in caplog.text
    # with the model's own modules it is known that the model lacks them, and why
    caplog.clear()
    errors = network.load_weights(tmp_path / "x.safetensors", dict(dit.named_parameters()))
    assert [name for name in errors if "ffn" not in name] == []
    reason = "4 of 24 modules are not in this network: they are for the attention to images of Wan2.1's"
    assert reason in caplog.text
    assert "16 modules loaded, 4 not" in caplog.text


def test_a_file_of_another_rank_is_refused_with_the_way_out(tmp_path: Path) -> None:
    dit = making.tiny_dit(tmp_path)
    save_network(making.wan_network(dit, rank=8), tmp_path / "x.safetensors", None, {})

    with pytest.raises(
        CheckpointError,
        match=r"(?s)in 20 of 20 modules.*lora_down.weight \[8, 128\].*\[4, 128\].*--network_dim 8, or "
        r"--dim_from_weights",
    ):
        making.wan_network(dit, rank=4).load_weights(tmp_path / "x.safetensors")


def test_a_dora_is_no_start_for_a_plain_lora(tmp_path: Path) -> None:
    dit, path = making.tiny_dit(tmp_path), tmp_path / "x.safetensors"
    tensors = dict(making.wan_network(dit).state_dict())
    save_file(tensors | {"lora_unet_blocks_1_ffn_2.dora_scale": torch.ones(128, 1)}, path)
    with pytest.raises(
        CheckpointError, match=r"(?s)dora_scale \[128, 1\].*trains plain LoRAs.*--base_weights"
    ):
        making.wan_network(dit).load_weights(path)


def test_ranks_and_alphas_can_come_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dit = making.tiny_dit(tmp_path)
    tensors = making.wan_network(
        dit, rank=6, alpha=3.0, include_patterns="[r'.*self_attn.*']", exclude_patterns="[r'.*']"
    ).state_dict()
    del tensors["lora_unet_blocks_1_self_attn_o.alpha"]  # no alpha: that of the rank

    with caplog.at_level(logging.WARNING):
        network = lora_like("lora_wan", tensors, dit, conv_dim="4", rank_dropout="0.5")

    assert "conv_dim is ignored" in caplog.text
    assert network.settings.dropouts == Dropouts(rank=0.5)
    assert len(network.layers) == 8
    assert {layer.rank for layer in network.layers} == {6}
    assert [layer.scale for layer in network.layers] == [0.5] * 7 + [1.0]


def test_unknown_network_args_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rank_droput: .* Did you mean rank_dropout"):
        making.wan_network(making.tiny_dit(tmp_path), rank_droput="0.1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"module_dropout": "many"}, "module_dropout=many"),
        ({"conv_dim": "0"}, "conv_dim=0"),
        ({"exclude_patterns": "__import__('os')"}, "exclude_patterns"),
        ({"exclude_patterns": "[r'.*']"}, "no module"),
    ],
)
def test_network_args_that_cannot_be_used_are_refused(
    tmp_path: Path, arguments: dict[str, str], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        making.wan_network(making.tiny_dit(tmp_path), **arguments)
