"""Transformers of all families loaded with weights in 8 bits: rounded from 16 bits, or as released fp8 files
have them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import frame_pack.files as framepack
import hunyuan_model.checkpoints as hunyuan
import wan.checkpoints as wan
from checkpoints.stored.fp8 import E4M3, dequantize, quantize
from frame_pack.configs import DIT as FRAMEPACK_DIT
from hunyuan_model.spec import DIT as HUNYUAN_DIT
from modules.errors import CheckpointError, OptionError
from modules.speed_options import Quantization
from protocols.family import DitSpec
from protocols.loading import Placement
from tests.commands import ROOT, run_python
from tests.fp8_reference import quantized_layers
from tests.tiny import framepack_dit, hunyuan_dit, wan_dit
from wan.spec import DIT as WAN_DIT

CPU, META = Placement(torch.device("cpu")), Placement(torch.device("meta"))
ROWS, CAST = Quantization("rows"), Quantization("cast")


@dataclass(frozen=True)
class Kind:
    """One family's transformer."""

    load: Callable[..., nn.Module]
    spec: DitSpec
    state: Callable[..., dict[str, Tensor]]
    write: Callable[..., Path]
    rounded: int  # linear layers of its tiny blocks that are rounded,
    in_blocks: int  # and all of them


KINDS = {
    "wan": Kind(wan.load_dit, WAN_DIT, partial(wan_dit.tiny_state, "t2v"), wan_dit.write_dit, 20, 20),
    "hunyuan": Kind(hunyuan.load_dit, HUNYUAN_DIT, hunyuan_dit.tiny_state, hunyuan_dit.write_dit, 26, 29),
    "framepack": Kind(
        framepack.load_dit, FRAMEPACK_DIT, framepack_dit.tiny_state, framepack_dit.write_dit, 39, 46
    ),
}
RELEASED = [
    *(("wan", dialect) for dialect in wan_dit.FP8_DIALECTS),
    *(("hunyuan", dialect) for dialect in hunyuan_dit.FP8_DIALECTS),
    *(("framepack", dialect) for dialect in framepack_dit.FP8_DIALECTS),
]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def in_bf16(kind: Kind) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in kind.state().items()}


@pytest.mark.slow_cases("framepack-cast", "framepack-float32", "framepack-rows")
@pytest.mark.parametrize(
    "quantization", [CAST, ROWS, Quantization("rows", float32_scales=True)], ids=["cast", "rows", "float32"]
)
def test_loading_gives_what_rounding_the_loaded_model_would(
    tmp_path: Path, kind: Kind, quantization: Quantization
) -> None:
    path = kind.write(tmp_path, in_bf16(kind))
    plain = kind.load(path, CPU)

    dit = kind.load(path, replace(CPU, quantization=quantization))

    layers = quantized_layers(dit)
    assert len(layers) == kind.rounded
    for name, layer in layers.items():
        weight, scale = quantize(plain.get_parameter(f"{name}.weight"), quantization)
        assert same_bytes(layer.weight, weight), name
        assert scale is None if layer.scale_weight is None else torch.equal(layer.scale_weight, scale), name
    weights = {f"{name}.weight" for name in layers}
    others = {name: tensor for name, tensor in plain.state_dict().items() if name not in weights}
    assert all(torch.equal(dit.state_dict()[name], tensor) for name, tensor in others.items())
    assert dit.compute_dtype == torch.bfloat16


def test_deltas_are_added_before_the_rounding(tmp_path: Path) -> None:
    kind = KINDS["wan"]
    state = in_bf16(kind)

    def patch(name: str, weight: Tensor, _: torch.dtype) -> Tensor:
        assert weight.dtype == torch.bfloat16
        return weight + 0.01 if weight.ndim == 2 else weight

    dit = kind.load(kind.write(tmp_path, state), replace(CPU, quantization=ROWS, patch=patch))

    for name, layer in quantized_layers(dit).items():
        assert same_bytes(layer.weight, quantize(state[f"{name}.weight"] + 0.01, ROWS)[0]), name


@pytest.mark.parametrize(
    ("dialect", "placement", "message"),
    [
        (
            "safetensors",
            replace(CPU, quantization=ROWS, patch=lambda _, one, __: one * torch.inf),
            "NaN or infinite",
        ),
        ("safetensors", Placement(torch.device("mps"), quantization=ROWS), "Apple's GPUs do not support fp8"),
    ],
    ids=["infinite", "Apple"],
)
def test_what_cannot_be_in_8_bits_is_refused(
    tmp_path: Path, dialect: str, placement: Placement, message: str
) -> None:
    kind = KINDS["wan"]
    path = kind.write(tmp_path, in_bf16(kind) if dialect == "safetensors" else kind.state(), dialect)

    with pytest.raises((CheckpointError, OptionError), match=message):
        kind.load(path, placement)


