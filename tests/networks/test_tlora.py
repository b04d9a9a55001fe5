"""T-LoRA: ranks masked by the noise of each sample, in training, samples and generation."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.gated_loras import add_loras
from networks.kinds.tlora import TLoraRule
from networks.loading import WeightedLora, read_lora
from networks.rank_masks import RankMask, count_joined_parts, mask_for, read_rank_rule, set_level, set_levels
from networks.unmerged_loras import add_unmerged, masked_changes, split_masked
from tests.networks.making import tiny_dit
from tests.training import toy
from tests.training.conftest import _fresh_accelerator  # noqa: F401
from training.run import prepare_run, train_network
from training.targets.passes import training_loss

CPU = torch.device("cpu")
RULE = ["tlora=True", "tlora_min_rank=1", "tlora_alpha=2"]
TLORA = ["--network_dim", 4, "--network_args", *RULE]


@pytest.mark.parametrize(
    ("rule", "level", "wanted"),
    [
        (TLoraRule(1, 1), 1.0, 1),
        (TLoraRule(1, 1), 0.0, 16),
        (TLoraRule(1, 1), 0.5, 8),  # floor(7.5) + 1
        (TLoraRule(4, 2), 0.5, 7),  # floor(12 / 4) + 4
        (TLoraRule(6, 1), 0.3, 13),  # floor(0.7 * 10) + 6, although 0.7 is a little less in float32
        (TLoraRule(40, 1), 0.9, 16),
    ],
)
def test_the_number_of_active_ranks_follows_the_formula(rule: TLoraRule, level: float, wanted: int) -> None:
    assert rule.active(16, torch.tensor([level])).tolist() == [wanted]


def test_each_sample_has_its_own_mask() -> None:
    mask = RankMask(TLoraRule(1, 1), 4)
    mask.set_levels(torch.tensor([0.0, 1.0]))
    assert mask.apply(torch.ones(2, 3, 4)).sum(-1).tolist() == [[4] * 3, [1] * 3]
    assert mask.apply(torch.ones(4, 4)).sum(-1).tolist() == [4, 4, 1, 1]  # two rows of each sample
    assert mask.apply(torch.ones(2, 4, 5, 5), 1).sum(1)[:, 0, 0].tolist() == [4, 1]
    with pytest.raises(AssertionError, match="3 rows are not those of 2 samples"):
        mask.apply(torch.ones(3, 4))
    joined = RankMask(TLoraRule(1, 1), 6, num_parts=3)
    joined.set_levels(torch.tensor([1.0]))
    assert joined.apply(torch.ones(5, 6))[0].tolist() == [1, 0, 1, 0, 1, 0]


def test_levels_of_a_network_without_masks_cost_nothing() -> None:
    set_levels(nn.Linear(1, 1), torch.zeros(1))
    set_level(nn.Linear(1, 1), 0.5, CPU)
    network = nn.Linear(1, 1)
    assert mask_for(network, TLoraRule(), 4) is mask_for(network, TLoraRule(), 4)


def masked_by_hand(x: Tensor, layer: Any, levels: Tensor) -> Tensor:
    """What one LoRA of rank 4 adds, with the rule above."""
    hidden = x @ layer.lora_down.weight.T
    for index, level in enumerate(levels):
        hidden[index, ..., int(torch.floor((1 - level) ** 2 * 3) + 1) :] = 0
    added: Tensor = layer.scale * hidden @ layer.lora_up.weight.T
    return added


@pytest.mark.parametrize("how", [[], ["--gradient_checkpointing"]])
def test_loss_and_gradients_are_those_of_masked_factors(tmp_path: Path, how: list[object]) -> None:
    """Through the loop's own loss; a checkpointed block is computed again, with the same masks."""
    toy.write_caches(tmp_path, batch_size=2)
    family = toy.ToyFamily()
    with prepare_run(family, toy.toy_options(tmp_path, *TLORA, *how)) as run:
        dit = run.model.dits.on_device(0)
        for parameter in run.parameters:
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        batch = run.feed.read((0, 0))
        assert len(batch.sigmas.unique()) == 2
        found = training_loss(family, dit, batch, run.autocast, run.rule)
        found.backward()
        gradients = [parameter.grad for parameter in run.parameters]

        (network,) = run.model.trainable.networks
        for layer in network.module.layers:
            layer.rank_mask = None
            frozen = layer._original_forward
            layer.original.forward = lambda x, layer=layer, frozen=frozen: (
                frozen(x) + masked_by_hand(x, layer, batch.sigmas)
            )
        latents = toy.LATENT.to_model(batch.batch.tensor("latents"))
        share = batch.sigmas.view(-1, 1, 1, 1, 1)
        output = dit(
            (1 - share) * latents + share * batch.noise, batch.timesteps, batch.batch.tensors["letters"]
        )
        expected = mse_loss(output, batch.noise - latents)
        wanted = torch.autograd.grad(expected, run.parameters)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


