"""A LoRA for 28 blocks on the deeper models, whose copies stand behind the originals."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge_lora
from anima.model import AnimaModel
from anima.names import GROWN, SOURCE_BLOCKS
from modules.errors import CheckpointError
from networks.gated_loras import add_loras
from networks.loading import WeightedLora, read_lora
from tests.anima.making import tiny_inputs
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.anima import CONFIG, tiny_state, write_dit, write_tiny_anima
from tests.tiny.dit_files import frozen
from tests.tiny.families import OUTPUT, family_called

FAMILY = family_called("anima")
# blocks of the published models of 40 and 52 by the blocks of 28 that they come from
OF_40 = [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9, 10, 11, 11, 12, 13]
OF_40 += [14, 14, 15, 16, 16, 17, 18, 18, 19, 20, 20, 21, 22, 22, 23, 24, 24, 25, 26, 27]
OF_52 = [block for block in range(28) for _ in range(OF_40.count(block) * 2 - 1)]
TARGET = "self_attn.q_proj"


def write_lora(path: Path, blocks: range, metadata: Mapping[str, str] | None = None) -> dict[int, Tensor]:
    """A LoRA on one layer of these blocks; the change of each."""
    generator = torch.Generator().manual_seed(3)
    tensors, changes = {}, {}
    for block in blocks:
        down, up = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
        start = f"lora_unet_blocks_{block}_{TARGET.replace('.', '_')}"
        tensors |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
        tensors[f"{start}.alpha"] = torch.tensor(2.0)
        changes[block] = up @ down
    save_file(tensors, path, metadata=dict(metadata or {}))
    return changes


def merge(folder: Path, depth: int, dialect: str = "safetensors") -> tuple[Mapping[str, Tensor], ...]:
    """The weights of a model before and after the LoRA is merged into it."""
    state = tiny_state(num_layers=depth)
    dit = write_dit(folder, state, dialect)
    words = ["--dit", str(dit), "--lora_weight", str(folder / "lora.safetensors")]
    merge_lora.main([*words, "--save_merged_model", str(folder / "merged.safetensors"), "--device", "cpu"])
    return state, load_file(folder / "merged.safetensors")


@pytest.mark.parametrize(("depth", "origins"), [(40, OF_40), (52, OF_52)])
def test_the_change_of_a_block_is_put_on_its_copies(tmp_path: Path, depth: int, origins: list[int]) -> None:
    assert len(origins) == depth
    changes = write_lora(tmp_path / "lora.safetensors", range(28))

    before, after = merge(tmp_path, depth)

    for block, origin in enumerate(origins):
        name = f"blocks.{block}.{TARGET}.weight"
        torch.testing.assert_close(after[name] - before[name], changes[origin], atol=1e-5, rtol=1e-4)


def test_forty_to_fifty_two() -> None:
    """Of the blocks of 40 each copy gets one more, as from 28 the blocks that were copied."""
    places = GROWN.map_to_deeper(40, 52)
    assert [OF_40[block] for block, own in enumerate(places) for _ in own] == OF_52
    assert sorted(place for own in places for place in own) == [*range(52)]


@pytest.mark.parametrize("key", SOURCE_BLOCKS)
def test_a_lora_on_some_blocks_needs_to_say_for_how_many_it_is(tmp_path: Path, key: str) -> None:
    path = tmp_path / "lora.safetensors"
    write_lora(path, range(4, 6))
    with pytest.raises(CheckpointError, match="without saying how many blocks"):
        merge(tmp_path, 40)

    changes = write_lora(path, range(4, 6), {key: "28"})
    before, after = merge(tmp_path, 40)

    changed = [
        n
        for n in range(40)
        if not after[f"blocks.{n}.{TARGET}.weight"].equal(before[f"blocks.{n}.{TARGET}.weight"])
    ]
    assert changed == [6, 7, 8]  # 4, and 5 with its copy
    assert changes.keys() == {4, 5}


def test_a_deeper_lora_is_refused_and_one_of_the_same_depth_is_as_it_is(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.safetensors", range(40))
    with pytest.raises(CheckpointError, match="is for 40 blocks, .* has 28"):
        merge(tmp_path, 28)

    changes = write_lora(tmp_path / "lora.safetensors", range(4, 6))
    before, after = merge(tmp_path, 28)
    torch.testing.assert_close(
        after[f"blocks.4.{TARGET}.weight"] - before[f"blocks.4.{TARGET}.weight"], changes[4]
    )


def test_a_merge_into_the_distributed_names_and_those_of_diffusers(tmp_path: Path) -> None:
    changes = write_lora(tmp_path / "lora.safetensors", range(28))
    state = tiny_state(num_layers=40)
    for start, place in (("net.", f"net.blocks.27.{TARGET}"), ("", "transformer_blocks.27.attn1.to_q")):
        dit = tmp_path / "named.safetensors"
        if start:
            save_file({start + name: tensor for name, tensor in state.items()}, dit)
        else:
            dit = write_dit(tmp_path, state, "diffusers")
        words = ["--dit", str(dit), "--lora_weight", str(tmp_path / "lora.safetensors")]
        merge_lora.main([*words, "--save_merged_model", str(tmp_path / "merged.safetensors")])
        merged = load_file(tmp_path / "merged.safetensors")
        change = merged[f"{place}.weight"] - state[f"blocks.27.{TARGET}.weight"]
        torch.testing.assert_close(change, changes[18], atol=1e-5, rtol=1e-4)


def test_generation_maps_as_merging_does(tmp_path: Path) -> None:
    files = write_tiny_anima(tmp_path / "model", num_layers=40)
    write_lora(tmp_path / "lora.safetensors", range(28))
    words = [*files.models, "--prompt", "a cat", "--image_size", 32, 32, "--infer_steps", 1, "--seed", 1]
    words += ["--device", "cpu", "--output_type", "latent", "--vae_dtype", "float32"]
    lora = ["--lora_weight", "lora.safetensors"]
    succeed_here("anima_generate_image.py", *words, *lora, "--save_path", "direct", folder=tmp_path)
    merged = tmp_path / "merged.safetensors"
    succeed_here("merge_lora.py", "--dit", files.dit, *lora, "--save_merged_model", merged, folder=tmp_path)
    merged.replace(files.dit)
    succeed_here("anima_generate_image.py", *words, "--save_path", "by merging", folder=tmp_path)
    direct, by_merging = (
        load_file(next((tmp_path / name).glob("*.safetensors")))["latent"]
        for name in ("direct", "by merging")
    )
    torch.testing.assert_close(direct, by_merging)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a transformer of 40 blocks, and LoRAs on the same layer of models of 28, 40 and 52."""
    folder = tmp_path_factory.mktemp("deep")
    FAMILY.prepare(folder)
    for command in (FAMILY.cache_latents, FAMILY.cache_texts):
        succeed_here(*command, folder=folder)
    write_dit(folder / "model", tiny_state(num_layers=40), name="dit")
    for depth in GROWN.depths:
        write_lora(folder / f"{depth}.safetensors", range(depth))
    return folder


