"""Narrow GIMM-VFI and FlowFormer networks with the names of the published files."""

from pathlib import Path

import torch
from torch import Tensor, nn

from postprocessing.interpolation.flowformer import FlowDecoderConfig, FlowFormer, FlowFormerConfig
from postprocessing.interpolation.flowformer_memory import MemoryConfig
from postprocessing.interpolation.motion import GimmConfig, GimmVfi, Interpolation, MotionConfig
from postprocessing.interpolation.raft import Raft, RaftConfig
from postprocessing.interpolation.synthesis import RefinementConfig, SynthesisConfig, UpdateConfig
from postprocessing.interpolation.twins import StageConfig
from tests.tiny.dit_files import write_tensors

RAFT = RaftConfig(
    stages=(8, 8, 8),
    features=8,
    hidden=8,
    context=8,
    correlation=(8, 8),
    flow=(8, 8),
    motion=8,
    head=8,
    mask=8,
)
MOTION = MotionConfig(
    encoder=(4, 4, 4), encoder_blocks=3, residual=(4, 4), residual_blocks=1, layers=(8, 8, 8, 8, 2)
)
ITERATIONS = 3  # of RAFT, as the YAML says


def gimm_config(quarter: int, eighth: int, projections: tuple[tuple[int, int], ...]) -> GimmConfig:
    """The dimensions of a narrow network. quarter, eighth: channels of the maps as the decoders take them."""
    update = UpdateConfig(correlation=(8, 8), flow=(8, 8), motion=8, hidden=8)
    synthesis = SynthesisConfig(
        projections=projections,
        quarter=quarter,
        eighth=eighth,
        first=RefinementConfig(1, 1, (4, 8), width=8, inner_channels=4, outputs=5 + 8),
        last=RefinementConfig(2, 3, (4, 4), width=8, inner_channels=4, outputs=24),
        low=update,
        high=update,
        combined_width=4,
    )
    return GimmConfig(MOTION, synthesis)


GIMM_R = gimm_config(quarter=16, eighth=16, projections=((8, 16), (8, 16), (8, 8)))
GIMM_F = gimm_config(quarter=32, eighth=64, projections=())  # as tests/tiny/post_interpolation.py makes them


def draw(network: nn.Module, seed: int) -> nn.Module:
    """Give a network random weights: flows of a few pixels and pictures near the mean of both."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim <= 1:
            tensor.copy_(
                1 + 0.1 * values if name.endswith(("weight", "var", "alpha_v", "alpha_fe")) else 0.1 * values
            )
        else:
            tensor.copy_(values / tensor[0].numel() ** 0.5)
        if "flow_head" in name or "convblock.4" in name or "comb_block.2" in name:
            tensor.mul_(0.1)
    return network.requires_grad_(False).eval()


def tiny_interpolation(ds_factor: float = 1.0) -> Interpolation:
    """A narrow network with RAFT of narrow width."""
    network, raft = draw(GimmVfi(GIMM_R), 0), draw(Raft(RAFT, ITERATIONS), 1)
    assert isinstance(network, GimmVfi)
    assert isinstance(raft, Raft)
    return Interpolation(network, raft, ds_factor)


def published(network: GimmVfi) -> dict[str, Tensor]:
    """The weights under the names of the files."""
    return {name.split(".", 1)[1]: tensor.clone() for name, tensor in network.state_dict().items()}


def write_gimm_r(folder: Path) -> Path:
    """The files of mode gimmvfi_r and its YAML in a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    network, raft = draw(GimmVfi(GIMM_R), 0), draw(Raft(RAFT, ITERATIONS), 1)
    assert isinstance(network, GimmVfi)
    write_tensors(folder / "gimmvfi_r_arb_lpips_fp32.safetensors", published(network))
    write_tensors(folder / "raft-things_fp32.safetensors", raft.state_dict())
    (folder / "gimmvfi_r_arb.yaml").write_text(f"arch:\n  raft_iter: {ITERATIONS}\n", encoding="utf-8")
    return folder


def write_gimm_f(folder: Path) -> Path:
    """The main file of mode gimmvfi_f in a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    network = draw(GimmVfi(GIMM_F), 0)
    assert isinstance(network, GimmVfi)
    write_tensors(folder / "gimmvfi_f_arb_lpips_fp32.safetensors", published(network))
    return folder


TRUNK = (StageConfig(patch=4, width=32, reduction=8), StageConfig(patch=2, width=64, reduction=4))
FLOWFORMER = FlowFormerConfig(
    features=TRUNK,
    context=TRUNK,
    matching=16,
    memory=MemoryConfig(
        tokens=3, width=16, context=64, projected_context_width=8, patch_widths=(2, 4, 8), layers=2
    ),
    decoder=FlowDecoderConfig(
        memory=16,
        query=8,
        hidden=32,
        similarity_width=8,
        correlation=(16, 12),
        flow=(8, 4),
        motion=16,
        head=8,
        mask=8,
    ),
)


def tiny_flowformer() -> FlowFormer:
    """Random weights that move pixels by a few places."""
    network = draw(FlowFormer(FLOWFORMER), 2)
    assert isinstance(network, FlowFormer)
    return network


def flowformer_tensors() -> dict[str, Tensor]:
    """The tensors of such a file, with those that no one uses."""
    tensors = dict(tiny_flowformer().state_dict())
    for trunk in ("memory_encoder.feat_encoder", "context_encoder"):
        tensors[f"{trunk}.svt.norm.weight"] = tensors[f"{trunk}.svt.norm.bias"] = torch.zeros(256)
    tensors["memory_decoder.att.pos_emb.rel_ind"] = torch.zeros(4, 4, dtype=torch.int64)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_flowformer(path: Path, prefix: str = "") -> Path:
    """A file of the layout of flowformer_sintel, .safetensors or .pth."""
    return write_tensors(path, {prefix + name: tensor for name, tensor in flowformer_tensors().items()})
