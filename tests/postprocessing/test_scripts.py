"""The tools' scripts from file to file, on tiny networks: one, a chain, generation, compiled parts."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from blissful_tuner.GIMMVFI import main
from modules.compile_options import Compilation
from modules.errors import OptionError
from modules.media.reading import read_image, read_tags, timed_frames, video_frames, video_info
from modules.media.writing import write_video
from postprocessing.chain_options import read_chain
from postprocessing.options import ToolNetworkOptions
from postprocessing.run import run_chain
from postprocessing.tiling import compile_parts
from postprocessing.upscaling.files import load_upscaler
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.postprocessing.interpolation.test_stage import moving, plain
from tests.postprocessing.stages_here import files_in, frames_of, kept_frames, write_clip
from tests.tiny.post_interpolation import write_flowformer, write_gimm_f, write_gimm_r
from tests.tiny.post_upscaling import write_rrdb, write_swinir
from tests.tiny.project import moving_square, write_image

SCRIPT = "blissful_tuner/upscaler.py"
H264 = ("--codec", "h264", "--container", "mp4", "--device", "cpu")


def test_a_chain_of_real_networks_from_file_to_file(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", moving_square(3, 32, 16, 1), 16, tags={"bt_prompt": "a cat"})
    write_rrdb(tmp_path / "r.pth")
    write_swinir(tmp_path / "s.safetensors")
    words = ["--model", "r.pth", "--mode", "esrgan", "--input", "a.mkv", *H264]

    said = succeed_here(
        SCRIPT, *words, "--then", "upscaler", "model=s.safetensors", "scale=1", folder=tmp_path
    )

    made = tmp_path / "a_ESRGAN_SWINIR.mp4"
    assert frames_of(made).shape == (3, 32, 64, 3)
    tags = read_tags(made)
    assert tags["bt_prompt"] == "a cat"
    assert tags["post_1"].startswith("upscaler model=r.pth ")
    assert tags["post_2"].startswith("upscaler model=s.safetensors ")
    assert f"{made.name}: 3 frames in " in said


def test_a_folder_of_pictures_and_videos(tmp_path: Path) -> None:
    write_rrdb(tmp_path / "r.pth")
    write_clip(tmp_path / "in" / "a.mp4", frames=2)
    write_image(tmp_path / "in" / "b.png", 16, 8)

    words = ("--model", "r.pth", "--mode", "esrgan", "--scale", 4, "--input", "in", "--output", "out", *H264)
    code, said = run_here(SCRIPT, *words, folder=tmp_path)
    again = run_here(SCRIPT, *words, folder=tmp_path)

    assert code == 0, said
    assert files_in(tmp_path / "out") == {"a_ESRGAN.mp4", "b_ESRGAN.png"}
    assert read_image(tmp_path / "out" / "b_ESRGAN.png").shape == (32, 64, 3)
    assert frames_of(tmp_path / "out" / "a_ESRGAN.mp4").shape == (2, 128, 192, 3)
    assert said.count("ESRGAN, 4 times as large") == 1  # loaded once
    assert_one_message(*again, "a_ESRGAN.mp4, out/b_ESRGAN.png exist already. Use --yes")


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (("--model", "a.mp4"), ("Error: ", "a.mp4")),
        (("--model", "r.pth", "--output", "a.mp4"), ("OutputError: a.mp4 is the input",)),
        (("--model", "r.pth", "--then", "upscaler", "model=a.mp4"), ("Error: --then upscaler: ", "a.mp4")),
        (("--model", "r.pth", "--input", "r.pth"), ("MediaError: r.pth",)),
        (("--model", "r.pth", "--output", "r.pth/x/"), ("OutputError: --output r.pth/x cannot be created",)),
    ],
)
def test_what_cannot_be_is_one_message_and_leaves_no_file(
    words: tuple[str, ...], messages: tuple[str, ...], tmp_path: Path
) -> None:
    write_clip(tmp_path / "a.mp4", frames=2)
    write_rrdb(tmp_path / "r.pth")
    before = (tmp_path / "a.mp4").read_bytes()

    code, said = run_here(SCRIPT, "--input", "a.mp4", *H264, *words, folder=tmp_path)

    assert_one_message(code, said, *messages, remedy=False)
    assert files_in(tmp_path) == {"a.mp4", "r.pth"}
    assert (tmp_path / "a.mp4").read_bytes() == before


@pytest.fixture(scope="module")
def gimm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of both modes."""
    gimm = write_gimm_f(write_gimm_r(tmp_path_factory.mktemp("gimm")))
    write_flowformer(gimm / "flowformer_sintel_fp32.safetensors")
    return gimm