@pytest.mark.slow_cases(
    "None-framepack-fp8",
    "None-framepack-fp8_row_scale",
    "None-framepack-fp8_scaled",
    "None-framepack-fp8_weight_scale",
    "kept1-framepack-fp8",
    "kept1-framepack-fp8_row_scale",
    "kept1-framepack-fp8_scaled",
    "kept1-framepack-fp8_weight_scale",
)
@pytest.mark.parametrize(("family", "dialect"), RELEASED)
@pytest.mark.parametrize("kept", [None, torch.float16])
def test_released_fp8_files_stay_as_they_are_beside_layers_in_the_computing_dtype(
    tmp_path: Path, family: str, dialect: str, kept: torch.dtype | None
) -> None:
    kind = KINDS[family]
    path = kind.write(tmp_path, kind.state(), dialect)
    multiplied_out = kind.load(path, replace(CPU, compute_dtype=torch.float32))

    dit = kind.load(path, replace(CPU, quantization=CAST, fp8_compute_dtype=kept))

    layers, narrow = quantized_layers(dit), kept or torch.bfloat16
    assert len(layers) == kind.in_blocks
    assert dit.compute_dtype == narrow
    for name, tensor in dit.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            assert torch.equal(dequantize(tensor, layer.scale_weight), multiplied_out.get_parameter(name)), (
                name
            )
        else:
            assert tensor.dtype == (torch.float32 if name.startswith(kind.spec.keep_float32) else narrow), (
                name
            )


def test_e5m2_files_stay_as_they_are(tmp_path: Path) -> None:
    state = in_bf16(KINDS["wan"])
    stored = {name: t.to(torch.float8_e5m2) if t.ndim == 2 else t for name, t in state.items()}
    save_file(stored, tmp_path / "dit.safetensors")
    layers = quantized_layers(wan.load_dit(tmp_path / "dit.safetensors", replace(CPU, quantization=CAST)))
    assert len(layers) == KINDS["wan"].in_blocks
    assert all(same_bytes(layer.weight, stored[f"{name}.weight"]) for name, layer in layers.items())


def test_rows_put_together_from_two_formats_are_widened(tmp_path: Path) -> None:
    """diffusers' q, k and v are one weight here; it has one format."""
    state = hunyuan_dit.diffusers_state(hunyuan_dit.tiny_state())
    stored = {name: t.to(E4M3) if t.ndim == 2 else t.bfloat16() for name, t in state.items()}
    odd = "transformer_blocks.0.attn.to_k.weight"
    stored[odd] = state[odd].to(torch.float8_e5m2)
    save_file(stored, tmp_path / "dit.safetensors")
    dit = hunyuan.load_dit(tmp_path / "dit.safetensors", replace(CPU, quantization=CAST))
    layers = quantized_layers(dit)
    assert "double_blocks.1.img_attn_qkv" in layers
    assert "double_blocks.0.img_attn_qkv" not in layers
    rows = [stored[odd.replace("to_k", f"to_{character}")].to(torch.bfloat16) for character in "qkv"]
    assert torch.equal(dit.get_parameter("double_blocks.0.img_attn_qkv.weight"), torch.cat(rows))


MEASURE = """
import re, sys, threading
from dataclasses import replace
from pathlib import Path
import torch
from modules.speed_options import Quantization
from protocols.loading import Placement
from tests.tiny.wan import tiny_state, write_dit
from wan.checkpoints import load_dit

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def load(path, placement):
    before, peak, done = anonymous(), 0, threading.Event()
    def sample():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())
    sampler = threading.Thread(target=sample)
    sampler.start()
    dit = load_dit(path, placement)
    done.set()
    sampler.join()
    return dit, max(peak, anonymous()) - before

placement = Placement(torch.device("cpu"), quantization=Quantization(sys.argv[1]))
if sys.argv[1] == "patched":
    rows = Quantization("rows")
    placement = replace(placement, quantization=rows, patch=lambda name, weight, _: weight.clone())
load(write_dit(Path("warm"), tiny_state("t2v", dtype=torch.bfloat16)), placement)
dit, peak = load(Path("wan.safetensors"), placement)
kept = sum(tensor.nbytes for tensor in dit.state_dict().values())
largest = max(weight.numel() for weight in dit.parameters()) * 2
print((peak - kept) / largest, kept / largest)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux")
@pytest.mark.parametrize(("how", "maximum"), [("rows", 2.5), ("cast", 2.5), ("patched", 7)])
def test_loading_holds_a_few_tensors_beside_what_stays(tmp_path: Path, how: str, maximum: float) -> None:
    """In units of the largest tensor: it as it is read, and pieces of it; with a patch copies of it, and
    holes that they leave.
    """
    sizes = {"dim": 1024, "num_heads": 8, "ffn_dim": 5120, "num_layers": 8, "text_dim": 1024, "freq_dim": 256}
    wan_dit.write_dit(tmp_path, wan_dit.tiny_state("t2v", dtype=torch.bfloat16, **sizes))
    done = run_python("-c", MEASURE, how, folder=tmp_path, environment={"PYTHONPATH": str(ROOT)})
    above, model = (float(number) for number in done.stdout.split())
    assert above < maximum
    assert model > 10  # so that the model in 16 bits would not pass
