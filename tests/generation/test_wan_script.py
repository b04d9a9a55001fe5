"""wan_generate_video.py, hv_generate_video.py and sample_video.py on tiny models, from words to files."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hv_generate_video
import sample_video
import wan_generate_video
from blissful_tuner.metadata import read_stored_seed
from hunyuan_model.official_options import NEGATIVE_PROMPT, SIZES, generation_argv, read_official
from modules.errors import OptionError
from modules.media.reading import read_tags, video_frames
from tests.commands import joined
from tests.generation.guided import Script
from tests.tiny.hunyuan import TinyHunyuan, write_tiny_hunyuan
from tests.tiny.hunyuan_dit import tiny_state, write_dit
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM, write_text_encoders
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.project import write_image
from tests.tiny.wan import TinyWan, write_tiny_wan

SIZE = ("--video_size", "32", "48", "--video_length", "5", "--infer_steps", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    return write_tiny_wan(tmp_path_factory.mktemp("t2v"))


def generate(folder: Path, files: TinyWan, *arguments: object, task: str = "t2v-1.3B") -> Tensor:
    """Return the latents that are left, or none where only a model is written."""
    made = Script(wan_generate_video.main, ("--task", task, *SIZE, *files.models)).made(folder, *arguments)
    return next(iter(made.values()), torch.empty(0))


def test_image_to_video_takes_the_images_aspect(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path / "models", "i2v")
    write_image(tmp_path / "in.png", 64, 32)
    say = ("--prompt", "p", "--image_path", tmp_path / "in.png", "--output_type", "both")
    # near 32 x 48 pixels in area, twice as wide as high
    assert generate(tmp_path / "out", files, *say, task="i2v-14B").shape == (16, 2, 2, 6)


@pytest.mark.slow_cases("i2v-3")
@pytest.mark.parametrize(("kind", "frames"), [("flf2v", 2), ("i2v", 3)])
def test_first_and_last_image_and_end_image(tmp_path: Path, kind: str, frames: int) -> None:
    image = tmp_path / "in.png"
    write_image(image, 48, 32)
    paths = ("--image_path", image, "--end_image_path", image, "--output_type", "both")
    more = ("--prompt", "p", *paths, "--trim_tail_frames", 3)
    files = write_tiny_wan(tmp_path / "models", kind)

    made = generate(tmp_path / "out", files, *more, task=f"{kind}-14B")

    assert made.shape[1] == frames
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert len(list(video_frames(video))) == (frames - 1) * 4 + 1 - 3


HUNYUAN_SIZE = ("--video_size", "32", "48", "--video_length", "5", "--infer_steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuan:
    return write_tiny_hunyuan(tmp_path_factory.mktemp("t2v"))


def make_hunyuan(folder: Path, files: TinyHunyuan, *arguments: object) -> dict[int, Tensor]:
    return Script(hv_generate_video.main, (*HUNYUAN_SIZE, *files.models)).made(folder, *arguments)


def test_latents_are_decoded_with_nothing_but_the_vae(tmp_path: Path, hunyuan: TinyHunyuan) -> None:
    make_hunyuan(tmp_path / "latents", hunyuan, "--prompt", "a cat", "--seed", 7)
    (path,) = (tmp_path / "latents").iterdir()
    words = ["--latent_path", path, "--vae", hunyuan.vae, "--save_path", path.parent, "--device", "cpu"]
    for _ in range(2):
        hv_generate_video.main([str(word) for word in words])
    stem = path.name.removesuffix("_latent.safetensors")
    assert {each.name for each in path.parent.iterdir()} == {path.name, f"{stem}.mp4", f"{stem}_.mp4"}


@pytest.fixture
def undone() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("undone")
def test_reproduce_sets_deterministic_algorithms(tmp_path: Path, hunyuan: TinyHunyuan) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    make_hunyuan(tmp_path, hunyuan, "--prompt", "a cat", "--seed", 1, "--reproduce")
    assert torch.are_deterministic_algorithms_enabled()


def test_one_sample_at_a_time_makes_the_passes_of_guidance_singly(
    tmp_path: Path, hunyuan: TinyHunyuan, caplog: pytest.LogCaptureFixture
) -> None:
    say = ("--prompt", "a cat that is long", "--negative_prompt", "dull", "--guidance_scale", 3, "--seed", 1)

    together, singly = (
        make_hunyuan(tmp_path / "a", hunyuan, *say),
        make_hunyuan(tmp_path / "b", hunyuan, *say, "--split_uncond"),
    )
    assert "--split_attn" not in caplog.text
    split = make_hunyuan(tmp_path / "c", hunyuan, *say, "--split_attn")

    assert "--split_attn runs the guidance passes one after the other" in caplog.text
    assert torch.equal(split[1], singly[1])
    # float32, summed in another order, over the steps
    torch.testing.assert_close(split[1], together[1], atol=1e-4, rtol=1e-4)


def test_a_slowed_frequency_changes_long_videos_only(
    tmp_path: Path, hunyuan: TinyHunyuan, caplog: pytest.LogCaptureFixture
) -> None:
    def made(*more: object) -> Tensor:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return make_hunyuan(folder, hunyuan, "--prompt", "a cat", "--seed", 1, *more)[1]

    slow, long = ("--riflex_index", 4), ("--video_length", 53)
    assert torch.equal(made(*slow), made())
    assert "--riflex_index 4 is ignored because the video has 5 frames" in caplog.text
    assert not torch.allclose(made(*long, *slow), made(*long), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dit_in_channels", "20"], "--dit_in_channels 20"),
        (["--hidden_state_skip_layer", "-1"], "--hidden_state_skip_layer"),
        (
            ["--blocks_to_swap", "2"],
            "--blocks_to_swap 2: the transformer has 2 . 3 blocks, at most 0 can be swapped",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, hunyuan: TinyHunyuan, arguments: list[str], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        make_hunyuan(tmp_path, hunyuan, "--prompt", "a cat", *arguments)


PROMPT = 'a cat: "yes/no"?'
SMALL = ("--video-size", "32", "48", "--video-length", "5", "--infer-steps", "2")


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the release with tiny models."""
    base = tmp_path_factory.mktemp("my ckpts")
    release = base / "hunyuan-video-t2v-720p"
    state = tiny_state(dtype=torch.float32, text_dim=LLM_DIM, pooled_dim=CLIP_DIM)
    write_dit(release / "transformers", state, "pt", name="mp_rank_00_model_states")
    write_vae(release / "vae" / "pytorch_model.pt")
    write_text_encoders(base)
    return base


