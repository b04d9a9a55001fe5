"""LoRA on FramePack: fidelity, files of diffusers, LoRAs of HunyuanVideo, names of its modules."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoFramepackPipeline
from torch import Tensor, nn

from frame_pack.files import load_dit
from frame_pack.names import FRAMEPACK
from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.delta import read_delta
from networks.fused_loras import split_fused
from networks.key_formats import to_native
from networks.loading import LoraFile, WeightedLora, read_lora
from networks.metadata import save_network
from networks.module_names import module_path
from protocols.loading import Placement
from tests.frame_pack.making import golden_model, in_diffusers, run_there, tiny_inputs, tiny_model
from tests.golden_cases import FLOAT32_POWERS, read_case
from tests.manifests import tensor_list
from tests.networks import making
from tests.networks.test_read_by_comfyui import factors
from tests.tiny import hunyuan_dit
from tests.tiny.framepack_dit import tiny_state, write_dit
from tests.tiny.hunyuan_dit import diffusers_state
from tests.tiny.loras import lora_like, make_lora, unused


def test_forward_loss_and_gradients_equal_the_recorded_ones() -> None:
    description, tensors = read_case("framepack_lora")
    settings, sigma = description["lora"], description["t_in_0_1"]
    dit, inputs, _ = golden_model()
    network = make_lora("lora_framepack", settings["rank"], settings["alpha"], dit)
    found = [
        [name, layer.lora_down.in_features, layer.lora_up.out_features]
        for name, layer in network.named_children()
    ]
    assert found == settings["modules_name_in_out"]
    making.golden_lora(network, settings["weights_model_key"], settings["lora_up_extra_scale"])
    network.attach()
    inputs |= {
        "noisy": (1 - sigma) * tensors["latents"] + sigma * tensors["noise"],
        "timesteps": tensors["timestep"],
        "guidance": torch.tensor([10000.0]),
    }

    out = dit(**inputs)
    loss = nn.functional.mse_loss(out, tensors["noise"] - tensors["latents"])
    loss.backward()

    assert (out - tensors["out"]).abs().max() <= FLOAT32_POWERS * tensors["out"].abs().max()
    making.assert_recorded(making.own_gradients(network), dit, loss, description, tensors)


# Files that go to and come from diffusers

IN_DIFFUSERS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "blocks": r".*blocks\.\d+\..*(to_\w|to_out\.0|add_\w_proj|to_add_out|"
    r"net\.0\.proj|net\.2|proj_mlp|proj_out|linear)",
    "last": r"norm_out\.linear|proj_out|time_text_embed.timestep_embedder.linear_2",
    "its own": r"image_projection\.\w+|clean_x_embedder\.proj\w*|.*to_v",
}


@torch.no_grad()
def run_here(path: Path) -> Tensor:
    """What the model with a LoRA file added gives."""
    return making.add_lora(tiny_model(), path)(**tiny_inputs())


def load_there(theirs: Any, path: Path) -> None:
    """Load a LoRA file by the pipeline that users of diffusers call, of which only the transformer is
    there.
    """
    others = {
        name: None
        for name in inspect.signature(HunyuanVideoFramepackPipeline).parameters
        if name != "transformer"
    }
    HunyuanVideoFramepackPipeline(transformer=theirs, **others).load_lora_weights(
        str(path.parent), weight_name=path.name
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"exclude_patterns": r"[r'.*ff.*', r'single_transformer_blocks\.1\..*']"}]
)
def test_a_lora_made_here_acts_in_diffusers_as_here(tmp_path: Path, arguments: dict[str, str]) -> None:
    network = make_lora("lora_framepack", 4, 3.0, tiny_model(), **arguments)
    making.randomize(network)
    save_network(
        network, tmp_path / "lora.safetensors", torch.float32, {"ss_base_model_version": "framepack"}
    )
    convert_file(tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "other")
    theirs = in_diffusers()

    load_there(theirs, tmp_path / "other.safetensors")

    layers = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == len(network.layers)

    with torch.no_grad():
        expected, plain = run_there(theirs, tiny_inputs()), tiny_model()(**tiny_inputs())
    making.assert_near(run_here(tmp_path / "lora.safetensors"), expected)
    assert (expected - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("targets", "with_settings"), [("attention", False), ("blocks", True), ("last", True), ("its own", False)]
)
def test_a_lora_that_diffusers_saves_acts_here_as_there(
    tmp_path: Path, targets: str, with_settings: bool
) -> None:
    alpha = 3 if with_settings else 4  # without settings in the file alpha is the rank
    theirs = in_diffusers()
    file = tmp_path / "theirs.safetensors"
    path = making.saved_by_diffusers(theirs, file, IN_DIFFUSERS[targets], alpha, with_settings)

    out = run_here(path)

    with torch.no_grad():
        expected = run_there(theirs, tiny_inputs())

    making.assert_near(out, expected)
    assert (out - tiny_model()(**tiny_inputs())).abs().max() > 1e-3


CPU = torch.device("cpu")
TRUNK = hunyuan_dit.tiny_state()  # HunyuanVideo's weights, which the tiny FramePack below has too


def changes(state: dict[str, Tensor], *uses: WeightedLora) -> dict[str, Tensor]:
    """What LoRAs add to each weight."""
    patch = LoraPatch(uses)
    found = {name: patch(name, weight) - weight for name, weight in state.items()}
    patch.check()
    assert unused(patch) == []
    return found


MATRICES = [
    name.removesuffix(".weight")
    for name, weight in TRUNK.items()
    if name.endswith(".weight") and weight.ndim > 1
]


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "difference"])
def test_a_lora_on_every_matrix_of_hunyuan_video_adds_the_same_to_framepack(kind: str) -> None:
    generator, tensors = torch.Generator().manual_seed(3), dict[str, Tensor]()
    for module in MATRICES:
        made = factors(kind, TRUNK[f"{module}.weight"].flatten(1), generator)
        if kind == "difference":
            made["diff_b"] = 0.1 * torch.randn(len(made["diff"]), generator=generator)
        tensors |= {f"lora_unet_{module.replace('.', '_')}.{part}": one for part, one in made.items()}
    metadata = {"ss_base_model_version": "hunyuan_video"}
    lora = WeightedLora(LoraFile(Path("hv.safetensors"), tensors, metadata, "ours"), 0.7)

    # a FramePack that has the tiny HunyuanVideo's weights wherever both have one of that name
    here = changes(tiny_state() | diffusers_state(TRUNK), lora)
    there = diffusers_state(changes(TRUNK, lora))

    assert there.keys() <= here.keys()
    for name, delta in here.items():
        if name not in there:
            assert not delta.any(), name
            continue
        # float32, the weight was added and taken off
        torch.testing.assert_close(delta, there[name], rtol=0, atol=2e-6)
        assert delta.ndim == 1 or bool(delta.any()), name


def test_training_can_start_from_a_lora_of_hunyuan_video(tmp_path: Path) -> None:
    making.saved(tmp_path / "lora.safetensors", alpha=3)
    lora, dit = read_lora(tmp_path / "lora.safetensors"), tiny_model()
    network = lora_like("lora_framepack", lora.tensors, dit)

    errors = network.load_weights(tmp_path / "lora.safetensors")

    assert errors == []
    assert {layer.scale for layer in network.layers} == {3 / 4}
    expected = changes(tiny_state(), WeightedLora(lora))
    for name, layer in network.named_children():
        delta = read_delta(
            {f"lora_{part}.weight": getattr(layer, f"lora_{part}").weight for part in ("down", "up")}
        ).compute_change(CPU)
        path = module_path(name.removeprefix("lora_unet_"), FRAMEPACK)
        assert delta is not None
        torch.testing.assert_close(3 / 4 * delta, expected[f"{path}.weight"], rtol=0, atol=2e-6)
    assert len(network.layers) == 2 * 12 + 3 * 5


def test_a_hunyuan_lora_of_another_width_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    name, part = "lora_unet_single_blocks_0_linear1", "lora_unet_single_transformer_blocks_0"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(56, 2)}
    split_sizes = {f"{part}_attn_to_{character}": 8 for character in "qkv"} | {f"{part}_proj_mlp": 16}

    assert split_fused(tensors, split_sizes.get).keys() == tensors.keys()
    assert "its 56 rows are not those of its parts, which have 8 + 8 + 8 + 16; it is not split" in caplog.text


# Patterns


@pytest.mark.parametrize(
    ("include", "exclude", "changed"),
    [
        ("single_blocks", None, {"single_transformer_blocks": 15}),
        (
            "img_attn_qkv",
            "attn_to_k",
            {"transformer_blocks.0.attn.to_q": 1, "transformer_blocks.1.attn.to_v": 1, ".to_": 4},
        ),
        (None, "single_(transformer_)?blocks|linear", {".ff": 8}),
    ],
)
def test_patterns_may_be_written_for_the_names_in_the_file_or_in_the_model(
    tmp_path: Path, include: str | None, exclude: str | None, changed: dict[str, int]
) -> None:
    making.saved(tmp_path / "lora.safetensors")

    found = changes(
        tiny_state(), WeightedLora(read_lora(tmp_path / "lora.safetensors"), 1.0, include, exclude)
    )

    names = [name for name, delta in found.items() if delta.any()]
    for part, number in changed.items():
        assert len([name for name in names if part in name]) == number
    assert all((include or "single") != "single" or "single" not in name for name in names)


# What does not belong together


@pytest.mark.parametrize(
    "metadata",
    [{"ss_base_model_version": "framepack"}, {"modelspec.architecture": "framepack/lora"}],
    ids=["ss", "modelspec"],
)
def test_a_framepack_lora_on_hunyuan_video_is_warned_about(
    metadata: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    name = "lora_unet_transformer_blocks_0_attn_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 128), f"{name}.lora_up.weight": torch.ones(128, 2)}
    said, unsaid = (
        WeightedLora(LoraFile(Path("fp.safetensors"), tensors, one, "ours")) for one in (metadata, {})
    )
    changes(tiny_state(), said)
    changes(TRUNK, unsaid)
    assert not caplog.records

    for state in (TRUNK, diffusers_state(TRUNK)):
        changes(state, said)
        assert "fp.safetensors was trained for framepack according to its metadata" in caplog.text
        assert "is used on a hunyuan_video model" in caplog.text
        caplog.clear()


def test_a_lora_of_wan_is_refused_with_both_models_named(tmp_path: Path) -> None:
    tensors = {"lora_unet_blocks_0_ffn_0.diff": torch.ones(2, 2)}
    patch = LoraPatch([WeightedLora(LoraFile(Path("wan.safetensors"), tensors, {}, "ours"))])

    load_dit(write_dit(tmp_path, tiny_state()), Placement(CPU, patch=patch))

    with pytest.raises(
        CheckpointError,
        match=r"wan.safetensors does not fit this model.* It is for wan, the model is framepack",
    ):
        patch.check()


# The lists of names


def test_every_module_of_the_published_model_is_named() -> None:
    for name in tensor_list("framepack-dit"):
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and not (
            path.startswith("context_embedder.") and path.endswith((".norm1", ".norm2"))
        ):
            assert module_path(path.replace(".", "_"), FRAMEPACK) == path


@pytest.mark.parametrize("start", ["diffusion_model.", "transformer."])
@pytest.mark.parametrize("knows_attention", [False, True], ids=["before", "since it knows Qwen-Image"])
def test_the_odd_names_of_the_known_tuners_conversion_are_read(knows_attention: bool, start: str) -> None:
    """It replaces underscores after HunyuanVideo's rules, but for modules of another model of equal names."""
    network = make_lora("lora_framepack", 4, 3.0, tiny_model())

    def odd(name: str) -> str:
        path = name.removeprefix("lora_unet_")
        if knows_attention and path.startswith("transformer_blocks") and "_attn_" in path:
            return str(module_path(path, FRAMEPACK))
        return path.replace("_", ".").replace("attn.", "attn_")

    names = [f"{start}{odd(name)}.lora_{factor}.weight" for name in network.names for factor in "AB"]

    found = to_native({name: torch.ones(2, 2) for name in names})

    assert {name.partition(".")[0] for name in found.tensors} == set(network.names)
    assert found.unknown_keys == found.unnamed_text_keys == ()
