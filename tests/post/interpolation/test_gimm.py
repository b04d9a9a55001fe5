"""GIMM-VFI: equal to the recorded frames, with files of every published layout."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from post.interpolation.files import is_with_raft, read_gimm
from post.interpolation.layers import warp
from post.interpolation.motion import GimmVfi
from post.interpolation.raft import Raft, read_raft
from post.interpolation.synthesis import Compared
from tests.golden_cases import read_case
from tests.manifests import tensor_list, write_hollow
from tests.post.interpolation.recorded import check_recorded, write_recorded
from tests.tiny.post_interpolation import tiny_interpolation

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("times", [(0.5,), pytest.param((0.25, 0.5), marks=pytest.mark.slow)])
def test_frames_made_with_raft_are_as_recorded(tmp_path: Path, times: tuple[float, ...]) -> None:
    case, tensors = read_case("gimmvfi_r")
    main, flow = write_recorded(tmp_path, case, "gimmvfi-r", "raft-things")
    with open_checkpoint(main) as first, open_checkpoint(flow) as second:
        network = load_planned(read_gimm(first), GimmVfi, CPU, torch.float32, "--model")
        raft = load_planned(read_raft(second), Raft, CPU, torch.float32, "--model")
    check_recorded(case, tensors, network, raft, times)


@pytest.mark.parametrize("manifest", ["gimmvfi-r", "gimmvfi-f"])
def test_published_files_load_at_full_size(tmp_path: Path, manifest: str) -> None:
    tensors = tensor_list(manifest)
    inner = {f"flow_estimator.{name}": info for name, info in tensor_list("raft-things").items()}
    for content, prefix in ((tensors, ""), ({**tensors, **inner}, "module.")):
        with open_checkpoint(write_hollow(tmp_path / "main.safetensors", content, prefix)) as checkpoint:
            plan = read_gimm(checkpoint)
            network = load_planned(plan, GimmVfi, META, torch.float32, "--model")
        assert is_with_raft(plan.config) == (manifest == "gimmvfi-r")
        stored = sum(
            torch.Size(shape).numel()
            for name, (dtype, shape) in tensors.items()
            if dtype == "F32" and name != "g_filter"
        )
        assert sum(tensor.numel() for tensor in network.state_dict().values()) == stored


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_raft_loads_at_full_size(tmp_path: Path, prefix: str) -> None:
    path = write_hollow(tmp_path / "raft.safetensors", tensor_list("raft-things"), prefix)
    with open_checkpoint(path) as checkpoint:
        raft = load_planned(read_raft(checkpoint), Raft, META, torch.float32, "--model")
    names = {name for name in tensor_list("raft-things") if ".norm3." not in name}
    assert set(raft.state_dict()) == {name for name in names if not name.endswith("num_batches_tracked")}


def test_another_network_is_named(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "raft.safetensors", tensor_list("raft-things"))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="is not GIMM-VFI"):
        read_gimm(checkpoint)
    path = write_hollow(tmp_path / "main.safetensors", tensor_list("gimmvfi-r"))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match="is not a large RAFT"):
        read_raft(checkpoint)


def test_a_smaller_size_for_the_flow_enlarges_only_what_is_blended() -> None:
    """A plain computation of the last step at full size from what is found at half the size."""
    whole = tiny_interpolation(ds_factor=0.5)
    images = [torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    first, second = map(whole.frame, images)
    (found,) = whole.between(first, second, (0.25,))

    small = [interpolate(image, scale_factor=0.5, mode="bilinear") for image in images]
    synthesis, motion = whole.network.synthesis, whole.network.motion
    alone = tiny_interpolation()
    one, two = map(alone.frame, small)
    with torch.no_grad():
        forth = alone.estimator.flow(one.encoded, two.encoded)
        back = alone.estimator.flow(two.encoded, one.encoded)
        flow = motion.at(motion.between(forth, back), 0.25)
        flow = torch.cat([-0.25 * flow, 0.75 * flow])
        compared = Compared(one.maps, two.maps)
        blend = synthesis.blend(2 * torch.cat(small) - 1, flow, one.maps, two.maps, compared, 0.25)
        large = [
            interpolate(each, scale_factor=2, mode="bilinear")
            for each in (2 * blend.flow, blend.mask, blend.colours)
        ]
        before, after = (2 * image - 1 for image in images)
        made = []
        for k in range(3):
            share, colours = large[1][:, k : k + 1], large[2][:, 3 * k : 3 * k + 3]
            to_before, to_after = large[0][:, 2 * k : 2 * k + 2], large[0][:, 6 + 2 * k : 8 + 2 * k]
            mixed = share * warp(before, to_before) + (1 - share) * warp(after, to_after)
            made.append(mixed + colours)
        expected = torch.stack(made).mean(dim=0) + synthesis.amt_comb_block(torch.cat(made, dim=1))

    assert found.shape == (1, 3, 256, 256)
    torch.testing.assert_close(found, ((expected + 1) / 2).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_layers_of_the_synthesis_alone(dtype: torch.dtype) -> None:
    exact, half = tiny_interpolation(), tiny_interpolation()
    half.network.synthesis.to(dtype)
    images = [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    (expected,) = exact.between(*map(exact.frame, images), (0.5,))
    (found,) = half.between(*map(half.frame, images), (0.5,))

    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    frame = half.frame(images[0])
    assert {frame.maps.quarter.dtype, frame.maps.matching.dtype} == {dtype, torch.float32}
    assert frame.encoded.matching.dtype == torch.float32
