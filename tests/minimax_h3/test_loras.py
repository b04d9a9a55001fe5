"""LoRAs of MiniMax-H3 in every dialect: as diffusers reads them, merged, converted, and in generation."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MiniMaxH3Transformer3DModel
from diffusers.loaders import MiniMaxH3LoraLoaderMixin
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from checkpoints.opening import open_checkpoint
from checkpoints.quantizing import dequantized_on_read
from minimax_h3.configs import AUDIO
from minimax_h3.dit_checkpoints import load_dit
from protocols.loading import Placement
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.minimax_h3.test_generation import PROMPT, STEPS, generate, latents_in
from tests.minimax_h3.test_model import rows_of_audio
from tests.minimax_h3.tiny_dit import SIZES, released, their_dit
from tests.parity.running import assert_equal, relative_error
from tests.tiny.language_models import DIM as TEXT_DIM
from tests.tiny.minimax_h3 import TinyH3, their_pipeline, write_tiny_h3

HEAD = 128  # the release's, which DiffSynth's order of rows depends on
HEADS, DIM, FEED = 2, 192, 512  # in the release's proportions, by which models are told apart
CHANGES = {
    "attention_head_dim": HEAD,
    "num_attention_heads": HEADS,
    "hidden_size": DIM,
    "ffn_dim": FEED,
    "text_dim": TEXT_DIM,
}
RANK, ALPHA = 4, 2.0
OF_BLOCK = ("attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2")
OUTSIDE = ("video_patch_proj", "condition_proj", "final_layer.video_out", "final_layer.audio_out")
BLOCKS = [f"blocks.{number}." for number in range(SIZES["num_layers"])]
REFINER = [f"token_refiner.blocks.{number}." for number in range(SIZES["num_refiner_layers"])]
PATHS = [
    *(block + layer for block in (*REFINER, *BLOCKS) for layer in OF_BLOCK),
    *(f"{block}adaln_proj.linear" for block in BLOCKS),
    *OUTSIDE,
]
CPU = torch.device("cpu")
Factors = Mapping[str, tuple[Tensor, Tensor]]


def state() -> dict[str, Tensor]:
    return released(their_dit(**CHANGES).state_dict())


def factors(scale: float = 0.1) -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up of each layer, rows stacked."""
    generator = torch.Generator().manual_seed(5)
    made = {}
    for path in PATHS:
        rows, columns = state()[f"{path}.weight"].shape
        made[path] = (
            scale * torch.randn(RANK, columns, generator=generator),
            scale * torch.randn(rows, RANK, generator=generator),
        )
    return made


def as_known(made: Factors) -> dict[str, Tensor]:
    tensors = {}
    for path, (down, up) in made.items():
        name = "lora_unet_" + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def as_peft(made: Factors, start: str = "", ending: str = "") -> dict[str, Tensor]:
    """Without alphas: alpha / rank is in the factors."""
    tensors = {}
    for path, (down, up) in made.items():
        tensors[f"{start}{path}.lora_A{ending}.weight"] = down
        tensors[f"{start}{path}.lora_B{ending}.weight"] = up * ALPHA / RANK
    return tensors


def interleave(up: Tensor) -> Tensor:
    """Rows [q; k; v] as [q0 k0 v0, q1 k1 v1, ...]."""
    return up.unflatten(0, (3, HEADS, HEAD)).transpose(0, 1).flatten(0, 2)


def as_diffsynth(made: Factors) -> dict[str, Tensor]:
    in_order = {
        path: (down, interleave(up) if path.endswith("qkv_proj") else up) for path, (down, up) in made.items()
    }
    return as_peft(in_order, ending=".default")


def as_diffusers(made: Factors) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = MiniMaxH3LoraLoaderMixin.lora_state_dict(as_known(made))
    return tensors


DIALECTS: dict[str, Callable[[Factors], dict[str, Tensor]]] = {
    "the known tuner": as_known,
    "ComfyUI": lambda made: as_peft(made, "diffusion_model."),
    "no prefix": as_peft,
    "DiffSynth": as_diffsynth,
    "diffusers": as_diffusers,
    "diffusers, of references": lambda made: {
        f"transformer_ref.{name.removeprefix('transformer.')}": tensor
        for name, tensor in as_diffusers(made).items()
    },
}