def train(folder: Path, name: str, *more: object) -> tuple[dict[str, Tensor], str]:
    """The LoRA that a training of one step makes, and what it said."""
    one = ["--max_train_steps", 1, "--output_name", name, "--network_dim", 2, "--network_alpha", 2]
    only = ["--network_args", rf"include_patterns=[r'.*\.{TARGET}']", "exclude_patterns=[r'.*']"]
    said = succeed_here(*FAMILY.train, *OUTPUT, *one, *only, *more, folder=folder)
    return load_file(folder / "output" / f"{name}.safetensors"), said


@pytest.mark.parametrize("more", [(), ("--dim_from_weights",)], ids=["", "its ranks"])
def test_a_training_starts_from_what_a_shallower_model_has_learned(deep: Path, more: tuple[str]) -> None:
    start = ["--network_weights", "28.safetensors", "--learning_rate", 0, *more]
    found, said = train(deep, "begun", *start)

    assert said.count("the changes of a block are applied to its copies too") == 1
    stored = load_file(deep / "28.safetensors")
    layer = f"_{TARGET.replace('.', '_')}"
    for block, origin in enumerate(OF_40):
        for end in ("lora_down.weight", "lora_up.weight"):
            ours = found[f"lora_unet_blocks_{block}{layer}.{end}"]
            assert ours.equal(stored[f"lora_unet_blocks_{origin}{layer}.{end}"])


def test_a_base_with_a_shallower_lora_is_the_merged_model(deep: Path) -> None:
    default, _ = train(deep, "usual")
    given, _ = train(deep, "given", "--base_weights", "28.safetensors")
    merge = ["merge_lora.py", "--dit", "model/dit.safetensors", "--lora_weight", "28.safetensors"]
    succeed_here(*merge, "--save_merged_model", "merged.safetensors", folder=deep)
    merged, _ = train(deep, "merged", "--pretrained_model_name_or_path", "merged.safetensors")

    assert given.keys() == merged.keys()
    assert all(tensor.equal(merged[name]) for name, tensor in given.items())
    assert not all(tensor.equal(default[name]) for name, tensor in given.items())


@pytest.mark.parametrize("option", ["--network_weights", "--base_weights", "--training_adapter"])
def test_a_training_refuses_a_lora_of_a_deeper_model(deep: Path, option: str) -> None:
    code, said = run_here(*FAMILY.train, *OUTPUT, option, "52.safetensors", folder=deep)
    assert_one_message(code, said, "52.safetensors is for 52 blocks", "has 40")


def test_loras_beside_the_layers_are_mapped_too(deep: Path) -> None:
    """As --training_adapter, --sample_lora and --teacher_lora put them there."""
    model = frozen(AnimaModel(replace(CONFIG, num_layers=40)), tiny_state(num_layers=40))
    given = tiny_inputs(1)
    added = add_loras(model, [WeightedLora(read_lora(deep / "28.safetensors"))])
    changes = write_lora(deep / "28.safetensors", range(28))
    state = tiny_state(num_layers=40)
    for block, origin in enumerate(OF_40):
        state[f"blocks.{block}.{TARGET}.weight"] += changes[origin]
    merged = frozen(AnimaModel(replace(CONFIG, num_layers=40)), state)

    with torch.no_grad(), added.switched_on(torch.device("cpu"), torch.float32):
        found = model(**given)
        expected = merged(**given)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