def official(*words: str) -> list[str]:
    return generation_argv(read_official(None, words))


def pixels(path: Path) -> torch.Tensor:
    return torch.stack([torch.from_numpy(frame) for frame in video_frames(path)])


def test_it_equals_our_command(ckpts: Path, tmp_path: Path) -> None:
    precisions = [f"--{name}precision{end}=fp32" for name, end in [("", ""), ("vae-", "")]]
    precisions += ["--text-encoder-precision=fp32", "--text-encoder-precision-2=fp32"]
    words = ["--model-base", str(ckpts), *SMALL, *precisions, "--flow-reverse", "--vae-tiling"]
    words += ["--prompt", PROMPT, "--num-videos", "2", "--seed", "5", "--cfg-scale", "3"]
    sample_video.main([*words, "--save-path", str(tmp_path / "results"), "--save-path-suffix", "mine"])

    made = sorted((tmp_path / "results_mine").iterdir())
    assert [path.name[len("2026-01-01-00-00-00") :] for path in made] == [
        "_seed5_a cat yesno.mp4",
        "_seed6_a cat yesno.mp4",
    ]
    assert read_tags(made[0])["bt_precision"] == "fp32"  # hv_generate_video.py takes it from the file
    release = ckpts / "hunyuan-video-t2v-720p"
    ours = ["--dit", str(release / "transformers" / "mp_rank_00_model_states.pt")]
    ours += ["--vae", str(release / "vae" / "pytorch_model.pt"), "--vae_dtype", "float32"]
    ours += [f"--text_encoder1={ckpts / 'text_encoder'}", f"--text_encoder2={ckpts / 'text_encoder_2'}"]
    ours += ["--text_encoder_dtype", "float32", "--video_size", "32", "48", "--video_length", "5"]
    ours += ["--infer_steps", "2", "--guidance_scale", "3", "--negative_prompt", NEGATIVE_PROMPT]
    hv_generate_video.main([*ours, "--seed", "5", "--prompt", PROMPT, "--save_path", str(tmp_path / "ours")])
    (path,) = (tmp_path / "ours").iterdir()
    assert torch.equal(pixels(made[0]), pixels(path))
    assert not torch.equal(pixels(made[1]), pixels(path))
    assert [read_stored_seed(read_tags(one)) for one in made] == [5, 6]


