"""From files to crops: the recorded frames of every mode, buckets, control media, and clips that give
nothing.
"""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dataset.config import load_dataset_config, with_lengths
from dataset.listing import find_sources
from dataset.sources.companions import find_moving_references
from dataset.sources.decoding import decode_source, plan_source
from dataset.sources.frames import find_far_rates, resample_indices, spans
from modules.errors import MediaError
from modules.media.lengths import ClipLengths
from modules.media.reading import resize_cover, video_frames
from modules.media.writing import write_video
from protocols.rules import ReferenceRules
from tests.dataset.making import frame_numbers, make_animation, make_clip, make_frames, make_image, make_table
from tests.golden_cases import read_case

FAMILY_FPS = {"wan": 16.0, "hv": 24.0, "fp": 30.0}
CASES = read_case("frame_extraction")[0]["cases"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with one clip each, by its number of frames."""
    folders = {
        count: tmp_path_factory.mktemp(f"clip{count}") for count in {case["video_frames"] for case in CASES}
    }
    for count, folder in folders.items():
        make_clip(folder / "clip.mkv", count)
    return folders


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['architecture']}-{case['video_frames']}-{case['dataset_keys']}"
)
def test_the_recorded_frames_are_cut(clips: dict[int, Path], tmp_path: Path, case: dict) -> None:
    keys = "\n".join(f"{name} = {value!r}" for name, value in case["dataset_keys"].items())
    config = tmp_path / "data.toml"
    config.write_text(
        f"[[datasets]]\nvideo_directory = {str(clips[case['video_frames']])!r}\nresolution = 32\n{keys}",
        encoding="utf-8",
    )
    (table,) = with_lengths(load_dataset_config(config), ClipLengths(4)).datasets
    (source,) = find_sources(table, captions=False)

    decoded = decode_source(source, FAMILY_FPS[case["architecture"]])

    found = {
        f"{decoded.key(span)}_0032x0032_{case['architecture']}.safetensors": frame_numbers(
            decoded.cut(span).frames
        )
        for span in decoded.spans
    }
    assert found == {item["cache_file"]: item["frames"] for item in case["items"]}
    assert list(table.buckets.target_frames) == case["effective_target_frames"]
    assert table.buckets.frame_extraction == case["effective_mode"]
    assert (decoded.reason is None) == bool(case["items"])


@pytest.mark.parametrize(("name", "frames"), [("clip.mkv", "6 frames"), ("clip.mp4", "6 of its 12 frames")])
def test_a_clip_too_short_says_so(name: str, frames: str, tmp_path: Path) -> None:
    """With the number of frames in the file, which only some kinds of files say."""
    make_clip(tmp_path / name, 12)
    (source,) = find_sources(make_table(tmp_path, target_frames=(17, 25), source_fps=30.0))

    said = f"{frames} after dropping from source_fps = 30, the shortest of target_frames is 17"
    assert decode_source(source, 16.0).reason == said


@pytest.mark.parametrize(
    ("keys", "bucket"),
    [
        ({"enable_bucket": False}, (64, 48)),
        ({"enable_bucket": True}, (96, 32)),
        ({"enable_bucket": True, "bucket_no_upscale": True}, (48, 16)),
    ],
)
def test_videos_follow_the_bucket_keys_of_their_table(
    tmp_path: Path, keys: dict, bucket: tuple[int, int]
) -> None:
    make_clip(tmp_path / "clip.mkv", 2, (60, 24))
    (source,) = find_sources(make_table(tmp_path, resolution=(64, 48), **keys))

    decoded = decode_source(source, 16.0)

    (span,) = decoded.spans
    assert (decoded.size, decoded.bucket) == ((60, 24), bucket)
    assert decoded.cut(span).frames.shape == (1, bucket[1], bucket[0], 3)


def test_images_are_named_by_their_own_size(tmp_path: Path) -> None:
    make_image(tmp_path / "pic.png", (120, 90))
    (source,) = find_sources(make_table(tmp_path, "image_directory", resolution=(64, 48), enable_bucket=True))

    decoded = decode_source(source, 16.0)

    (span,) = decoded.spans
    assert (decoded.key(span), span, decoded.size, decoded.bucket) == ("pic", (0, 1), (120, 90), (64, 48))
    assert decoded.cut(span).frames.shape == (1, 48, 64, 3)


def test_control_images_are_resized_with_their_alpha(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    make_image(tmp_path / "pic.png", (64, 48))
    make_image(tmp_path / "control" / "pic_0.png", (50, 50), (1, 2, 3, 128))
    make_image(tmp_path / "control" / "pic_1.png", (20, 40))
    table = make_table(
        tmp_path,
        "image_directory",
        resolution=(64, 48),
        control_directory=tmp_path / "control",
        fp_1f_clean_indices=(0, 1),
    )

    decoded = decode_source(find_sources(table)[0], 16.0, keeps_alpha=True)

    assert [control.shape for control in decoded.cut((0, 1)).control] == [(1, 48, 64, 4), (1, 48, 64, 3)]
    white = decode_source(find_sources(table)[0], 16.0).cut((0, 1)).control[0]
    assert white[0, 0, 0].tolist() == [128, 128, 129]  # 255 - 128 / 255 x (254, 253, 252)


@pytest.mark.parametrize(("kind", "control_frames"), [("folder", 3), ("clip.mp4", 9), ("clip.gif", 3)])
def test_a_control_clip_gets_the_length_and_the_rate_of_its_video(
    tmp_path: Path, kind: str, control_frames: int
) -> None:
    control = tmp_path / "control"
    control.mkdir()
    make_clip(tmp_path / "clip.mkv", 14)
    if kind == "folder":
        make_frames(control / "clip", 2 * control_frames)
    elif kind == "clip.gif":
        make_animation(control / kind, [31] * 2 * control_frames)
    else:
        make_clip(control / kind, 2 * control_frames)
    keys = {"target_frames": (5,), "frame_extraction": "slide", "source_fps": 32.0}
    table = make_table(tmp_path, resolution=(32, 32), control_directory=control, **keys)

    decoded = decode_source(find_sources(table)[0], 16.0)

    last = min(control_frames - 1, 6)
    assert [span[0] for span in decoded.spans] == [0, 1, 2]
    assert frame_numbers(decoded.cut((2, 5)).frames) == [4, 6, 8, 10, 12]
    if kind != "clip.gif":
        assert frame_numbers(decoded.cut((2, 5)).control[0]) == [2 * min(i, last) for i in range(2, 7)]
    assert decoded.cut((2, 5)).control[0].shape == (5, 32, 32, 3)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_plan_from_headers_equals_the_decoded_one(tmp_path: Path, suffix: str) -> None:
    make_clip(tmp_path / f"clip{suffix}", 30, (60, 24))
    table = make_table(
        tmp_path,
        resolution=(64, 48),
        enable_bucket=True,
        frame_extraction="chunk",
        target_frames=(5, 9),
        source_fps=30.0,
    )
    (source,) = find_sources(table)

    plan, decoded = plan_source(source, 16.0), decode_source(source, 16.0)

    assert (plan.spans, plan.size, plan.bucket) == (decoded.spans, decoded.size, decoded.bucket)
    assert len(plan.frames) == 0


@pytest.mark.parametrize("side", [64, 16])
def test_transparency_of_an_image_is_kept_beside_its_colours(tmp_path: Path, side: int) -> None:
    """Made smaller or larger: colors are those of the image without its alpha."""
    image = np.random.default_rng(0).integers(0, 256, (side, side, 4), np.uint8)
    Image.fromarray(image).save(tmp_path / "clear.png")
    Image.fromarray(image[..., :3]).save(tmp_path / "opaque.png")

    sources = find_sources(make_table(tmp_path, "image_directory", resolution=(32, 32)))
    clear, opaque = (decode_source(source, 16.0, keeps_alpha=True) for source in sources)

    assert opaque.alpha is None
    assert clear.alpha is not None
    assert np.array_equal(clear.frames, opaque.frames)
    assert np.array_equal(clear.alpha, resize_cover(np.ascontiguousarray(image[..., 3]), (32, 32)))


# --- GIF and WebP, and clips that are read by their times


def test_animations_are_clips_and_still_ones_are_not(tmp_path: Path) -> None:
    make_animation(tmp_path / "a.gif", [100, 100])
    make_animation(tmp_path / "b.WEBP".lower(), [100, 100])
    make_image(tmp_path / "still.gif")
    make_image(tmp_path / "still2.webp")
    make_clip(tmp_path / "c.mkv", 2)

    assert [source.path.name for source in find_sources(make_table(tmp_path))] == ["a.gif", "b.webp", "c.mkv"]


@pytest.mark.parametrize(
    ("source_fps", "expected"),
    [
        (None, [0, 0, 1, 2, 2]),  # at the model's rate, 10
        ("auto", [0, 0, 1, 2, 2]),
        (20.0, [0, 0, 1, 2, 2]),  # as a clip of 20 frames a second, of which every second one is kept
        (5.0, [0, 1, 2]),  # as a clip of 5 frames a second: slower than the model, so all are kept
    ],
)
def test_an_animation_is_played_by_its_durations(
    tmp_path: Path, source_fps: float | str | None, expected: list[int]
) -> None:
    make_animation(tmp_path / "a.gif", [200, 100, 200])
    keys = {"source_fps": source_fps, "frame_extraction": "full", "resolution": (32, 32)}
    (source,) = find_sources(make_table(tmp_path, **keys))

    decoded = decode_source(source, 10.0)

    assert frame_numbers(decoded.frames) == expected
    assert plan_source(source, 10.0).spans == decoded.spans


def test_auto_reads_the_rate_of_each_clip(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mkv", 24)  # at 24 frames a second
    make_frames(tmp_path / "frames", 6)
    table = make_table(
        tmp_path, source_fps="auto", frame_extraction="full", max_frames=99, resolution=(32, 32)
    )
    (source,) = find_sources(table)

    at_12, at_24 = (frame_numbers(decode_source(source, fps).frames) for fps in (12.0, 24.0))

    assert at_12 == list(range(0, 24, 2))
    assert at_24 == list(range(24))
    assert len(frame_numbers(decode_source(source, 30.0).frames)) == 30  # some twice: a second is a second


def test_a_family_with_another_frame_step_rounds_full_clips_by_it(tmp_path: Path) -> None:
    assert spans(make_table(tmp_path, frame_extraction="full"), 40, lengths=ClipLengths(8)) == ((0, 33),)
    assert spans(make_table(tmp_path, frame_extraction="full"), 0) == ()


@pytest.mark.parametrize(("frames", "used"), [(1, 1), (4, 1), (5, 5), (21, 5), (22, 22), (130, 124)])
def test_full_clips_may_have_lengths_with_another_first_part(tmp_path: Path, frames: int, used: int) -> None:
    table = make_table(tmp_path, frame_extraction="full", max_frames=130)
    assert spans(table, frames, lengths=ClipLengths(17, 5)) == ((0, used),)


@pytest.mark.parametrize("source", [None, 8.0, 16.0])
def test_nothing_is_dropped_or_doubled_without_need(source: float | None) -> None:
    assert resample_indices(20, source, 16.0) == tuple(range(20))


@pytest.mark.parametrize(("rate", "is_told"), [(120, True), (5, True), (24, False)])
def test_clips_far_from_the_rate_of_the_model_are_told(tmp_path: Path, rate: int, is_told: bool) -> None:
    write_video(tmp_path / "a.mp4", (np.zeros((32, 32, 3), np.uint8) for _ in range(5)), rate)

    found = find_far_rates(find_sources(make_table(tmp_path)), 16.0)
    declared = find_far_rates(find_sources(make_table(tmp_path, source_fps="auto")), 16.0)

    assert [error.text.partition("; ")[0] for error in found] == [
        f"{tmp_path / 'a.mp4'}: {rate} frames per second, the model uses 16"
    ] * is_told
    assert declared == []


@pytest.mark.parametrize("share", [0.03, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("index_first", [True, False])
def test_an_mp4_that_is_cut_short_is_called_so(tmp_path: Path, share: float, index_first: bool) -> None:
    path = tmp_path / "a.mp4"
    options = {"movflags": "faststart"} if index_first else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        frame = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    full = path.read_bytes()
    # a share of the index, if it is first, else of the whole file
    length = full.find(b"moov") + int(900 * share) if index_first else int(len(full) * share)
    path.write_bytes(full[:length])

    with pytest.raises(MediaError, match="cut short"):
        list(video_frames(path))


def test_animations_as_single_references_are_told(tmp_path: Path) -> None:
    (tmp_path / "references").mkdir()
    make_clip(tmp_path / "a.mp4", 5)
    images = [Image.new("RGB", (32, 32), (gray,) * 3) for gray in (10, 200)]
    images[0].save(tmp_path / "references" / "a.gif", save_all=True, append_images=images[1:])
    keys = {"reference_directory": tmp_path / "references", "target_frames": (5,)}

    for on_white in (True, False):
        rules = ReferenceRules(max_references=1, clips=True, pad_with_white=on_white)
        sources = find_sources(make_table(tmp_path, clip_rules=rules, **keys))
        texts = [error.text for error in find_moving_references(sources)]
        assert texts == [str(tmp_path / "references" / "a.gif")] * on_white
