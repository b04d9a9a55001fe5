"""Networks of any module behind the trainer's interface, their options, and LoRAs for text encoders."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from checkpoints.opening import open_checkpoint
from encoders.clip_l import ClipTextEncoder
from modules.errors import CheckpointError, OptionError
from modules.script_options import parse_options
from networks.adapter import ForeignNetwork, NormReport, make_network
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.loading import WeightedLora, read_lora
from networks.lora_network import OwnNetwork
from networks.metadata import describe_lora, save_network
from networks.options import NetworkOptions
from networks.text_loras import TextLoras
from networks.use_options import LoraOptions
from protocols.requests import Prompt
from tests.flux.making import tiny_model
from tests.networks.making import inputs, tiny_dit, wan_network
from tests.tiny.loras import make_lora
from tests.tiny.picture_encoders import write_clip_l
from training.features.base_weights import BaseWeightsOptions

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


def test_initial_values_and_dropout_of_a_foreign_module_follow_the_seeds(tmp_path: Path) -> None:
    outputs = []
    for noise, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(noise)  # what was drawn before has no influence
        dit = tiny_dit(tmp_path).train()
        network = make_network(options(network_module=FOREIGN), OURS, dit, seed=1)
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


@pytest.mark.parametrize(
    ("alpha", "header"), [(4.0, {}), (16.0, {"lora_alpha": "16"}), (1.0, {"alpha": "16"})]
)
def test_a_foreign_network_is_made_with_the_alpha_of_the_header(
    tmp_path: Path, alpha: float, header: dict[str, str]
) -> None:
    layer = nn.Module()
    layer.lora_down, layer.lora_up = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
    layer.register_buffer("alpha", torch.tensor(alpha))
    network = nn.ModuleDict({"lycoris_blocks_0_self_attn_q": layer})
    state = {name: one for name, one in network.state_dict().items() if not name.endswith("alpha")}
    save_file(state, tmp_path / "x.safetensors", header)
    if alpha == 1:
        with pytest.raises(
            CheckpointError, match=r"has alpha 16, .* network has 1\.\n  Pass --network_alpha 16"
        ):
            ForeignNetwork(network, nn.Module()).load_weights(tmp_path / "x.safetensors")
    else:
        ForeignNetwork(network, nn.Module()).load_weights(tmp_path / "x.safetensors")


def test_a_model_keeps_the_weights_that_a_network_takes_away(tmp_path: Path) -> None:
    dit = tiny_dit(tmp_path)
    before, expected = {name: tensor.clone() for name, tensor in dit.state_dict().items()}, dit(**inputs(dit))

    make_network(options(network_module=FOREIGN, **FULL), OURS, dit, seed=1)

    assert list(dit.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())
    torch.testing.assert_close(dit(**inputs(dit)), expected)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("NaN", r"NaN or infinite: blocks_1_ffn_0 \(256 of 256 values\)"),
        ("shape", r"in 1 of 20 tensors:\n  blocks_1_ffn_0 has \[100\], the network \[256\]"),
        ("names", "has none of this network's 20 tensors, such as blocks_0"),
    ],
)
def test_weights_that_do_not_fit_a_foreign_network_are_refused(
    tmp_path: Path, wrong: str, expected: str
) -> None:
    dit, path = tiny_dit(tmp_path), tmp_path / "x.safetensors"
    save_network(make_network(options(network_module=FOREIGN), OURS, dit, seed=1).module, path, None, {})
    tensors = load_file(path)
    if wrong == "names":
        tensors = {f"lora_unet_{name}.diff_b": tensor for name, tensor in tensors.items()}
    else:
        tensors["blocks_1_ffn_0"] = torch.full((256,), torch.nan) if wrong == "NaN" else torch.ones(100)
    save_file(tensors, path)

    with pytest.raises(CheckpointError, match=expected):
        make_network(options(network_module=FOREIGN, network_weights=path), OURS, tiny_dit(tmp_path), seed=1)


def test_scaling_norms_is_reported(tmp_path: Path) -> None:
    network = make_network(options(scale_weight_norms=0.5), OURS, tiny_dit(tmp_path), seed=1)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.fill_(0.1)

    report = NormReport.of(network.scale_norms(0.5, torch.device("cpu")).tolist())

    assert report.keys_scaled == 20
    assert report.max_norm == pytest.approx(0.5)


def test_foreign_modules_report_scaled_norms_as_plain_numbers(tmp_path: Path) -> None:
    class Scaling(torch.nn.Module):
        def apply_max_norm_regularization(
            self, max_norm: float, device: torch.device
        ) -> tuple[int, float, float]:
            return 2, max_norm / 2, max_norm

    network = ForeignNetwork(Scaling(), tiny_dit(tmp_path))

    assert NormReport.of(network.scale_norms(0.5, torch.device("cpu")).tolist()) == NormReport(2, 0.25, 0.5)


def test_foreign_modules_may_yield_their_parameter_groups(tmp_path: Path) -> None:
    class Yielding(torch.nn.Linear):
        def prepare_optimizer_params(self, unet_lr: float) -> Iterator[dict[str, Any]]:
            yield {"params": iter([self.weight]), "lr": unet_lr}
            yield {"params": iter([self.bias]), "lr": 2 * unet_lr}

    groups, names = ForeignNetwork(Yielding(2, 2), tiny_dit(tmp_path)).parameter_groups(0.5)

    assert names == ["group 0", "group 1"]
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(1, 0.5), (1, 1.0)]


def test_a_foreign_module_may_have_state_that_its_file_lacks() -> None:
    class Noisy(nn.Module):
        additional_state: ClassVar = {"ggpo": nn.Linear(2, 2)}

    assert ForeignNetwork(Noisy(), nn.Module()).additional_state is Noisy.additional_state
    assert ForeignNetwork(nn.Linear(2, 2), nn.Module()).additional_state == {}


@pytest.mark.parametrize(
    "given", [{"scale_weight_norms": 0.5}, {"dim_from_weights": True}], ids=lambda given: next(iter(given))
)
def test_what_a_foreign_module_does_not_offer_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    dit, path = tiny_dit(tmp_path), tmp_path / "x.safetensors"
    save_network(wan_network(dit), path, None, {})

    with pytest.raises(OptionError, match=f"--{next(iter(given))} cannot be used"):
        make_network(options(network_module=FOREIGN, network_weights=path, **given), OURS, dit, seed=1)


def network(*argv: str) -> NetworkOptions:
    return parse_options("", argv, NetworkOptions)[0]


def base(*argv: str) -> BaseWeightsOptions:
    return parse_options("", argv, BaseWeightsOptions)[0]


def lora(*argv: str) -> LoraOptions:
    return parse_options("", argv, LoraOptions)[0]


def test_the_first_equals_sign_splits_network_args() -> None:
    options = network("--network_args", "exclude_patterns=[r'a=b']", "rank_dropout = 0.1")

    assert options.arguments() == {"exclude_patterns": "[r'a=b']", "rank_dropout": "0.1"}


def test_multipliers_without_a_file_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a"
    file.touch()

    lora()
    lora("--lora_weight", str(file), "--lora_multiplier", "0.5")
    assert not caplog.text
    lora("--lora_weight", str(file), "--lora_multiplier", "1", "0.5", "2")
    base("--base_weights", str(file), "--base_weights_multiplier", "1", "3").multipliers(warns=True)
    assert "--lora_multiplier: 0.5 2 is ignored" in caplog.text
    assert "--base_weights_multiplier: 3 is ignored" in caplog.text


@pytest.mark.parametrize(("option", "read"), [("--network_weights", network), ("--base_weights", base)])
def test_missing_files_are_found_out_at_once(option: str, read: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match=f"{option} nothing.safetensors"):
        read(option, "nothing.safetensors")


CPU = torch.device("cpu")
PROMPT = [Prompt("a cat")]


def encoder(folder: Path) -> ClipTextEncoder:
    clip = ClipTextEncoder(write_clip_l(folder), torch.float32)
    clip.load(CPU)
    return clip


def pooled(clip: ClipTextEncoder) -> Tensor:
    with torch.no_grad():
        (conditions,) = clip.encode(PROMPT)
    value = conditions["l_pooled"]
    assert isinstance(value, Tensor)
    return value


def trained(clip: ClipTextEncoder, path: Path, dit: nn.Module | None) -> OwnNetwork:
    """A LoRA with random factors in the encoder (and the DiT), saved."""
    texts = {clip.lora_prefix: clip.network}
    network: OwnNetwork = make_lora("lora_flux", 2, 1.0, texts=texts, dit=dit)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_network(network, path, None, {"ss_base_model_version": "flux"})
    return network


@pytest.mark.parametrize("with_dit", [False, True])
def test_texts_are_encoded_as_in_training(tmp_path: Path, with_dit: bool) -> None:
    clip = encoder(tmp_path / "clip")
    plain = pooled(clip)
    network = trained(clip, tmp_path / "lora.safetensors", tiny_model("dev") if with_dit else None)
    network.attach()
    expected = pooled(clip)
    lora = read_lora(tmp_path / "lora.safetensors", with_texts=True)
    fresh = encoder(tmp_path / "clip")

    loras = TextLoras([WeightedLora(lora)])
    for _ in range(2):  # a kept encoder comes again
        loras.add_to(fresh)

    assert float((expected - plain).abs().max()) > 1e-2
    torch.testing.assert_close(pooled(fresh), expected, rtol=1e-4, atol=1e-5)
    half = encoder(tmp_path / "clip")
    TextLoras([WeightedLora(lora, 0.0)]).add_to(half)
    torch.testing.assert_close(pooled(half), plain)


def test_a_lora_for_encoders_alone_leaves_the_dit_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(encoder(tmp_path / "clip"), tmp_path / "lora.safetensors", None)
    patch = LoraPatch([WeightedLora(read_lora(tmp_path / "lora.safetensors", with_texts=True))])
    weights = tiny_model("dev").state_dict()

    with caplog.at_level(logging.WARNING):
        changed = {name: patch(name, weight) for name, weight in weights.items()}
        patch.check()

    assert all(torch.equal(changed[name], weight) for name, weight in weights.items())
    assert caplog.text == ""


def test_a_file_for_encoders_is_described(tmp_path: Path) -> None:
    trained(encoder(tmp_path / "clip"), tmp_path / "lora.safetensors", None)

    with open_checkpoint(tmp_path / "lora.safetensors") as checkpoint:
        words = describe_lora(checkpoint)

    assert words is not None
    assert "of them in text encoders" in words
    assert words.startswith("a LoRA for flux")


def test_parts_for_encoders_that_a_model_does_not_have_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = encoder(tmp_path / "clip")
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 4), f"{name}.lora_up.weight": torch.ones(4, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    loras = TextLoras([WeightedLora(read_lora(tmp_path / "lora.safetensors", with_texts=True))])

    with caplog.at_level(logging.WARNING):
        loras.warn_about_unused_changes([clip])

    assert "2 tensors change a text encoder that this model does not have" in caplog.text


def in_transformers(folder: Path) -> CLIPTextModel:
    weights = {n.removeprefix("text_model."): t for n, t in load_file(write_clip_l(folder)).items()}
    layer = weights["encoder.layers.0.mlp.fc1.weight"]
    rows, width = weights["embeddings.token_embedding.weight"].shape
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=len(layer),
        num_hidden_layers=len([name for name in weights if name.endswith("fc1.weight")]),
        num_attention_heads=width // 64,
        bos_token_id=rows - 2,
        eos_token_id=rows - 1,
    )
    model = CLIPTextModel(config)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def test_a_converted_lora_encodes_texts_in_diffusers_as_here(tmp_path: Path) -> None:
    clip, theirs = encoder(tmp_path / "clip"), in_transformers(tmp_path / "theirs")
    trained(clip, tmp_path / "lora.safetensors", None)
    convert_file(tmp_path / "lora.safetensors", tmp_path / "there.safetensors", "diffusers", "flux")
    ids = torch.tensor([[5, 9, 2, 11, 7]])
    plain = theirs(ids).last_hidden_state

    state = FluxLoraLoaderMixin.lora_state_dict(str(tmp_path / "there.safetensors"))
    FluxLoraLoaderMixin.load_lora_into_text_encoder(
        state, network_alphas=None, text_encoder=theirs, prefix="text_encoder"
    )

    TextLoras([WeightedLora(read_lora(tmp_path / "lora.safetensors", with_texts=True))]).add_to(clip)
    merged = in_transformers(tmp_path / "again")
    merged.load_state_dict(dict(clip.network.state_dict()))
    found, expected = theirs(ids).last_hidden_state, merged(ids).last_hidden_state
    assert float((found - plain).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_package_can_keep_more_in_states_than_in_files() -> None:
    module, more = nn.Module(), {"noise": nn.Linear(1, 1)}
    assert not ForeignNetwork(module, nn.Module()).additional_state

    vars(module)["additional_state"] = more  # under the name that our own networks have

    assert ForeignNetwork(module, nn.Module()).additional_state is more