def test_every_option_has_its_word() -> None:
    words = official(
        *("--prompt", "-a cat", "--video-size", "100", "--infer-steps", "20", "--flow-shift", "9"),
        *("--embedded-cfg-scale", "4", "--use-cpu-offload", "--use-fp8", "--reproduce", "--apply-final-norm"),
        *("--hidden-state-skip-layer", "1", "--dit-weight", "my.pt"),
        *("--neg-prompt", "bad", "--cfg-scale", "2"),
        *("--model-base", "base", "--text-encoder-precision", "bf16", "--text-encoder-precision-2", "bf16"),
        *("--post", "upscaler model=x", "--post", "facefix model=y"),
        *("--ulysses-degree", "4", "--ring-degree", "2"),
    )

    assert joined(words) >= {
        "--prompt=-a cat",
        "--infer_steps=20",
        "--flow_shift=9.0",
        "--embedded_cfg_scale=4.0",
        "--guidance_scale=2.0",
        "--negative_prompt=bad",
        "--blocks_to_swap=auto",
        "--fp8",
        "--reproduce",
        "--apply_final_norm",
        "--context_parallel=8",
        "--hidden_state_skip_layer=1",
        "--dit=my.pt",
        f"--vae={Path('base') / 'hunyuan-video-t2v-720p' / 'vae' / 'pytorch_model.pt'}",
        "--text_encoder_dtype=bf16",
        "--vae_dtype=fp16",
        "--post=upscaler model=x",
        "--post=facefix model=y",
    }
    assert words[words.index("--video_size") :][:3] == ["--video_size", "112", "112"]  # rounded up to 16
    assert "--seed" not in " ".join(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ulysses-degree", "0"], "--ulysses-degree 0"),
        (["--video-length", "128"], "4n + 1, such as 129"),
        (["--video-size", "1", "2", "3"], "--video-size"),
        (["--batch-size", "2"], "--num-videos"),
        (["--text-encoder-precision", "bf16"], "--text-encoder-precision-2"),
        (["--use-linear-quadratic-schedule"], "--use-linear-quadratic-schedule"),
    ],
)
def test_what_does_not_work_is_refused_by_name(words: list[str], said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        read_official(None, ["--prompt", "a", *words])


def test_sizes_are_compared_with_those_of_the_release(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for resolution, sizes in SIZES.items():
        for height, width in sizes:
            size = ["--video-size", str(height), str(width)]
            read_official(None, ["--prompt", "a", *size, "--model-resolution", resolution])
    assert not caplog.text

    read_official(None, ["--prompt", "a", "--video-size", "540", "960"])  # becomes 544, which it knows
    assert not caplog.text
    read_official(None, ["--prompt", "a", "--video-size", "512", "960"])
    assert "nearest is 544 960" in caplog.text
    read_official(None, ["--prompt", "a", "--model-resolution", "540p"])
    assert "is a size of --model-resolution 720p, not of 540p" in caplog.text


def test_one_result_is_the_file_that_save_path_names(tmp_path: Path, t2v: TinyWan) -> None:
    words = ["--task", "t2v-1.3B", *SIZE, *map(str, t2v.models), "--prompt", "p", "--save_path"]
    with pytest.raises(OptionError, match=r"a\.png: the result is a video\. Pass .*a\.mp4"):
        wan_generate_video.main([*words, str(tmp_path / "a.png")])
    with pytest.raises(OptionError, match=r"with --output_type images: the result is 5 images"):
        wan_generate_video.main([*words, str(tmp_path / "a.png"), "--output_type", "images"])
    (tmp_path / "a").mkdir()  # is not in the way

    wan_generate_video.main([*words, str(tmp_path / "a.MP4"), "--output_type", "both"])
    wan_generate_video.main([*words, str(tmp_path / "a.png"), "--video_length", "1"])

    made = {path.name: path for path in tmp_path.iterdir()}
    assert {*made} == {"a", "a.MP4", "a.png", "a_latent.safetensors"}
    assert len([*video_frames(made["a.MP4"])]) == 5
    decode = ["--latent_path", str(made["a_latent.safetensors"]), "--vae", str(t2v.vae), "--save_path"]
    wan_generate_video.main([*decode, str(tmp_path / "new" / "b.mkv"), "--container", "mkv"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.mkv"]
    with pytest.raises(OptionError, match=r"a\.MP4 already exists and is not overwritten"):
        wan_generate_video.main([*words, str(tmp_path / "a.MP4")])