def predict(dit: Path) -> Tensor:
    """What our network of a file predicts, pictures and sound joined."""
    with torch.no_grad():
        images, audio = load_dit(dit, Placement(CPU))(VIDEO, HEARD, (0.3, 0.6), TEXT)
    return torch.cat([patchify(images).flatten(), rows_of_audio(audio).flatten()])


def patchify(pictures: Tensor) -> Tensor:
    from diffusers.modular_pipelines.minimax_h3.before_denoise import patchify_video_latents

    return patchify_video_latents(pictures, (1, 2, 2))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VIDEO, HEARD = random(1, 24, 2, 4, 6, seed=1), random(1, 32, 2, 5, seed=2)
TEXT = random(1, 7, TEXT_DIM, seed=3)


def predict_there(load: Callable[[Any], None] = lambda dit: None) -> Tensor:
    """The same in diffusers. load: puts a LoRA into its transformer."""
    theirs = MiniMaxH3Transformer3DModel(**{**SIZES, **CHANGES}).eval()
    theirs.load_state_dict(their_dit(**CHANGES).state_dict())
    load(theirs)
    places, tags, video, audio, text, *_ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(7, dtype=torch.long),
        2,
        4,
        6,
        5,
        (1, 2, 2),
        2,
        audio_tag=AUDIO,
        video_tag=0,
        keyframe_anchors=(),
    )
    with torch.no_grad():
        output = theirs(
            hidden_states=patchify(VIDEO)[None],
            audio_hidden_states=rows_of_audio(HEARD)[None],
            encoder_hidden_states=TEXT,
            timestep=torch.tensor([0.3, 0.6]),
            timestep_indices=(tags == AUDIO).long(),
            token_tags=tags,
            position_ids=places,
            video_indices=video,
            audio_indices=audio,
            text_indices=text,
        )
    return torch.cat([output.sample.flatten(), output.audio_sample.flatten()])


def loaded(tensors: Mapping[str, Tensor]) -> Callable[[Any], None]:
    def load(dit: Any) -> None:
        read = MiniMaxH3LoraLoaderMixin.lora_state_dict(dict(tensors))
        (start,) = {name.partition(".")[0] for name in read}
        dit.load_lora_adapter(read, prefix=start)

    return load


def write_dit(folder: Path, name: str = "minimax_h3_fl2va_fp32.safetensors") -> Path:
    path = folder / name
    save_file(state(), path)
    return path


def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


def merge(folder: Path, dit: Path, lora: Path, *words: str) -> Path:
    folder.mkdir(exist_ok=True)
    merged = folder / "merged.safetensors"
    fixed = ("--dit", dit, "--lora_weight", lora, "--save_merged_model", merged, "--device", "cpu")
    succeed_here("merge_lora.py", *fixed, *words, folder=folder)
    return merged


DAILY = {"the known tuner", "DiffSynth", "diffusers"}


def with_slow(dialects: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in dialects]


@pytest.mark.parametrize("dialect", with_slow(DIALECTS))
def test_each_dialect_acts_as_in_diffusers(tmp_path: Path, dialect: str) -> None:
    tensors = DIALECTS[dialect](factors())
    lora = write_lora(tmp_path / "lora.safetensors", tensors)
    expected = predict_there(loaded(tensors))

    merged = merge(tmp_path, write_dit(tmp_path), lora)

    assert_equal(predict(merged), expected, dialect, 1e-5)
    assert relative_error(expected, predict_there()) > 0.01


@pytest.mark.parametrize("target", ["other", pytest.param("comfyui", marks=pytest.mark.slow), "diffusers"])
def test_a_converted_lora_acts_in_diffusers_and_comes_back(tmp_path: Path, target: str) -> None:
    """diffusers reads ComfyUI's names too."""
    lora = write_lora(tmp_path / "lora.safetensors", as_known(factors()))
    made, back = tmp_path / "made.safetensors", tmp_path / "back.safetensors"

    convert_lora.main(["--input", str(lora), "--output", str(made), "--target", target])
    convert_lora.main(["--input", str(made), "--output", str(back), "--target", "default"])

    start = "transformer." if target == "diffusers" else "diffusion_model."
    assert all(name.startswith(start) for name in load_file(made))
    expected = predict_there(loaded(as_known(factors())))
    assert_equal(predict_there(loaded(load_file(made))), expected, target, 1e-5)
    assert load_file(back).keys() == load_file(lora).keys()
    for path, (down, up) in factors().items():
        name = "lora_unet_" + path.replace(".", "_")
        found = load_file(back)
        assert found[f"{name}.lora_down.weight"].shape == down.shape, name
        strength = float(found[f"{name}.alpha"]) / len(down)
        change = strength * found[f"{name}.lora_up.weight"] @ found[f"{name}.lora_down.weight"]
        torch.testing.assert_close(change, ALPHA / RANK * up @ down, msg=name)


