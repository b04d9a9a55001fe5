"""What every family's transformer has to do alike: recomputed blocks, samples in between, files in fp8."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import frame_pack.files
import hunyuan_model.checkpoints
import hunyuan_model.family
import tests.frame_pack.making as framepack_making
import tests.hunyuan_model.making as hunyuan_making
import tests.wan.making as wan_making
import wan.checkpoints
import wan.family
from modules.contract.family import DitSpec
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from modules.run_blocks import spec_of
from tests.tiny import framepack_dit, hunyuan_dit, wan_dit

CPU = Placement(torch.device("cpu"))
PLAIN_FP8 = 0.07  # float8_e4m3fn has three digits of mantissa


@dataclass(frozen=True)
class Transformer:
    """A family's tiny image-to-video transformer, the one with the most parts."""

    spec: DitSpec
    model: Callable[[str], nn.Module]
    inputs: Callable[[str], dict[str, Any]]
    state: Callable[[str], dict[str, Tensor]]
    write: Callable[[Path, dict[str, Tensor], str], Path]
    load: Callable[[Path, Placement], nn.Module]
    fp8_dialects: tuple[str, ...]
    layout: str  # a dialect as far from the published names and files as there is
    linear: str  # a layer of a block that files in 8 bits hold so
    norm: str  # of a block
    always_float32: tuple[str, ...]  # layers that compute so whatever the others do


TRANSFORMERS = {
    "wan": Transformer(
        wan.family.DIT,
        wan_making.tiny_model,
        wan_making.tiny_inputs,
        wan_dit.tiny_state,
        wan_dit.write_dit,
        wan.checkpoints.load_dit,
        wan_dit.FP8_DIALECTS,
        "diffusers",
        "blocks.1.ffn.0",
        "blocks.0.norm3",
        ("time_projection.1", "head.head"),
    ),
    "hunyuan_video": Transformer(
        hunyuan_model.family.DIT,
        hunyuan_making.tiny_model,
        hunyuan_making.tiny_inputs,
        hunyuan_dit.tiny_state,
        hunyuan_dit.write_dit,
        hunyuan_model.checkpoints.load_dit,
        hunyuan_dit.FP8_DIALECTS,
        "diffusers",
        "double_blocks.1.txt_mlp.fc1",
        "single_blocks.0.q_norm",
        ("time_in.mlp.2",),
    ),
    "framepack": Transformer(
        frame_pack.configs.DIT,
        lambda _: framepack_making.tiny_model(),
        lambda _: framepack_making.tiny_inputs(),
        lambda _: framepack_dit.tiny_state(),
        framepack_dit.write_dit,
        frame_pack.files.load_dit,
        framepack_dit.FP8_DIALECTS,
        "folder",
        "single_transformer_blocks.1.proj_mlp",
        "transformer_blocks.0.attn.norm_q",
        (
            "time_text_embed.guidance_embedder.linear_2",
            "proj_out",
            "context_embedder.time_text_embed.text_embedder.linear_1",
        ),
    ),
}
FP8_FILES = [(name, dialect) for name, each in TRANSFORMERS.items() for dialect in each.fp8_dialects]


@pytest.fixture(params=TRANSFORMERS)
def transformer(request: pytest.FixtureRequest) -> Transformer:
    return TRANSFORMERS[request.param]


def test_the_class_states_the_names_that_its_family_gives_to_the_loops(transformer: Transformer) -> None:
    model = transformer.model("i2v")

    assert spec_of(model) is transformer.spec
    assert all(blocks for blocks in transformer.spec.blocks(model).values())


def test_a_model_that_made_a_sample_in_inference_mode_trains_on(transformer: Transformer) -> None:
    model, inputs = transformer.model("i2v").requires_grad_(True).train(), transformer.inputs("i2v")
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).square().mean().backward()
    assert any(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(("name", "dialect"), FP8_FILES)
def test_fp8_files_compute_in_bfloat16_with_their_scales_applied(
    tmp_path: Path, name: str, dialect: str
) -> None:
    transformer = TRANSFORMERS[name]
    state = transformer.state("i2v")

    dit = transformer.load(transformer.write(tmp_path, state, dialect), CPU)

    assert dit.compute_dtype == torch.bfloat16
    for parameter, tensor in dit.state_dict().items():
        assert tensor.dtype.itemsize > 1, parameter
        torch.testing.assert_close(tensor.float(), state[parameter], rtol=PLAIN_FP8, atol=0.01, msg=parameter)


def test_row_scales_are_exact_where_the_stored_numbers_are(tmp_path: Path, transformer: Transformer) -> None:
    path = transformer.write(tmp_path, transformer.state("i2v"), "fp8_row_scale")
    stored = load_file(path)

    dit = transformer.load(path, replace(CPU, compute_dtype=torch.float32))

    expected = stored[f"{transformer.linear}.weight"].float() * stored[f"{transformer.linear}.scale_weight"]
    assert torch.equal(dit.get_parameter(f"{transformer.linear}.weight"), expected)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [("float32", None, "float32"), ("float16", None, "float16"), ("float32", "bfloat16", "bfloat16")],
)
def test_weights_take_the_file_dtype_or_the_one_asked_for(
    tmp_path: Path, transformer: Transformer, stored: str, asked: str | None, expected: str
) -> None:
    state = {name: tensor.to(getattr(torch, stored)) for name, tensor in transformer.state("i2v").items()}
    path = transformer.write(tmp_path, state, "safetensors")

    dit = transformer.load(path, replace(CPU, compute_dtype=getattr(torch, asked) if asked else None))

    assert dit.compute_dtype == getattr(torch, expected)
    for name in (transformer.norm, transformer.linear):
        assert dit.get_parameter(f"{name}.weight").dtype == getattr(torch, expected)
    for name in transformer.always_float32:
        assert dit.get_parameter(f"{name}.weight").dtype == torch.float32
    assert dit(**transformer.inputs("i2v")).isfinite().all()


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(
    tmp_path: Path, transformer: Transformer
) -> None:
    state, before = transformer.state("i2v"), transformer.linear.partition(".1.")[0]
    rest = transformer.linear.partition(".1.")[2]
    for block in (0, 1):
        del state[f"{before}.{block}.{rest}.bias"]
    state[f"{before}.0.extra.weight"] = torch.zeros(2)
    needed = len(state[f"{transformer.norm}.weight"])
    state[f"{transformer.norm.replace('.0.', '.1.')}.weight"] = torch.zeros(7)

    with pytest.raises(CheckpointError) as caught:
        transformer.load(transformer.write(tmp_path, state, "safetensors"), CPU)

    lines = str(caught.value).splitlines()
    assert f"  missing: {before}.{{0..1}}.{rest}.bias" in lines
    assert f"  unexpected: {before}.0.extra.weight" in lines
    assert f"  {transformer.norm.replace('.0.', '.1.')}.weight: the file has 7, {needed} is needed" in lines


def test_a_patch_sees_published_names_and_unrounded_whole_weights(
    tmp_path: Path, transformer: Transformer
) -> None:
    state, seen, changed = transformer.state("i2v"), {}, f"{transformer.linear}.weight"

    def patch(name: str, weight: Tensor) -> Tensor:
        seen[name] = weight.clone()
        return weight + 1 if name == changed else weight

    path = transformer.write(tmp_path, state, transformer.layout)
    dit = transformer.load(path, replace(CPU, compute_dtype=torch.bfloat16, patch=patch))

    assert seen.keys() == state.keys()
    assert all(torch.equal(seen[name], state[name]) for name in state)
    assert torch.equal(dit.get_parameter(changed), (state[changed] + 1).to(torch.bfloat16))
