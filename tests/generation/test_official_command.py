"""sample_video.py, the command line of HunyuanVideo's release, on a tiny model in its folders."""

import logging
import re
from pathlib import Path

import pytest
import torch

import hv_generate_video
import sample_video
from blissful_tuner.metadata import seed_in
from hunyuan_model.official_options import NEGATIVE_PROMPT, SIZES, generation_words, read_official
from modules.errors import OptionError
from modules.media.reading import video_frames
from tests.media_tags import read_tags
from tests.tiny.hunyuan_dit import tiny_state, write_dit
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM, write_text_encoders
from tests.tiny.hunyuan_vae import write_vae

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
    return generation_words(read_official(None, words))


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
    assert [seed_in(read_tags(one)) for one in made] == [5, 6]


def test_every_option_has_its_word() -> None:
    words = official(
        *("--prompt", "-a cat", "--video-size", "100", "--infer-steps", "20", "--flow-shift", "9"),
        *("--embedded-cfg-scale", "4", "--use-cpu-offload", "--use-fp8", "--reproduce", "--apply-final-norm"),
        *("--hidden-state-skip-layer", "1", "--dit-weight", "my.pt"),
        *("--neg-prompt", "bad", "--cfg-scale", "2"),
        *("--model-base", "base", "--text-encoder-precision", "bf16", "--text-encoder-precision-2", "bf16"),
    )

    assert set(words) >= {
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
        "--hidden_state_skip_layer=1",
        "--dit=my.pt",
        f"--vae={Path('base') / 'hunyuan-video-t2v-720p' / 'vae' / 'pytorch_model.pt'}",
        "--text_encoder_dtype=bf16",
        "--vae_dtype=fp16",
    }
    assert words[words.index("--video_size") :][:3] == ["--video_size", "112", "112"]  # rounded up to 16
    assert "--seed" not in " ".join(words)


def test_tools_for_finished_videos_are_passed_on() -> None:
    words = official("--prompt", "a", "--post", "upscaler model=x", "--post", "facefix model=y")

    assert [word for word in words if "--post" in word] == [
        "--post=upscaler model=x",
        "--post=facefix model=y",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ulysses-degree", "2"], "--ulysses-degree is not supported yet"),
        (["--ring-degree", "4"], "--ring-degree"),
        (["--video-length", "128"], "4n + 1, such as 129"),
        (["--video-size", "1", "2", "3"], "--video-size"),
        (["--batch-size", "2"], "--num-videos"),
        (["--flow-solver", "dpm"], "--flow-solver"),
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
    assert "Nearest: 544 960" in caplog.text
    read_official(None, ["--prompt", "a", "--model-resolution", "540p"])
    assert "is a size of --model-resolution 720p, not of 540p" in caplog.text
