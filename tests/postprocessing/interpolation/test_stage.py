"""Interpolation as a stream: which pictures when, what is computed how often, and what is refused."""

import logging
import weakref
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints.writing import save_tensors
from modules.errors import CheckpointError, MediaError, OptionError
from modules.media.encoding import OutputFrame, Pixels
from postprocessing.contract import Clip, to_pixels, to_tensor
from postprocessing.interpolation.files import find_files, load_networks, read_settings
from postprocessing.interpolation.layers import EncodedImage, FlowEstimator
from postprocessing.interpolation.motion import Interpolation
from postprocessing.interpolation.raft import Raft
from postprocessing.interpolation.stage import Interpolator, check_interpolation, make_interpolation
from postprocessing.options import InterpolationOptions, ToolNetworkOptions
from tests.tiny.post_interpolation import RAFT, draw, write_gimm_r

CPU = torch.device("cpu")
CLIP = Clip(Path("clip.mkv"), width=130, height=128, rate=Fraction(24), frames=4, is_deep=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gimm_r(tmp_path_factory.mktemp("gimm"))


def options(folder: Path, **changes: object) -> InterpolationOptions:
    network = ToolNetworkOptions(model=folder)
    default = InterpolationOptions(network=network, mode="gimmvfi_r")
    return replace(default, **changes)  # type: ignore[arg-type]


def moving(count: int, width: int = 130, height: int = 128) -> list[Pixels]:
    """A soft pattern that moves to the right."""
    y, x = np.mgrid[:height, :width]
    frames = []
    for number in range(count):
        waves = [np.sin((x - 3 * number) / size) + np.cos(y / (size + 5)) for size in (9, 14, 20)]
        frames.append(((np.stack(waves, axis=-1) + 2) / 4 * 255).astype(np.uint8))
    return frames


def stream(frames: list[Pixels], starts: list[Fraction]) -> Iterator[OutputFrame]:
    ends = [*starts[1:], starts[-1] + Fraction(1, 24)]
    for pixels, start, end in zip(frames, starts, ends, strict=True):
        yield OutputFrame(pixels, start, end - start)


class Counting:
    """An estimator that counts what it is asked for, and how many pictures' features live at once."""

    def __init__(self, inner: FlowEstimator) -> None:
        self.inner, self.encoded, self.flows = inner, 0, 0
        self.living = self.max_living = 0

    def encode(self, image: Tensor) -> EncodedImage:
        self.encoded += 1
        self.living += 1
        self.max_living = max(self.max_living, self.living)
        encoded = self.inner.encode(image)
        weakref.finalize(encoded.matching, self.forget)
        return encoded

    def forget(self) -> None:
        self.living -= 1

    def flow(self, first: EncodedImage, second: EncodedImage) -> Tensor:
        self.flows += 1
        return self.inner.flow(first, second)


def test_a_last_picture_that_is_held_stays_as_long(folder: Path) -> None:
    stage = make_interpolation(options(folder, factor=4), CPU)
    first, last = stream(moving(1) * 2, [Fraction(0), Fraction(1, 24)])

    ends = []
    for seconds in (Fraction(1, 24), Fraction(3)):
        *_, shown = stage.run(iter([first, replace(last, seconds=seconds)]), CLIP)
        ends.append(shown.seconds)

    assert ends == [Fraction(1, 96), Fraction(3) - Fraction(1, 24)]


@pytest.mark.slow
def test_a_stream_equals_the_whole_clip_and_encodes_each_picture_once(folder: Path) -> None:
    networks = load_networks(folder, "gimmvfi_r", CPU, torch.float32)
    counting = Counting(networks.estimator)
    stage = Interpolator(options(folder, factor=3), Interpolation(networks.gimm, counting), CPU)
    frames = moving(3)
    starts = [Fraction(1), Fraction(1) + Fraction(1001, 24000), Fraction(5, 4)]  # an uneven rate

    made = list(stage.run(stream(frames, starts), CLIP))

    assert (counting.encoded, counting.flows, counting.max_living) == (3, 4, 2)
    for index, pixels in enumerate(frames):
        assert made[3 * index].pixels is pixels
    assert [image.start for image in made] == [
        *(starts[0] + (starts[1] - starts[0]) * Fraction(i, 3) for i in range(3)),
        *(starts[1] + (starts[2] - starts[1]) * Fraction(i, 3) for i in range(3)),
        starts[2],
    ]
    for one, after in zip(made, made[1:], strict=False):
        assert one.start + one.seconds == after.start
    assert made[-1].seconds == Fraction(1, 72)
    for index, pixels in enumerate(plain(folder, frames, (1 / 3, 2 / 3))):
        assert np.array_equal(made[index + index // 2 + 1].pixels, pixels)


def plain(
    folder: Path,
    frames: list[Pixels],
    times: tuple[float, ...],
    kind: str = "gimmvfi_r",
    is_deep: bool = False,
) -> list[Pixels]:
    """All pictures between, from the whole clip, each pair and each time for itself."""
    networks = load_networks(folder, kind, CPU, torch.float32)
    full = Interpolation(networks.gimm, networks.estimator)
    height, width = frames[0].shape[:2]
    left, top = (-width % 32) // 2, (-height % 32) // 2
    edges = (left, -width % 32 - left, top, -height % 32 - top)
    images = [torch.nn.functional.pad(to_tensor(pixels, CPU), edges, mode="replicate") for pixels in frames]
    made = []
    for first, second in zip(images, images[1:], strict=False):
        for time in times:
            (image,) = full.interpolate(full.encode_image(first), full.encode_image(second), (time,))
            made.append(to_pixels(image[..., top : top + height, left : left + width], is_deep))
    return made


def test_a_factor_of_one_changes_nothing(folder: Path) -> None:
    stage = make_interpolation(options(folder, factor=1), CPU)
    images = list(stream(moving(2), [Fraction(0), Fraction(1)]))
    assert list(stage.run(iter(images), CLIP)) == images
    assert stage.plan_output(CLIP) is CLIP


def test_equal_neighbours_and_cuts_repeat_the_picture_before(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    networks = load_networks(folder, "gimmvfi_r", CPU, torch.float32)
    counting = Counting(networks.estimator)
    stage = Interpolator(options(folder, factor=3), Interpolation(networks.gimm, counting), CPU)
    first = moving(1)[0]
    other = np.random.default_rng(0).integers(0, 90, (8, 8, 3)).astype(np.uint8).repeat(16, 0).repeat(17, 1)
    frames = [first, first.copy(), np.ascontiguousarray(other[:, :130])]

    with caplog.at_level(logging.INFO):
        made = list(stage.run(stream(frames, [Fraction(0), Fraction(1), Fraction(61)]), CLIP))

    assert counting.encoded == 0
    assert [np.array_equal(image.pixels, first) for image in made] == [True] * 6 + [False]
    assert "A new scene begins at 1:01.000" in caplog.text
    stage = Interpolator(options(folder, scene_threshold=0.0), Interpolation(networks.gimm, counting), CPU)
    list(stage.run(stream(frames, [Fraction(0), Fraction(1), Fraction(61)]), CLIP))
    assert counting.encoded == 2


def test_deep_clips_get_deep_pictures_and_keep_their_own(folder: Path) -> None:
    stage = make_interpolation(options(folder), CPU)
    frames: list[Pixels] = [pixels.astype(np.uint16) * 257 for pixels in moving(2)]
    made = list(stage.run(stream(frames, [Fraction(0), Fraction(1)]), replace(CLIP, is_deep=True)))
    assert [image.pixels.dtype for image in made] == [np.uint16] * 3
    assert made[0].pixels is frames[0]
    assert (made[1].pixels % 257).any()


def test_what_cannot_be_interpolated_is_refused(folder: Path) -> None:
    stage = make_interpolation(options(folder), CPU)
    with pytest.raises(MediaError, match="is one image"):
        stage.plan_output(replace(CLIP, rate=None))
    with pytest.raises(MediaError, match="has one image"):
        list(stage.run(stream(moving(1), [Fraction(0)]), CLIP))
    with pytest.raises(MediaError, match="64 x 128: GIMMVFI needs at least 97 pixels"):
        stage.plan_output(replace(CLIP, width=64))
    for part, minimum in ((0.5, 193), (0.75, 129)):
        small = make_interpolation(options(folder, ds_factor=part), CPU)
        with pytest.raises(MediaError, match=f"{minimum} pixels in width and height with --ds_factor {part}"):
            small.plan_output(CLIP)
        small.plan_output(replace(CLIP, width=minimum, height=minimum))


def test_files_are_found_and_missing_ones_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        check_interpolation(options(tmp_path / "nowhere" / "model"))
    with pytest.raises(CheckpointError, match="no file of gimmvfi_f in this folder"):
        check_interpolation(options(folder, mode="gimmvfi_f"))
    main = tmp_path / "gimmvfi_r_arb.pt"
    weights = load_networks(folder, "gimmvfi_r", CPU, torch.float32)
    tensors = weights.gimm.state_dict()
    published = {f"module.{name.split('.', 1)[1]}": tensor for name, tensor in tensors.items()}
    torch.save(published, main)
    with pytest.raises(CheckpointError, match="optical flow of gimmvfi_r is not next to"):
        check_interpolation(options(tmp_path))
    raft = weights.estimator.state_dict()  # type: ignore[attr-defined]
    inside = {f"module.flow_estimator.{name}": tensor for name, tensor in raft.items()}
    torch.save({"state_dict": {**published, **inside}, "epoch": 3}, main)
    check_interpolation(options(tmp_path))
    assert find_files(tmp_path, "gimmvfi_r").flow == main
    loaded = load_networks(tmp_path, "gimmvfi_r", CPU, torch.float32)
    for name, tensor in loaded.estimator.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(tensor, raft[name])


def test_files_of_two_releases_are_refused(tmp_path: Path) -> None:
    write_gimm_r(tmp_path)
    wider = draw(Raft(replace(RAFT, stages=(8, 12, 8))), 0)
    save_tensors(tmp_path / "raft-things_fp32.safetensors", wider.state_dict())
    with pytest.raises(CheckpointError, match="does not fit gimmvfi_r"):
        check_interpolation(options(tmp_path))


def test_the_yaml_may_be_missing_and_is_read_safely(tmp_path: Path) -> None:
    path = tmp_path / "gimmvfi_r_arb.yaml"
    assert read_settings(None).raft_iterations == 20
    path.write_text(
        "arch:\n  coord_range: [-1., 1.]\n  hyponet:\n    output_bias: 0.25\n    activation:\n"
        "      type: siren\n      siren_w0: 2.0\n"
    )
    assert (read_settings(path).output_bias, read_settings(path).frequency) == (0.25, 2.0)
    for content in (
        "arch: !!python/object/apply:os.getcwd []",
        "arch: {fwarp_type: soft}",
        "arch: {raft_iter: 0}",
        "]",
    ):
        path.write_text(content)
        with pytest.raises(CheckpointError, match="gimmvfi_r_arb.yaml"):
            read_settings(path)


@pytest.mark.slow
def test_a_picture_that_is_not_finite_ends_the_run(folder: Path) -> None:
    for dtype, error in ((torch.float32, CheckpointError), (torch.bfloat16, OptionError)):
        networks = load_networks(folder, "gimmvfi_r", CPU, dtype)
        networks.gimm.synthesis.amt_comb_block[2].bias.fill_(torch.nan)
        stage = Interpolator(options(folder), Interpolation(networks.gimm, networks.estimator), CPU)
        with pytest.raises(error, match="NaN or infinite"):
            list(stage.run(stream(moving(2), [Fraction(0), Fraction(1)]), CLIP))