@pytest.mark.parametrize("dialect", with_slow(["ComfyUI", "no prefix", "DiffSynth", "diffusers"]))
def test_other_dialects_become_the_known_tuners(tmp_path: Path, dialect: str) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", DIALECTS[dialect](factors()))
    made = tmp_path / "made.safetensors"

    convert_lora.main(["--input", str(lora), "--output", str(made), "--target", "default"])

    tensors = load_file(made)
    assert tensors.keys() == as_known(factors()).keys()
    expected = predict_there(loaded(as_known(factors())))
    assert_equal(predict_there(loaded(tensors)), expected, dialect, 1e-5)


def test_a_lora_is_merged_into_shards_of_the_release(tmp_path: Path) -> None:
    """Their rows are by head; in the one file that is written they are stacked, as its name says."""
    shards = tmp_path / "model-00001-of-00001.safetensors"
    by_head = {
        name: interleave(tensor) if name.endswith("qkv_proj.weight") else tensor
        for name, tensor in state().items()
    }
    save_file({name: tensor.contiguous() for name, tensor in by_head.items()}, shards)
    lora = write_lora(tmp_path / "lora.safetensors", as_known(factors()))

    merged = merge(tmp_path, shards, lora)

    assert_equal(predict(merged), predict_there(loaded(as_known(factors()))), "shards", 1e-5)


def share_kept(merged: Path, before: Mapping[str, Tensor], made: Factors) -> float:
    """How much of a LoRA's change the weights of a file have, 1: all, by its direction."""
    tensors = load_file(merged)
    product = norm = 0.0
    for path, (down, up) in made.items():
        change = ALPHA / RANK * up @ down
        name = f"{path}.weight"
        product += float(((tensors[name].float() - before[name].float()) * change).sum())
        norm += float(change.square().sum())
    return product / norm


def test_a_small_lora_keeps_its_effect_in_bf16(tmp_path: Path) -> None:
    """Its changes are a tenth of a step of bf16; rounding to the nearest loses nearly all of them."""
    narrow = {name: tensor.bfloat16() for name, tensor in state().items()}
    dit = tmp_path / "minimax_h3_fl2va_bf16.safetensors"
    save_file(narrow, dit)
    blocks = {path: pair for path, pair in factors(0.007).items() if path.startswith("blocks.")}
    lora = write_lora(tmp_path / "lora.safetensors", as_known(blocks))

    merged = merge(tmp_path, dit, lora)

    assert load_file(merged)["blocks.0.mlp.fc1.weight"].dtype == torch.bfloat16
    assert abs(share_kept(merged, narrow, blocks) - 1) < 0.05
    nearest = merge(tmp_path / "nearest", dit, lora, "--lora_rounding", "nearest")
    assert share_kept(nearest, narrow, blocks) < 0.6


def test_a_lora_is_merged_into_an_int8_file(tmp_path: Path) -> None:
    """Into the values of the file; the result has 16 bits."""
    dit, quantized = write_dit(tmp_path), tmp_path / "minimax_h3_fl2va_int8_convrot.safetensors"
    words = ("--input", dit, "--output", quantized, "--form", "convrot")
    succeed_here("tools/quantise.py", *words, folder=tmp_path)
    lora = write_lora(tmp_path / "lora.safetensors", as_known(factors()))
    with open_checkpoint(quantized) as opened:
        assert opened.tensors["blocks.0.mlp.fc1.weight"].dtype == torch.int8
        values = dequantized_on_read(opened)
        before = {name: values.read(name) for name in values.tensors}

    merged = merge(tmp_path, quantized, lora)

    assert abs(share_kept(merged, before, factors()) - 1) < 0.01


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lora_unet_blocks_0_attn_proj", ["no module", "lora_unet_blocks_0_attn_proj"]),
        ("lora_unet_transformer_blocks_0_attn_to_q", ["no module", "transformer_blocks_0_attn_to_q"]),
    ],
)
def test_another_flattened_name_is_refused(tmp_path: Path, name: str, parts: list[str]) -> None:
    extra = {f"{name}.lora_down.weight": torch.ones(1, DIM), f"{name}.lora_up.weight": torch.ones(256, 1)}
    lora = write_lora(tmp_path / "lora.safetensors", as_known(factors()) | extra)

    message = reject(tmp_path, lora)

    assert all(part in message for part in parts), message