STATES = ["--save_every_n_steps", 2, "--save_state", "--resume", "latest"]


def test_the_file_is_a_lora_that_says_its_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy.write_caches(tmp_path, batch_size=2)
    with caplog.at_level(logging.INFO):
        tensors = toy.train_toy(tmp_path, *TLORA)
    assert "Other programs do not mask ranks, nor does merging" in caplog.text
    caplog.clear()
    plain = toy.train_toy(tmp_path, "--network_dim", 4, "--output_name", "plain")

    assert tensors.keys() == plain.keys()
    assert not toy.same(tensors, plain)
    metadata = toy.metadata_of(tmp_path / "output" / "x.safetensors")
    assert read_rank_rule(metadata) == TLoraRule(1, 2)
    assert read_rank_rule(toy.metadata_of(tmp_path / "output" / "plain.safetensors")) is None


@pytest.mark.slow
def test_a_killed_run_ends_with_equal_bytes(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, batch_size=2)
    more = ["--network_args", *RULE, "rank_dropout=0.2"]
    words = ["--network_dim", 4, *more, "--ema_decay", 0.9, "--gradient_accumulation_steps", 2, *STATES]
    expected = toy.train_toy(tmp_path, *words)
    assert toy.same(toy.train_with_kills(tmp_path, *words, moments=(3, 2)), expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--network_module", "networks.loha", "--network_args", *RULE], "are for LoRAs only"),
        (["--network_module", "networks.lokr", "--network_args", *RULE], "are for LoRAs only"),
        (["--network_module", "networks.oft", "--network_args", *RULE], "are for LoRAs only"),
        (["--network_args", *RULE, "dora_wd=True"], "cannot be used together"),
        (["--network_args", "tlora_min_rank=2"], "tlora_min_rank is for T-LoRA: add tlora=True"),
        (["--network_args", "tlora=False", "tlora_alpha=1"], "tlora_alpha is for T-LoRA"),
        (["--network_args", "tlora=True", "tlora_min_rank=8"], "tlora_min_rank=8: the rank is 4"),
        (["--network_args", "tlora=True", "tlora_min_rank=0"], "tlora_min_rank=0: pass a whole number"),
        (["--network_args", "tlora=True", "tlora_alpha=0"], "tlora_alpha=0: all ranks would be active"),
        (["--network_args", "tlora=yes"], "pass True or False"),
        (["--network_args", "t_lora=True"], "no such setting"),
        (["--network_args", "algo=lokr"], "pass networks.lokr, and omit algo"),
        (["--network_args", "algo=full"], "pass one of the modules in --help"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, given: list[object], words: str) -> None:
    toy.write_caches(tmp_path)
    family = toy.ToyFamily()
    with pytest.raises(OptionError, match=words):
        train_network(family, toy.toy_options(tmp_path, *given))
    assert not family.passes


def wan_file(folder: Path, rank: int = 4, **more: str) -> tuple[Path, Tensor, Tensor]:
    """A T-LoRA for the queries of a block of a tiny Wan, and its factors down and up."""
    generator = torch.Generator().manual_seed(1)
    dit = tiny_dit(folder / "shapes")
    layer = dit.get_submodule("blocks.0.self_attn.q")
    assert isinstance(layer, nn.Linear)
    down, up = (
        torch.randn(*shape, generator=generator)
        for shape in ((rank, layer.in_features), (layer.out_features, rank))
    )
    name = "lora_unet_blocks_0_self_attn_q"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
    }
    metadata = {"ss_network_args": '{"tlora": "True", "tlora_min_rank": "1", "tlora_alpha": "2"}', **more}
    save_file(tensors, folder / "tlora.safetensors", metadata)
    return folder / "tlora.safetensors", down, up


