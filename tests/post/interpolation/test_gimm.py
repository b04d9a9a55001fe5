"""GIMM-VFI: equal to the recorded frames, with files of every published layout."""

from pathlib import Path

import pytest
import torch

from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from post.interpolation.gimm import GimmVfi, Interpolation
from post.interpolation.layout import is_with_raft, read_gimm
from post.interpolation.raft import Raft, read_raft
from tests.golden_cases import read_case
from tests.manifests import tensor_list, write_hollow
from tests.post.interpolation.recorded import check_recorded, write_recorded

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


def test_a_pair_has_the_same_pictures_alone_and_among_others(tmp_path: Path) -> None:
    """Several times of a pair share all but the last steps, which changes no bit."""
    from tests.tiny.post_interpolation import tiny_interpolation

    whole: Interpolation = tiny_interpolation()
    first, second = (whole.frame(torch.rand(1, 3, 128, 128)) for _ in range(2))
    together = list(whole.between(first, second, (0.25, 0.5, 0.75)))
    for time, picture in zip((0.25, 0.5, 0.75), together, strict=True):
        (alone,) = whole.between(first, second, (time,))
        assert torch.equal(alone, picture)
