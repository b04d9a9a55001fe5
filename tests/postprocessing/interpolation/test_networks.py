"""GIMM-VFI, its pieces, RAFT and FlowFormer: equal to what was recorded, from files of every layout."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from postprocessing.interpolation.files import read_gimm
from postprocessing.interpolation.flowformer import FlowFormer, read_flowformer
from postprocessing.interpolation.layers import (
    Correlation,
    EncodedImage,
    FlowEstimator,
    pixel_coordinates,
    splat,
    warp,
)
from postprocessing.interpolation.motion import (
    GimmVfi,
    Interpolation,
    MotionConfig,
    MotionField,
    normalize_flows,
)
from postprocessing.interpolation.raft import Raft, read_raft
from postprocessing.interpolation.synthesis import PairCorrelations
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from tests.tiny.post_interpolation import (
    FLOWFORMER,
    flowformer_tensors,
    tiny_flowformer,
    tiny_interpolation,
    write_flowformer,
)

CPU, META = torch.device("cpu"), torch.device("meta")
ESTIMATORS: dict[str, tuple[Any, Any]] = {
    "raft-things": (read_raft, Raft),
    "flowformer-sintel": (read_flowformer, FlowFormer),
}


def load(path: Path, read: Any = read_flowformer, build: Any = FlowFormer, device: torch.device = CPU) -> Any:
    with open_checkpoint(path) as checkpoint:
        return load_planned(read(checkpoint), build, device, torch.float32, "--model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "flow", "times"),
    [
        ("r", "raft-things", (0.5,)),
        ("r", "raft-things", (0.25, 0.5)),
        ("f", "flowformer-sintel", None),
    ],
)
def test_frames_are_as_recorded(
    tmp_path: Path, mode: str, flow: str, times: tuple[float, ...] | None
) -> None:
    case, tensors = read_case(f"gimmvfi_{mode}")
    main, estimator = write_recorded(tmp_path, case, f"gimmvfi-{mode}", flow)

    check_recorded(case, tensors, load(main, read_gimm, GimmVfi), load(estimator, *ESTIMATORS[flow]), times)


@pytest.mark.parametrize("manifest", ["gimmvfi-r", "gimmvfi-f"])
def test_published_files_load_at_full_size(tmp_path: Path, manifest: str) -> None:
    tensors = tensor_list(manifest)
    inner = {f"flow_estimator.{name}": info for name, info in tensor_list("raft-things").items()}
    for content, prefix in ((tensors, ""), ({**tensors, **inner}, "module.")):
        with open_checkpoint(write_hollow(tmp_path / "main.safetensors", content, prefix)) as checkpoint:
            plan = read_gimm(checkpoint)
            network = load_planned(plan, GimmVfi, META, torch.float32, "--model")
        assert bool(plan.config.synthesis.projections) == (manifest == "gimmvfi-r")
        stored = sum(
            torch.Size(shape).numel()
            for name, (dtype, shape) in tensors.items()
            if dtype == "F32" and name != "g_filter"
        )
        assert sum(tensor.numel() for tensor in network.state_dict().values()) == stored


@pytest.mark.parametrize("manifest", ESTIMATORS)
def test_a_published_estimator_loads_at_full_size(tmp_path: Path, manifest: str) -> None:
    tensors = tensor_list(manifest)
    path = write_hollow(tmp_path / "flow.safetensors", tensors, "module.")

    network = load(path, *ESTIMATORS[manifest], META)

    unused = (".norm3.", "num_batches_tracked", ".svt.norm.", ".pos_emb.")
    assert set(network.state_dict()) == {name for name in tensors if not any(part in name for part in unused)}


@pytest.mark.parametrize(
    ("manifest", "read", "said"),
    [
        ("raft-things", read_gimm, "is not GIMM-VFI"),
        ("gimmvfi-r", read_raft, "is not a large RAFT"),
        ("raft-things", read_flowformer, "is not a FlowFormer"),
    ],
)
def test_another_network_is_named(tmp_path: Path, manifest: str, read: Any, said: str) -> None:
    path = write_hollow(tmp_path / "x.safetensors", tensor_list(manifest))
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=said):
        read(checkpoint)


def test_a_smaller_size_for_the_flow_enlarges_only_what_is_blended() -> None:
    """A plain computation of the last step at full size from what is found at half the size."""
    full = tiny_interpolation(ds_factor=0.5)
    images = [torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    first, second = map(full.encode_image, images)
    (found,) = full.interpolate(first, second, (0.25,))

    small = [interpolate(image, scale_factor=0.5, mode="bilinear") for image in images]
    synthesis, motion = full.network.synthesis, full.network.motion
    alone = tiny_interpolation()
    one, two = map(alone.encode_image, small)
    with torch.no_grad():
        forth = alone.estimator.flow(one.encoded, two.encoded)
        back = alone.estimator.flow(two.encoded, one.encoded)
        flow = motion.predict_motion(motion.encode_flows(forth, back), 0.25)
        flow = torch.cat([-0.25 * flow, 0.75 * flow])
        correlations = PairCorrelations(one.maps, two.maps)
        blend = synthesis.blend(2 * torch.cat(small) - 1, flow, one.maps, two.maps, correlations, 0.25)
        large = [
            interpolate(each, scale_factor=2, mode="bilinear")
            for each in (2 * blend.flow, blend.mask, blend.colors)
        ]
        before, after = (2 * image - 1 for image in images)
        made = []
        for k in range(3):
            share, colors = large[1][:, k : k + 1], large[2][:, 3 * k : 3 * k + 3]
            to_before, to_after = large[0][:, 2 * k : 2 * k + 2], large[0][:, 6 + 2 * k : 8 + 2 * k]
            mixed = share * warp(before, to_before) + (1 - share) * warp(after, to_after)
            made.append(mixed + colors)
        expected = torch.stack(made).mean(dim=0) + synthesis.amt_comb_block(torch.cat(made, dim=1))

    assert found.shape == (1, 3, 256, 256)
    torch.testing.assert_close(found, ((expected + 1) / 2).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_half_precision_changes_layers_of_the_synthesis_alone() -> None:
    dtype = torch.bfloat16
    exact, half = tiny_interpolation(), tiny_interpolation()
    half.network.synthesis.to(dtype)
    images = [torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    (expected,) = exact.interpolate(*map(exact.encode_image, images), (0.5,))
    (found,) = half.interpolate(*map(half.encode_image, images), (0.5,))

    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    frame = half.encode_image(images[0])
    assert {frame.maps.quarter.dtype, frame.maps.matching.dtype} == {dtype, torch.float32}
    assert frame.encoded.matching.dtype == torch.float32


CASE, TENSORS = read_case("gimm_pieces")
MOTION = MotionConfig(
    encoder=(16, 32, 16), encoder_blocks=3, residual=(32, 64), residual_blocks=1, layers=(128,) * 4 + (2,)
)


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CASE["tolerance"]["default"])


@pytest.fixture(scope="module")
def field() -> MotionField:
    field = MotionField(MOTION)
    field.load_state_dict(make_weights(CASE["weights_model_key"], CASE["weights_used_here"]))
    return field.requires_grad_(False)


def test_a_picture_is_warped_and_splatted_as_recorded() -> None:
    image, flow = TENSORS["warp_in"], TENSORS["warp_flow"]
    check(warp(image, flow), TENSORS["warp_out"])
    check(splat(image, flow, TENSORS["splat_metric"]), TENSORS["splat_out"])


def test_pixels_sent_to_places_that_are_not_finite_are_left_out() -> None:
    image = torch.ones(1, 1, 3, 3)
    flow = torch.zeros(1, 2, 3, 3)
    flow[0, 0, 1, 1], flow[0, 1, 0, 0] = torch.nan, torch.inf
    expected = image.clone()
    expected[0, 0, 1, 1] = expected[0, 0, 0, 0] = 0
    assert torch.equal(splat(image, flow, image), expected)


def test_the_motion_between_two_flows_is_as_recorded(field: MotionField) -> None:
    forth, back = TENSORS["flow01"], TENSORS["flow10"]
    normal, scale = normalize_flows(forth, back)
    check(normal, TENSORS["normalised_flow"])
    check(scale[None], TENSORS["flow_scale"])
    for found, name in zip(field.splat_weights(forth, back), ("0", "1"), strict=True):
        check(found, TENSORS[f"splat_weight{name}"])
    motion = field.encode_flows(forth, back)
    for time in (0.25, 0.5):
        check(field.predict_normalized_motion(motion, time), TENSORS[f"predicted_flow_normalised_t{time}"])


@pytest.mark.parametrize("stores_volume", [True, False])
def test_features_are_compared_as_recorded(stores_volume: bool) -> None:
    first, second = TENSORS["fmap0"], TENSORS["fmap1"]
    places = TENSORS["corr_coords"]
    forth = Correlation(first, second, stores_volume).lookup(places)
    # the case looks back from the places mirrored at each pixel
    back = Correlation(second, first, stores_volume).lookup(2 * pixel_coordinates(first) - places)
    check(forth[..., ::5, ::5], TENSORS["corr_lookup_every_5th"])
    check(forth[..., ::7, ::7], TENSORS["bicorr_a_every_7th"])
    check(back[..., ::7, ::7], TENSORS["bicorr_b_every_7th"])


def test_features_beyond_the_edge_compare_as_zero() -> None:
    first = torch.randn(1, 8, 9, 17)
    places = torch.full((1, 2, 9, 17), 2.25)
    places[..., :3] = torch.tensor([-1e9, 1e9, torch.nan])
    places[..., 3] = 16.5
    kept, sampled = (Correlation(first, first, keeps).lookup(places) for keeps in (True, False))
    torch.testing.assert_close(kept, sampled, atol=7e-7 * float(kept.abs().max()), rtol=0)
    assert not kept[..., :3].any()
    assert kept[..., 3:].any()


def pair() -> tuple[Tensor, Tensor]:
    image = 255 * torch.rand(1, 3, 128, 160, generator=torch.Generator().manual_seed(3))
    return image, image.roll((3, -2), dims=(2, 3))


def flow_of(network: FlowFormer, first: Tensor, second: Tensor) -> Tensor:
    with torch.no_grad():
        return network.flow(network.encode(first), network.encode(second))


def test_flow_is_as_recorded(tmp_path: Path) -> None:
    _, tensors = read_case("gimmvfi_f")
    path = write_hollow(tmp_path / "flow.safetensors", tensor_list("flowformer-sintel"))
    network = load(path, device=META)
    weights = recorded_weights("flowformer-sintel", {"flow_head.conv2": 0.05})
    network.load_state_dict({name: weights[name] for name in network.state_dict()}, assign=True)

    flow = flow_of(network, tensors["image0"].float(), tensors["image1"].float())

    # the case allows 5e-3; float32 is better than that, up to about 5.5e-5
    torch.testing.assert_close(flow[..., ::4, ::4], tensors["flow01_every_4th"], rtol=0, atol=1.5e-4)


def test_a_narrow_file_gives_the_same_flow_in_any_layout(tmp_path: Path) -> None:
    with open_checkpoint(path := write_flowformer(tmp_path / "flow.safetensors")) as checkpoint:
        assert read_flowformer(checkpoint).config == FLOWFORMER
    first, second = pair()

    flow = flow_of(load(path), first, second)

    assert flow.shape == (1, 2, 128, 160)
    assert flow.dtype == torch.float32
    assert 0.1 < float(flow.abs().mean()) < 50
    assert torch.equal(flow_of(load(write_flowformer(tmp_path / "flow.pth", "module.")), first, second), flow)


def test_large_pictures_have_the_flow_that_small_ones_would_have() -> None:
    """Without tables of all pairs, which take too much memory for large pictures."""
    network = tiny_flowformer()
    frugal = FlowFormer(FLOWFORMER, table_bytes=0)
    frugal.load_state_dict(network.state_dict())
    first, second = pair()
    flow = flow_of(network, first, second)
    limit = 1e-5 * float(flow.abs().max())
    torch.testing.assert_close(flow_of(frugal, first, second), flow, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("context_encoder.svt.patch_embeds.0.proj.weight", (48, 3, 4, 4)),  # not whole heads
        ("memory_decoder.proj.weight", (0, 64, 1, 1)),
        ("memory_encoder.cost_perceiver_encoder.latent_tokens", (1, 3, 12)),
        ("memory_decoder.att.to_qk.weight", None),
    ],
)
def test_sizes_that_cannot_be_and_missing_tensors_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None
) -> None:
    tensors = {
        key: ("F32", tuple(tensor.shape)) for key, tensor in flowformer_tensors().items() if key != name
    }
    if shape is not None:
        tensors[name] = ("F32", shape)
    path = write_hollow(tmp_path / "flow.safetensors", tensors)
    said = "is not a FlowFormer" if shape else r"att\.to_qk"
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=said):
        read_flowformer(checkpoint)


def recorded_weights(manifest: str, damped: Mapping[str, float]) -> dict[str, Tensor]:
    """The weights of a published file by the rule. damped: beginning or middle of a name -> factor."""
    table = [
        [name, list(shape)]
        for name, (dtype, shape) in tensor_list(manifest).items()
        if dtype == "F32" and name != "g_filter"
    ]
    weights = make_weights(manifest, table)
    for name in weights:
        for part, factor in damped.items():
            if part in name:
                weights[name] = weights[name] * factor
    return weights


def write_recorded(folder: Path, case: Mapping[str, Any], main: str, flow: str) -> tuple[Path, Path]:
    """Write both files of a case into a folder."""
    weights = recorded_weights(main, case["damped_main"])
    paths = folder / "main.safetensors", folder / "flow.safetensors"
    save_file({**weights, "g_filter": torch.zeros(1, 1, 1, 3, 3)}, paths[0])
    save_file(recorded_weights(flow, {"flow_head.conv2": 0.05}), paths[1])
    return paths


@torch.no_grad()
def check_recorded(
    case: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    network: GimmVfi,
    estimator: FlowEstimator,
    times: Sequence[float] | None = None,
) -> None:
    """Compare flows, motion and, at these times or all, pictures of a whole network with those of a case."""
    times = times or case["times"]
    recording = Recording(estimator)
    full = Interpolation(network, recording)
    first, second = (full.encode_image(tensors[f"image{number}"] / 255) for number in (0, 1))
    images = full.interpolate(first, second, times)
    made = [next(images)]
    limit = {"rtol": 0, "atol": case["tolerance"]["flow"]["atol"]}
    forth, back = recording.flows
    torch.testing.assert_close(forth[..., ::4, ::4], tensors["flow01_every_4th"], **limit)
    torch.testing.assert_close(back[..., ::4, ::4], tensors["flow10_every_4th"], **limit)
    motion = network.motion.encode_flows(forth, back)
    for time in case["times"]:
        flow = network.motion.predict_motion(motion, time)
        torch.testing.assert_close(flow[..., ::4, ::4], tensors[f"flowt_t{time}_every_4th"], **limit)
    for time, image in zip(times, (*made, *images), strict=True):
        # the case allows 5e-4; float32 is better than that
        torch.testing.assert_close(
            image[..., ::2, ::2], tensors[f"frame_t{time}_every_2nd"], rtol=0, atol=1e-4
        )


class Recording:
    """An estimator that keeps its flows, so that they need not be computed twice."""

    def __init__(self, inner: FlowEstimator) -> None:
        self.inner = inner
        self.flows: list[Tensor] = []

    def encode(self, image: Tensor) -> EncodedImage:
        return self.inner.encode(image)

    def flow(self, first: EncodedImage, second: EncodedImage) -> Tensor:
        self.flows.append(self.inner.flow(first, second))
        return self.flows[-1]