def reject(folder: Path, lora: Path) -> str:
    words = ("--dit", write_dit(folder), "--lora_weight", lora, "--save_merged_model", "x.safetensors")
    return assert_one_message(*run_here("merge_lora.py", *words, folder=folder), remedy=True)


def test_rows_of_no_whole_heads_are_refused(tmp_path: Path) -> None:
    tensors = as_diffsynth(factors())
    name = "blocks.0.attn.qkv_proj.lora_B.default.weight"
    tensors[name] = tensors[name][:-3]
    assert "765 rows" in reject(tmp_path, write_lora(tmp_path / "lora.safetensors", tensors))


def test_a_file_for_both_networks_is_refused(tmp_path: Path) -> None:
    first = as_diffusers(factors())
    other = {name.replace("transformer.", "transformer_ref.", 1): -tensor for name, tensor in first.items()}
    message = reject(tmp_path, write_lora(tmp_path / "lora.safetensors", first | other))
    assert "for two networks" in message


def test_an_alpha_in_the_header_counts_for_all_ranks(tmp_path: Path) -> None:
    """As in files of lightx2v: modules of several ranks, and one number."""
    made = factors()
    for path, (down, up) in made.items():
        if "adaln" in path:
            made[path] = (down[:2], up[:, :2])
    lora = write_lora(tmp_path / "lora.safetensors", as_peft(made, "diffusion_model."), {"alpha": "6"})

    def load(dit: Any) -> None:
        read, metadata = MiniMaxH3LoraLoaderMixin.lora_state_dict(str(lora), return_lora_metadata=True)
        dit.load_lora_adapter(read, prefix="transformer", metadata=metadata)

    assert_equal(predict(merge(tmp_path, write_dit(tmp_path), lora)), predict_there(load), "alpha", 1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    folder = tmp_path_factory.mktemp("h3 with loras")
    return replace(write_tiny_h3(folder / "model"), dit=write_dit(folder))


@pytest.fixture(scope="module")
def expected(files: TinyH3) -> dict[str, Tensor]:
    """What diffusers' pipeline makes with the LoRA."""
    pipe = their_pipeline(files)
    dit = MiniMaxH3Transformer3DModel(**{**SIZES, **CHANGES}).eval()
    dit.load_state_dict(their_dit(**CHANGES).state_dict())
    loaded(as_known(factors()))(dit)
    pipe.update_components(transformer=dit)
    made = pipe(
        prompt=PROMPT.replace("\\n", "\n"),
        height=32,
        width=64,
        num_frames=124,
        num_inference_steps=STEPS + 1,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).values
    return {"latent": made["latents"][0], "audio_latents": made["audio_latents"].transpose(0, 1)}


@pytest.mark.parametrize(
    "dialect",
    ["the known tuner", *(pytest.param(name, marks=pytest.mark.slow) for name in [*DIALECTS][1:])],
)
def test_clips_with_a_lora_are_those_of_diffusers(
    tmp_path: Path, files: TinyH3, expected: dict[str, Tensor], dialect: str
) -> None:
    lora = write_lora(tmp_path / "lora.safetensors", DIALECTS[dialect](factors()))

    generate(tmp_path, files, "--lora_weight", str(lora), "--output_type", "latent")

    made = latents_in(tmp_path / "made")
    for name, latents in expected.items():
        assert_equal(made[name], latents, f"{dialect}: {name}", 1e-5)


def test_a_lora_of_one_network_is_taken_by_the_other(tmp_path: Path) -> None:
    """Files of both have the same names and sizes; the name of a LoRA's tensors forbids nothing."""
    tensors = DIALECTS["diffusers, of references"](factors())
    lora = write_lora(tmp_path / "lora.safetensors", tensors)
    first = predict(merge(tmp_path / "first", write_dit(tmp_path), lora))
    other = write_dit(tmp_path, "minimax_h3_ref2va_fp32.safetensors")
    assert torch.equal(predict(merge(tmp_path / "other", other, lora)), first)