@torch.no_grad()
@pytest.mark.parametrize("way", ["generation", "samples"])
def test_it_is_added_with_the_mask_of_each_level(tmp_path: Path, way: str) -> None:
    path, down, up = wan_file(tmp_path)
    dit = tiny_dit(tmp_path / "model")
    layer = dit.get_submodule("blocks.0.self_attn.q")
    x = torch.randn(2, 5, down.shape[1])
    plain, use = layer(x), WeightedLora(read_lora(path), 0.5)
    merged, masked = split_masked([use])
    assert (merged, masked) == ([], [use])
    if way == "generation":
        add_unmerged(dit, masked_changes(dit, masked), CPU, torch.float32)
    else:
        for added in add_loras(dit, [use]).layers:
            added.switch_on(CPU, torch.float32)
    for level, ranks in ((0.0, 4), (0.4, 2), (1.0, 1)):
        set_level(dit, level, CPU)
        expected = plain + 0.5 * (2 / 4) * x @ down[:ranks].T @ up[:, :ranks].T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_merging_says_that_it_has_no_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _, _ = wan_file(tmp_path)
    patch = LoraPatch([WeightedLora(read_lora(path))])
    for name, weight in tiny_dit(tmp_path / "model").state_dict().items():
        patch(name, weight)
    with caplog.at_level(logging.WARNING):
        patch.check()
    assert "tlora.safetensors was trained with T-LoRA: merged, all ranks are active" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ("{}", None),
        ('{"tlora": "False"}', None),
        ('{"tlora": "true"}', TLoraRule(1, 1)),
        ('{"tlora": true, "tlora_min_rank": 3}', TLoraRule(3, 1)),
        ("tlora: no JSON", None),
    ],
)
def test_the_rule_is_read_from_metadata(arguments: str, rule: TLoraRule | None) -> None:
    assert read_rank_rule({"ss_network_args": arguments}) == rule


@pytest.mark.parametrize(
    "arguments",
    ['"tlora_alpha": "much"', '"tlora_alpha": "nan"', '"tlora_min_rank": 0', '"tlora_min_rank": 1e999'],
)
def test_numbers_that_are_none_are_refused(arguments: str) -> None:
    with pytest.raises(CheckpointError, match=r"style.*: its metadata says tlora=True with .*Copy it again"):
        read_rank_rule({"ss_network_args": f'{{"tlora": "True", {arguments}}}'}, Path("style.safetensors"))


def test_joined_ranks_are_those_of_parts() -> None:
    trained = {"ss_network_dim": "4", "ss_network_args": '{"tlora": "True"}'}
    assert [count_joined_parts(trained, rank) for rank in (4, 12, 6)] == [1, 3, 1]
    by_module = {"ss_network_dim": "4", "ss_network_args": '{"tlora": "True", "network_reg_dims": "x=8"}'}
    assert count_joined_parts(by_module, 8) == 1
    assert count_joined_parts({"ss_network_dim": "Dynamic"}, 8) == 1


def test_converted_files_keep_the_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _, _ = wan_file(tmp_path)
    with caplog.at_level(logging.INFO):
        convert_file(path, tmp_path / "other.safetensors", "other")
    assert load_file(tmp_path / "other.safetensors")
    with safe_open(tmp_path / "other.safetensors", "pt") as file:
        assert read_rank_rule(file.metadata()) == TLoraRule(1, 2)
    assert "A T-LoRA has its trained effect in the scripts here" in " ".join(caplog.text.split())