def write_odd(path: Path, count: int) -> Path:
    """A clip of odd sides that holds its pixels exactly."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 145, 129, "bgr0"
        for pixels in moving(count, width=145, height=129):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.slow_cases("gimmvfi_f-2-2", "gimmvfi_r-3-3")
@pytest.mark.parametrize(("mode", "factor", "count"), [("gimmvfi_r", 3, 3), ("gimmvfi_f", 2, 2)])
def test_a_clip_gets_pictures_between(gimm: Path, tmp_path: Path, mode: str, factor: int, count: int) -> None:
    clip = write_odd(tmp_path / "clip.mkv", count)
    words = f"--input {clip} --model {gimm} --mode {mode} --factor {factor} --device cpu"

    main([*words.split(), "--codec", "h264", "--container", "mp4", "--keep_pngs"])

    output = tmp_path / "clip_VFI.mp4"
    info = video_info(output)
    assert (info.width, info.height, info.fps) == (144, 128, 24 * factor)
    after = list(timed_frames(output))
    starts = [index / (24 * factor) for index in range((count - 1) * factor + 1)]
    assert [start for _, start, _ in after] == pytest.approx(starts, abs=0.001)

    sources = list(video_frames(clip))
    made = iter(plain(gimm, sources, tuple(n / factor for n in range(1, factor)), mode))
    expected = [
        sources[index // factor] if index % factor == 0 else next(made) for index in range(len(after))
    ]
    for found, frame in zip(kept_frames(tmp_path), expected, strict=True):
        assert np.array_equal(found, frame)


CPU = torch.device("cpu")
EAGER = Compilation("eager", fullgraph=True)


def network_options(compile: bool) -> ToolNetworkOptions:
    return ToolNetworkOptions(model=Path("x.pth"), compile=compile)


@pytest.mark.slow_cases("write1-3")
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("write", "forms"),
    # of SwinIR's block for 6 windows, then for any number, and for one
    [(write_rrdb, 1), (partial(write_swinir, heads=(3,), depths=(2,)), 3)],
)
def test_compiled_networks_compute_the_same(tmp_path: Path, write: object, forms: int) -> None:
    assert callable(write)
    network = load_upscaler(write(tmp_path / "x.pth"), CPU, torch.float32).network
    images = torch.rand(1, 3, 8, 12).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = network(images)
        compile_parts(network_options(False), network.repeated_blocks, EAGER)
        assert torch.equal(network(images), plain)
        assert not counters["stats"]
        compile_parts(network_options(True), network.repeated_blocks, EAGER)
        compiled = network(images)

    assert counters["stats"]["unique_graphs"] == forms
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-6)


@pytest.fixture
def no_compiler() -> Iterator[None]:
    import torch._inductor.cpp_builder

    find = torch._inductor.cpp_builder.cpp_compiler_search
    find.cache_clear()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield
    find.cache_clear()


@pytest.mark.usefixtures("nothing_compiled", "no_compiler")
def test_it_is_refused_for_a_later_tool_before_any_network_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    clip, model = write_clip(tmp_path / "a.mp4"), str(write_rrdb(tmp_path / "x.safetensors"))
    words = ["--input", str(clip), "--model", model, "--device", "cpu"]
    words += ["--output", str(tmp_path / "new/a.mkv")]

    with pytest.raises(OptionError, match=r"--then upscaler: .*needs a C\+\+ compiler"):
        run_chain(read_chain("upscaler", "", [*words, "--then", "upscaler", "--model", model, "--compile"]))

    assert "times as large" not in caplog.text
    assert not (tmp_path / "new").exists()
