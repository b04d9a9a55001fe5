"""A clip with control, mask and references is cached and learned by VACE as diffusers' networks have it.

The caches are made by the command, the first step of training is compared with the gradient of diffusers'
transformer at the same noise: the factors that begin at zero are then the rate times that gradient, times the
other factors.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import load_file
from torch import Tensor

from dataset.batches.finding import find_items, require_items, with_reference_sizes
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch
from dataset.cache.store import Stores
from dataset.config import load_dataset_config, with_references
from modules.media.writing import write_png, write_video
from protocols.data import CONTROL_MASK
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.parity.reference import to_pixels
from tests.parity.running import TOLERANCE, assert_equal, decoded
from tests.parity.test_training import DESCENT, RATE, by_sigma, draw
from tests.parity.test_vace import their_dit
from tests.parity.theirs import Theirs
from tests.parity.training import ALPHA, RANK, SEED, Item
from tests.tiny.wan import write_tiny_wan
from training.planning.memory import largest_batch
from wan.family import VACE_REFERENCES
from wan.spec import LATENT

WIDTH, HEIGHT, FRAMES = 48, 32, 9
DATASET = """
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
control_directory = "control"
control_mask_directory = "masks"
reference_directory = "references"
resolution = [48, 32]
target_frames = [9]
batch_size = 1
caption_extension = ".txt"
"""
ENCODE = ("--dataset_config", "dataset.toml", "--device", "cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip with all that VACE takes, cached."""
    folder, random = tmp_path_factory.mktemp("a project"), numpy.random.default_rng(4)
    write_tiny_wan(folder / "models", "vace")
    for name in ("clips", "control", "masks", "references"):
        (folder / name).mkdir()
    for name in ("clips", "control"):
        frames = random.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=numpy.uint8)
        write_video(folder / name / "a.mp4", frames, fps=16)
    mask = numpy.zeros((HEIGHT, WIDTH, 3), numpy.uint8)
    mask[:, 20:] = 255
    write_png(folder / "masks" / "a.png", mask)
    for index, size in enumerate(((32, 48), (48, 24))):
        write_png(
            folder / "references" / f"a_{index}.png", random.integers(0, 256, (*size, 3), dtype=numpy.uint8)
        )
    (folder / "clips" / "a.txt").write_text("a red apple", encoding="utf-8")
    (folder / "dataset.toml").write_text(DATASET, encoding="utf-8")
    vae = ("--vae", "models/vae.safetensors", "--vae_dtype", "float32")
    succeed_here("wan_cache_latents.py", *ENCODE, *vae, "--vace", folder=folder)
    succeed_here("wan_cache_text_encoder_outputs.py", *ENCODE, "--t5", "models/t5.safetensors", folder=folder)
    return folder


