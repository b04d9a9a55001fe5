"""What every family's transformer has to do alike: recomputed blocks, samples in between, files in fp8."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frame_pack.checkpoints
import hunyuan_model.checkpoints
import hunyuan_model.family
import tests.frame_pack.making as framepack_making
import tests.hunyuan_model.making as hunyuan_making
import tests.wan.making as wan_making
import wan.checkpoints
import wan.family
from modules.activation import checkpoint_blocks
from modules.family import DitSpec
from modules.records import Placement
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

    def learning(self) -> nn.Module:
        return self.model("i2v").requires_grad_(True).train()

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        model(**self.inputs("i2v")).square().mean().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


TRANSFORMERS = {
    "wan": Transformer(
        wan.family.DIT,
        wan_making.tiny_model,
        wan_making.tiny_inputs,
        wan_dit.tiny_state,
        wan_dit.write_dit,
        wan.checkpoints.load_dit,
        wan_dit.FP8_DIALECTS,
    ),
    "hunyuan_video": Transformer(
        hunyuan_model.family.DIT,
        hunyuan_making.tiny_model,
        hunyuan_making.tiny_inputs,
        hunyuan_dit.tiny_state,
        hunyuan_dit.write_dit,
        hunyuan_model.checkpoints.load_dit,
        hunyuan_dit.FP8_DIALECTS,
    ),
    "framepack": Transformer(
        frame_pack.checkpoints.DIT,
        lambda _: framepack_making.tiny_model(),
        lambda _: framepack_making.tiny_inputs(),
        lambda _: framepack_dit.tiny_state(),
        framepack_dit.write_dit,
        frame_pack.checkpoints.load_dit,
        framepack_dit.FP8_DIALECTS,
    ),
}
FP8_FILES = [(name, dialect) for name, each in TRANSFORMERS.items() for dialect in each.fp8_dialects]


@pytest.fixture(params=TRANSFORMERS)
def transformer(request: pytest.FixtureRequest) -> Transformer:
    return TRANSFORMERS[request.param]


def test_checkpointed_blocks_give_equal_gradients_to_every_weight(transformer: Transformer) -> None:
    model = transformer.learning()
    expected = transformer.gradients(model)

    checkpoint_blocks(model, transformer.spec)

    found = transformer.gradients(model)
    assert len(found) == len(list(model.parameters()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_that_made_a_sample_in_inference_mode_trains_on(transformer: Transformer) -> None:
    model = transformer.learning()

    with torch.inference_mode():
        model(**transformer.inputs("i2v"))

    assert transformer.gradients(model)


@pytest.mark.parametrize(("name", "dialect"), FP8_FILES)
def test_fp8_files_compute_in_bfloat16_with_their_scales_applied(tmp_path: Path, name: str, dialect: str) -> None:
    transformer = TRANSFORMERS[name]
    state = transformer.state("i2v")

    dit = transformer.load(transformer.write(tmp_path, state, dialect), CPU)

    assert dit.compute_dtype == torch.bfloat16
    for parameter, tensor in dit.state_dict().items():
        assert tensor.dtype.itemsize > 1, parameter
        torch.testing.assert_close(tensor.float(), state[parameter], rtol=PLAIN_FP8, atol=0.01, msg=parameter)
