"""LoRAs, networks and transformers for the tests of networks/."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

import training.run
from modules.installation import import_own
from networks.apply import LoraPatch
from networks.loading import LoraFile, WeightedLora, read_lora
from networks.lora_layer import LoraLayer
from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from protocols.loading import Placement
from tests.golden_cases import make_weights
from tests.hunyuan_model.making import tiny_inputs, tiny_model
from tests.tiny.families import OUTPUT, family_called
from tests.tiny.loras import make_lora, unused
from tests.tiny.wan_dit import tiny_state, write_dit
from wan.checkpoints import load_dit
from wan.configs import WanConfig
from wan.model import WanModel


def golden_dit(description: dict[str, Any]) -> WanModel:
    """The network of a golden case."""
    given = description["config"]
    names = ("dim", "ffn_dim", "freq_dim", "text_dim", "num_heads", "num_layers", "in_dim", "out_dim")
    config = WanConfig(
        **{name: given[name] for name in names},
        text_len=given["text_len"],
        has_image=given["model_type"] == "i2v",
    )
    dit = WanModel(config)
    table = [[name, list(tensor.shape)] for name, tensor in dit.state_dict().items()]
    dit.load_state_dict(make_weights(description["weights_model_key"], table))
    return dit.requires_grad_(False)


def golden_lora(network: OwnNetwork, model_key: str, up_scale: float) -> dict[str, Tensor]:
    """Fill a network by the golden rule; returns its tensors."""
    own = network.state_dict()
    table = [[name, list(tensor.shape)] for name, tensor in own.items() if not name.endswith(".alpha")]
    values = {
        name: tensor * (up_scale if "lora_up" in name else 1)
        for name, tensor in make_weights(model_key, table).items()
    }
    network.load_state_dict(own | values)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def tiny_dit(folder: Path, kind: str = "t2v", **sizes: int) -> WanModel:
    """A random transformer in evaluation mode, without gradients."""
    return (
        load_dit(write_dit(folder, tiny_state(kind, **sizes)), Placement(torch.device("cpu")))
        .eval()
        .requires_grad_(False)
    )


def wan_network(
    dit: nn.Module, rank: int = 4, alpha: float = 2.0, dropout: float | None = None, **arguments: Any
) -> OwnNetwork:
    """A LoRA for a Wan transformer with random up factors, not attached yet."""
    network = make_lora("lora_wan", rank, alpha, dit, dropout, **arguments)
    randomize(network)
    return network


def randomize(network: nn.Module, scale: float = 0.05, seed: int = 0) -> None:
    """Random values for all parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def inputs(dit: WanModel, seed: int = 1) -> dict[str, Any]:
    """What the transformer's forward takes, batch of two."""
    generator = torch.Generator().manual_seed(seed)
    config = dit.config
    texts = [torch.randn(length, config.text_dim, generator=generator) for length in (5, 7)]
    given: dict[str, Any] = {
        "noisy": torch.randn(2, config.in_dim, 2, 4, 4, generator=generator),
        "timesteps": torch.tensor([250.0, 900.0]),
        "text": texts,
    }
    if config.has_image:
        given["image_embeds"] = torch.randn(2, 257, config.image_dim, generator=generator)
    return given


def join_all(network: nn.Module) -> None:
    """Have all LoRA layers add their products in place, however small the tensors are."""
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer.min_in_place_numel = 0


@torch.no_grad()
def add_lora(dit: Any, lora: Path | LoraFile, multiplier: float = 1.0) -> Any:
    """Put all of a LoRA into the weights of a model, and return the model."""
    patch = LoraPatch([WeightedLora(lora if isinstance(lora, LoraFile) else read_lora(lora), multiplier)])
    dit.load_state_dict({name: patch(name, weight) for name, weight in dit.state_dict().items()})
    patch.check()
    assert unused(patch) == []
    return dit


def saved_by_diffusers(
    theirs: Any, path: Path, targets: Any, alpha: int = 4, with_settings: bool = True, **settings: Any
) -> Path:
    """Give a model of diffusers a random LoRA of rank 4 and save it, the adapter's settings in the metadata
    or nowhere.
    """
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    if with_settings:
        theirs.save_lora_adapter(path.parent, weight_name=path.name)
    else:
        names = {
            name.replace(".default", ""): tensor
            for name, tensor in theirs.state_dict().items()
            if "lora_" in name
        }
        save_file({f"transformer.{name}": tensor for name, tensor in names.items()}, path)
    return path


def own_gradients(network: nn.Module) -> dict[str, Tensor]:
    """Gradients of all factors by their names."""
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_recorded(
    gradients: dict[str, Tensor],
    dit: nn.Module,
    loss: Tensor,
    description: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """The loss and the gradients of all factors are the recorded ones; the model has none."""
    wanted = tensors["loss"].view(1)
    torch.testing.assert_close(loss.detach().view(1), wanted, atol=0, **description["tolerance"]["loss"])
    rtol = description["tolerance"]["grads"]["rtol"]
    assert gradients.keys() == description["grad_sum_and_l2norm"].keys()
    for name, gradient in gradients.items():
        total, norm = description["grad_sum_and_l2norm"][name]
        assert float(gradient.norm()) == pytest.approx(norm, rel=rtol), name
        assert float(gradient.sum()) == pytest.approx(total, rel=rtol, abs=rtol * norm), name
        if f"grad.{name}" in tensors:
            maximum = rtol * float(gradient.abs().max())
            torch.testing.assert_close(gradient, tensors[f"grad.{name}"], rtol=rtol, atol=maximum)
    assert all(parameter.grad is None for parameter in dit.parameters())


NEAR = 5e-6  # of the largest value; float32, summed in another order
IN_DIFFUSERS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],  # what diffusers' own training scripts take
    "some": ["to_v", "add_q_proj", "proj_mlp", "net.0.proj"],
    "all": r".*\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out|"
    r"net\.0\.proj|net\.2|proj_mlp|proj_out|linear_1|linear)",
    "last": r"norm_out\.linear|proj_out|time_text_embed.timestep_embedder.linear_2",
}


def saved(
    path: Path, kind: str = "t2v", dtype: torch.dtype = torch.float32, alpha: float = 3.0, **arguments: Any
) -> OwnNetwork:
    """A LoRA with random up factors, not attached."""
    network = make_lora("lora_hunyuan", 4, alpha, tiny_model(kind), **arguments)
    randomize(network)
    save_network(network, path, dtype, {"ss_base_model_version": "hunyuan_video"})
    return network


@torch.no_grad()
def run_here(kind: str, path: Path, multiplier: float = 1.0) -> Tensor:
    """What the model with a LoRA file added gives."""
    return add_lora(tiny_model(kind), path, multiplier)(**tiny_inputs(kind))


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= NEAR * expected.abs().max()


def load_transformer(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, nn.Module]:
    """The family of one of `tests.tiny.families` as its script describes it for training, and its
    transformer without values.
    """
    family, made = family_called(name), list[Any]()
    family.prepare(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(training.run, "train_network", lambda family, *_, **__: made.append(family))
    script, *words = family.train
    import_own(script.removesuffix(".py")).main([*words, *OUTPUT])
    return made[0], made[0].load_dit(Placement(torch.device("meta")))