def their_control(project: Path) -> tuple[Tensor, Tensor]:
    """The clip's latents and the 96 channels, both with references in front: 16 or 96, F h w."""
    theirs = Theirs(project / "models")

    def encode(pixels: Tensor) -> Tensor:
        return theirs.encode(pixels)[0]

    clip, control = (to_pixels(decoded(project / name / "a.mp4")[:FRAMES]) for name in ("clips", "control"))
    mask = torch.zeros(1, 1, FRAMES, HEIGHT, WIDTH)
    mask[..., 20:] = 1
    halves = torch.cat([encode(control * (1 - mask)), encode(control * mask)])
    folded = mask[0, 0, :3].view(3, HEIGHT // 8, 8, WIDTH // 8, 8).permute(2, 4, 0, 1, 3).flatten(0, 1)
    fronts = [encode(pixels) for pixels in their_references(project)][::-1]
    front = torch.cat(fronts, dim=1)
    rest = torch.zeros(80, *front.shape[1:])
    control = torch.cat([torch.cat([front, rest]), torch.cat([halves, folded])], dim=1)
    return torch.cat([front, encode(clip)], dim=1), control


def their_references(project: Path) -> list[Tensor]:
    """The first fills the frame, the other one stands in the middle, reduced to 32 x 16: 1 3 1 H W each."""
    first, second = (to_pixels(decoded(project / "references" / f"a_{index}.png")) for index in (0, 1))
    reduced = torch.nn.functional.interpolate(second[:, :, 0], (32, 16), mode="bilinear")
    levels = ((reduced / 2 + 0.5) * 255).round() / 127.5 - 1  # as bytes
    canvas = torch.ones_like(first)
    canvas[:, :, 0, :, 16:32] = levels
    return [first, canvas]


def train(project: Path, name: str, *options: object) -> dict[str, Tensor]:
    models = ["--task", "vace-1.3B", "--dit", "models/dit.safetensors", "--sdpa"]
    network = ["--network_module", "networks.lora_wan", "--network_dim", RANK, "--network_alpha", ALPHA]
    run = ["--dataset_config", "dataset.toml", "--max_train_steps", 1, "--seed", SEED]
    run += ["--max_data_loader_n_workers", 0, "--output_dir", "out", "--output_name", name, *DESCENT]
    succeed_here("wan_train_network.py", *models, *network, *run, *options, folder=project)
    return load_file(project / "out" / f"{name}.safetensors")


def their_gradients(project: Path) -> dict[str, Tensor]:
    """The gradient of each weight of a linear layer, by diffusers' names."""
    latents, control = their_control(project)
    (path,) = (project / "cache").glob("*_wan_te.safetensors")
    (text,) = load_file(path).values()
    item = Item(latents, text)
    drawn = draw([item], 0, by_sigma)
    sigma = drawn.sigmas.view(-1, 1, 1, 1, 1)
    noisy = ((1 - sigma) * latents[None] + sigma * drawn.noise).float()
    dit: Any = their_dit(project / "models" / "dit.safetensors")
    padded = torch.nn.functional.pad(text.float(), (0, 0, 0, 512 - len(text)))[None]
    velocity = dit(noisy, drawn.timesteps, padded, control_hidden_states=control[None]).sample
    (velocity - (drawn.noise - latents[None])).square().mean().backward()
    modules = ((name, module) for name, module in dit.named_modules() if isinstance(module, torch.nn.Linear))
    return {name: module.weight.grad for name, module in modules if module.weight.grad is not None}


PARTS = {"self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def their_name(name: str) -> str:
    """`lora_unet_vace_blocks_0_self_attn_q` -> `vace_blocks.0.attn1.to_q`."""
    stack, number, *rest = name.removeprefix("lora_unet_").replace("vace_blocks", "vace-blocks").split("_")
    start = f"{stack.replace('-', '_')}.{number}"
    if rest[0] == "ffn":
        return f"{start}.ffn.{'net.0.proj' if rest[1] == '0' else 'net.2'}"
    return f"{start}.{PARTS['_'.join(rest[:2])]}.{PARTS[rest[2]]}"


def test_caches_hold_what_the_pipeline_encodes(project: Path) -> None:
    (path,) = (path for path in (project / "cache").glob("*_wan.safetensors"))
    found = {
        name.rsplit("_", 2)[0] if "latents" in name else name: one for name, one in load_file(path).items()
    }
    latents, control = their_control(project)

    assert_equal(found["latents"], latents[:, 2:], "latents")
    assert_equal(found["latents_control"], control[:32, 2:], "control")
    for index, place in ((0, 1), (1, 0)):
        assert_equal(found[f"latents_reference_{index}"], control[:16, [place]], f"reference {index}")
    (mask,) = (one for name, one in found.items() if name.startswith("vace_mask"))
    assert mask.dtype == torch.uint8
    assert torch.equal(mask.float() / 255, control[32:, 2:])


def test_the_first_step_is_that_of_plain_torch_in_both_stacks(project: Path) -> None:
    trained = train(project, "both", "--network_args", r"include_patterns=['blocks\..*']")

    gradients, seen = their_gradients(project), {"blocks": 0, "vace": 0}
    for name in (name.removesuffix(".lora_up.weight") for name in trained if name.endswith("lora_up.weight")):
        if "proj" in name:
            continue
        gradient = gradients[their_name(name)] @ trained[f"{name}.lora_down.weight"].T
        expected = -RATE * ALPHA / RANK * gradient
        assert_equal(trained[f"{name}.lora_up.weight"], expected, name, TOLERANCE)
        seen[name.split("_")[2]] += bool(expected.abs().max() > 1e-6)
    assert seen == {"blocks": 40, "vace": 20}


def test_controls_with_and_without_a_mask_learn_together(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project, tmp_path / "two")
    folder = tmp_path / "two"
    for path in [path for name in ("clips", "control", "references") for path in (folder / name).iterdir()]:
        shutil.copy(path, path.with_name(path.name.replace("a", "b", 1)))
    (folder / "dataset.toml").write_text(
        DATASET.replace("batch_size = 1", "batch_size = 2"), encoding="utf-8"
    )
    vae = ("--vae", "models/vae.safetensors", "--vae_dtype", "float32")
    succeed_here("wan_cache_latents.py", *ENCODE, *vae, "--vace", folder=folder)
    succeed_here("wan_cache_text_encoder_outputs.py", *ENCODE, "--t5", "models/t5.safetensors", folder=folder)
    monkeypatch.chdir(folder)
    items = require_items(find_items(load_dataset_config(Path("dataset.toml")), "wan", LATENT))

    (batch,) = BatchOrder(items, 1).epoch(0)
    masks = read_batch(batch, LATENT).tensors[CONTROL_MASK]

    found = {item.source_stem: mask.unique().tolist() for item, mask in zip(batch, masks, strict=True)}
    assert found == {"a": [0, 255], "b": [255]}


def test_a_lora_is_in_the_second_stack_unless_asked(project: Path) -> None:
    trained = train(project, "usual")

    layers = {name.split(".")[0] for name in trained}
    assert len(layers) == 20
    assert all(name.startswith("lora_unet_vace_blocks_") and "proj" not in name for name in layers)


def test_a_checkpoint_of_vace_is_told_from_text_to_video(project: Path) -> None:
    models = [
        "--task",
        "t2v-1.3B",
        "--dit",
        "models/dit.safetensors",
        "--network_module",
        "networks.lora_wan",
    ]
    saved = ["--output_dir", "out", "--output_name", "none", "--dataset_config", "plain.toml"]
    lines = [line for line in DATASET.splitlines() if "control" not in line and "reference" not in line]
    (project / "plain.toml").write_text("\n".join(lines), encoding="utf-8")

    code, message = run_here("wan_train_network.py", *models, *saved, folder=project)

    assert_one_message(code, message, "2 blocks of VACE", "--task vace-1.3B")


def test_the_lora_is_read_by_other_tools(project: Path) -> None:
    """ComfyUI's names are the released ones; diffusers loads its own names, and the effect is the same."""
    trained = train(project, "shared")
    for target in ("comfyui", "diffusers"):
        files = ["--input", "out/shared.safetensors", "--output", f"out/{target}.safetensors"]
        succeed_here("convert_lora.py", *files, "--target", target, folder=project)

    comfy = load_file(project / "out" / "comfyui.safetensors")
    assert "diffusion_model.vace_blocks.1.cross_attn.q.lora_A.weight" in comfy
    assert all(name.startswith("diffusion_model.vace_blocks.") for name in comfy)
    dit: Any = their_dit(project / "models" / "dit.safetensors")
    state = WanLoraLoaderMixin.lora_state_dict(str(project / "out" / "diffusers.safetensors"))
    WanLoraLoaderMixin.load_lora_into_transformer(state, dit, adapter_name="ours")
    inner = {name: module for name, module in dit.named_modules() if hasattr(module, "lora_A")}
    ups = [name.removesuffix(".lora_up.weight") for name in trained if name.endswith("lora_up.weight")]
    assert inner.keys() == {their_name(name) for name in ups}
    for name in ups:
        theirs = inner[their_name(name)]
        product = theirs.lora_B["ours"].weight @ theirs.lora_A["ours"].weight * theirs.scaling["ours"]
        ours = trained[f"{name}.lora_up.weight"] @ trained[f"{name}.lora_down.weight"] * ALPHA / RANK
        assert_equal(product.detach(), ours, name, 1e-6)


def test_a_plan_is_that_of_the_clip_with_references(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of clips of one size, also where a batch has one item."""
    shutil.copytree(project, tmp_path / "other")
    folder = tmp_path / "other"
    for path in [path for name in ("clips", "control") for path in (folder / name).iterdir()]:
        shutil.copy(path, path.with_name(path.name.replace("a", "0", 1)))
    vae = ("--vae", "models/vae.safetensors", "--vae_dtype", "float32")
    succeed_here("wan_cache_latents.py", *ENCODE, *vae, "--vace", folder=folder)
    succeed_here("wan_cache_text_encoder_outputs.py", *ENCODE, "--t5", "models/t5.safetensors", folder=folder)
    monkeypatch.chdir(folder)
    config = with_references(load_dataset_config(Path("dataset.toml")), VACE_REFERENCES)
    items = require_items(find_items(config, "wan", LATENT))

    (largest,) = largest_batch(with_reference_sizes(items, Stores()))

    assert [item.source_stem for item in items] == ["0", "a"]
    assert largest.source_stem == "a"
    bare = items[0].table.with_values(control_directory=None, reference_directory=None)
    without = [dataclasses.replace(item, table=bare) for item in items]
    assert with_reference_sizes(without, Stores()) == without  # no header is read
