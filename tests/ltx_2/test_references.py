"""References of LTX-2 by its command lines: videos equal diffusers', and steps those computed with it."""

import inspect
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2InContextPipeline
from diffusers.pipelines.ltx2 import pipeline_ltx2_ic_lora as theirs_module
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ltx2_cache_latents
from ltx_2.references import read_reference_factors, select_reference_frames
from ltx_2.rope import TokenPositions, make_table
from modules.errors import OptionError
from modules.media.writing import write_png
from modules.seeds import derive_seed
from protocols.rules import ReferenceRules
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.ltx_2 import test_family as pipelines
from tests.ltx_2.release import TinyRelease, dit_config, write_release
from tests.ltx_2.test_training import RATE, Heard
from tests.ltx_2.tiny_dit import dit_diffusers_state, dit_in_diffusers
from tests.parity.running import assert_equal
from tests.parity.training import (
    RANK,
    SEED,
    Factors,
    assert_steps_of_descent,
    descent,
    learning,
    noise_of,
    shuffled,
    uniform_of,
)
from tests.sound_media import write_media
from tests.tiny.project import moving_square, write_dataset, write_image

HEIGHT, WIDTH = 64, 128
SCALES = {"guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
LINEAR = re.compile(r"(?:\.attn[12]\.(?:to_[qkv]|to_out\.0)|\.ff\.net\.(?:0\.proj|2))\.weight$")


@pytest.fixture(scope="module")
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("größe"), getattr(request, "param", "2.3"))


def write_reference(folder: Path, number: int, factor: int, frames: int = 9) -> list[Image.Image]:
    """A folder of frames of the very size that is encoded; returns them."""
    folder.mkdir()
    clip = moving_square(frames, WIDTH // factor, HEIGHT // factor, number)
    for place, frame in enumerate(clip):
        write_png(folder / f"{place:03d}.png", frame)
    return [Image.fromarray(frame) for frame in clip]


def write_mask(folder: Path, factor: int, frames: int) -> Tensor:
    """A folder of gray frames, black in their first column of tokens; return them, 1 1 F H W."""
    folder.mkdir()
    shape = frames, HEIGHT // factor, WIDTH // factor
    gray = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    gray[:, :, :32] = 0
    for place, frame in enumerate(gray):
        write_png(folder / f"{place:03d}.png", frame[..., None].expand(-1, -1, 3).numpy())
    return gray[None, None] / 255


def write_lora(path: Path, **metadata: str) -> Path:
    """A LoRA that changes nothing and says something."""
    name = "diffusion_model.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.zeros(24, 2)},
        path,
        metadata,
    )
    return path


def asked_there(
    release: TinyRelease,
    monkeypatch: pytest.MonkeyPatch,
    clips: list[list[Image.Image]],
    factor: int,
    strength: float = 1.0,
    seen: tuple[float, Tensor | None] = (1.0, None),
) -> tuple[Tensor, Tensor]:
    """The latents that diffusers' pipeline makes from the same noise, which it would draw token by token.

    Returns them normalized, and as its VAE decodes them.

    What it takes for clean of a reference goes by the noise level of the clip; here, as in the official code,
    by that of the reference. seen: strength and mask of what both see of each other; what attention adds is
    their logarithm, as there.
    """
    parts = pipelines.theirs(release).components
    taken = inspect.signature(LTX2InContextPipeline.__init__).parameters
    pipe = LTX2InContextPipeline(**{name: part for name, part in parts.items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.register_forward_pre_hook(pipelines.alone, with_kwargs=True)
    masks: list[Tensor] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        masks[:] = [given["video_self_attention_mask"].log().clamp(min=-1e4)]

    def put(_: Any, words: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return words, {**given, "attention_mask": masks[0].view(given["attention_mask"].shape)}

    if seen != (1.0, None):
        pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
        for block in pipe.transformer.transformer_blocks:
            block.attn1.register_forward_pre_hook(put, with_kwargs=True)
    grid = (2, HEIGHT // 32, WIDTH // 32)
    channels = pipe.transformer.config.in_channels
    generator = torch.Generator().manual_seed(pipelines.SEED)
    noise = torch.randn((1, channels, *grid), generator=generator)

    def draw(shape: Any, **_: Any) -> Tensor:
        drawn = torch.zeros(tuple(shape))
        tokens = noise.flatten(2).mT
        count = tokens.shape[1]
        if len(shape) == 3 and shape[2] == channels and shape[1] >= count:
            drawn[:, :count] = tokens
            drawn[:, count:] = torch.randn(drawn[:, count:].shape, generator=generator)
        elif tuple(shape) == tuple(noise.shape):
            drawn = noise
        return drawn

    def to_clean(sample: Tensor, velocity: Tensor, step: int, scheduler: Any = None) -> Tensor:
        share = torch.ones(1, sample.shape[1], 1)
        if sample.shape[2] == channels:
            share[:, math.prod(grid) :] = 1 - strength
        return sample - velocity * share * scheduler.sigmas[step]

    if strength < 1:
        monkeypatch.setattr(pipe, "convert_velocity_to_x0", to_clean)
    monkeypatch.setattr(theirs_module, "randn_tensor", draw)
    latents, _ = pipe(
        prompt=pipelines.PROMPT,
        negative_prompt=pipelines.NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=9,
        frame_rate=24.0,
        num_inference_steps=pipelines.STEPS,
        reference_conditions=[LTX2ReferenceCondition(clip, strength) for clip in clips],
        reference_downscale_factor=factor,
        conditioning_attention_strength=seen[0],
        conditioning_attention_mask=seen[1],
        return_dict=False,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **SCALES,
    )
    return pipe._normalize_latents(latents, pipe.vae.latents_mean, pipe.vae.latents_std)[0], latents


CASES: dict[str, Any] = {
    "a clip": (1, [9], False),
    "an image": (1, [1], False),
    "half the size": (2, [9], False),
    "two": (1, [9, 1], False),
    "the factor of a LoRA": (2, [9], True),
    "less of a clip": (2, [9], False, 0.5),
    "less of two": (1, [9, 1], False, 0.25),
    "seen less": (2, [9, 1], False, 1.0, 0.5, 0),
    "a mask": (2, [9], False, 1.0, 0.75, 9),
    "a gray image": (1, [9], False, 0.5, 1.0, 1),
}
OF_25 = [("half the size", "2.5"), ("two", "2.5")]  # its mark is on the clip's first frame alone


@pytest.mark.slow_cases(
    "a clip-2.3",
    "a gray image-2.3",
    "an image-2.3",
    "half the size-2.3",
    "half the size-2.5",
    "less of a clip-2.3",
    "less of two-2.3",
    "seen less-2.3",
    "the factor of a LoRA-2.3",
    "two-2.3",
)
@pytest.mark.parametrize(
    ("case", "release"), [*((case, "2.3") for case in CASES), *OF_25], indirect=["release"]
)
def test_videos_with_references_equal_those_of_diffusers(
    release: TinyRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    factor, lengths, by_lora, strength, attention, gray = (*CASES[case], 1.0, 1.0, 0)[:6]
    seen = 1.0, None
    clips, paths = [], []
    for number, length in enumerate(lengths):
        folder = tmp_path / f"reference {number}"
        clips.append(write_reference(folder, number, factor, length))
        paths.append(folder / "000.png" if length == 1 else folder)
    words: list[object] = ["--ltx2_mode", "video", "--reference_videos", *paths]
    if by_lora:
        lora = write_lora(tmp_path / "lora.safetensors", reference_downscale_factor="2")
        words += ["--lora_weight", lora]
    elif factor > 1:
        words += ["--reference_downscale", factor]
    if strength < 1:
        words += ["--reference_strength", strength]
    if len(CASES[case]) > 4:
        mask = write_mask(tmp_path / "mask", factor, gray) if gray else None
        seen = attention, None if mask is None else mask.expand(-1, -1, 9, -1, -1)
        file = tmp_path / "mask" / ("000.png" if gray == 1 else "")
        words += ["--conditioning-attention-mask", *([file] if gray else []), attention]
    words += pipelines.scale_words(SCALES, SCALES)
    monkeypatch.setattr(pipelines, "WIDTH", WIDTH)

    made = pipelines.generate(release, tmp_path, *words)

    expected, decoded = asked_there(release, monkeypatch, clips, factor, strength, seen)
    assert_equal(made["latent"], expected, "latents")
    pipelines.assert_shown(release.networks["vae"], decoded, tmp_path / "shown")
    with safe_open(next((tmp_path / "made").iterdir()), "pt") as file:
        said = file.metadata()
    assert said.get("bt_reference_strength") == (f"{strength:g}" if strength < 1 else None)
    told = {0: "", 1: "000.png ", 9: "mask "}[gray] + f"{attention:g}"
    assert said.get("bt_conditioning_attention_mask") == (told if len(CASES[case]) > 4 else None)


def made_of(release: TinyRelease, folder: Path, name: str, *words: object) -> list[Tensor]:
    """The latents of all videos of a run."""
    command = [*release.words, "--gemma_root", release.gemma, "--infer_steps", 2, "--seed", 1]
    command += ["--video_size", 64, 64, "--video_length", 9, "--output_type", "latent", "--device", "cpu"]
    command += ["--no_metadata", "--save_path", name]
    succeed_here("ltx2_generate_video.py", *command, *words, folder=folder)
    return [
        load_file(path)["latent"]
        for path in sorted((folder / name).iterdir(), key=lambda one: one.stat().st_mtime_ns)
    ]


@pytest.mark.slow
def test_lines_and_the_official_spelling_name_references(release: TinyRelease, tmp_path: Path) -> None:
    for number in range(2):
        write_reference(tmp_path / f"clip {number}", number, 1)
    lines = ["a cat --d 1", "a cat --d 1 --v clip 0 --v clip 1", 'a cat --d 1 --v ""']
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ["--ltx2_mode", "v", "--prompt", "a cat"]
    official = ["--video-conditioning", "clip 0", "1.0", "--video-conditioning", "clip 1", "1.0"]

    (both,) = made_of(release, tmp_path, "official", *words, *official)
    (one,) = made_of(release, tmp_path, "one", *words, "--reference_video", "clip 1")
    (none,) = made_of(release, tmp_path, "without", *words)
    default = ["--ltx2_mode", "v", "--reference_video", "clip 1", "--from_file", "lines.txt"]
    found = made_of(release, tmp_path, "lines", *default)

    assert len(found) == 3
    for made, expected in zip(found, (one, both, none), strict=True):
        assert torch.equal(made, expected)
    assert not torch.equal(both, one)
    assert not torch.equal(one, none)


@pytest.mark.slow_cases("first frame", "strength")
@pytest.mark.parametrize(
    "more",
    [["--image_path", "start.png"], ["--reference_strength", "0.5"]],
    ids=["first frame", "strength"],
)
def test_references_with_sound_do_not_depend_on_where_weights_are(
    release: TinyRelease, tmp_path: Path, more: list[str]
) -> None:
    write_reference(tmp_path / "clip", 0, 1)
    write_image(tmp_path / "start.png", 64, 64)
    words = ["--ltx2_mode", "av", "--prompt", "a cat", "--reference_video", "clip", *more]

    (plain,) = made_of(release, tmp_path, "plain", *words)
    (swapped,) = made_of(release, tmp_path, "swapped", *words, "--blocks_to_swap", 1)

    assert plain.shape == (16, 2, 2, 2)
    assert torch.equal(plain, swapped)


def test_a_loras_frames_are_taken_and_wild_factors_refused(tmp_path: Path) -> None:
    good = write_lora(tmp_path / "good.safetensors", reference_frames="1", reference_downscale_factor="2")
    assert read_reference_factors([good]) == {"reference_frames": 1, "reference_downscale": 2}
    for number, text in enumerate(("9" * 5000, "0", "2.0", "two", "")):
        lora = write_lora(tmp_path / f"{number}.safetensors", reference_downscale_factor=text)
        with pytest.raises(OptionError, match="reference_downscale_factor"):
            read_reference_factors([lora])


def test_loras_of_other_factors_do_not_work_together(release: TinyRelease, tmp_path: Path) -> None:
    write_reference(tmp_path / "reference", 0, 1)
    loras = [
        write_lora(tmp_path / f"{number}.safetensors", reference_spatial_scale_factor=number)
        for number in "12"
    ]
    words = [*release.words, "--prompt", "a cat", "--reference_video", "reference", "--lora_weight", *loras]

    code, said = run_here("ltx2_generate_video.py", *words, "--save_path", "made", folder=tmp_path)

    assert_one_message(code, said, "2.safetensors was trained on references with", "cannot be combined")


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--reference_video", "nowhere.mp4"], ["--reference_video nowhere.mp4: no such file"]),
        (["--reference_video", "empty"], ["empty is a folder without images"]),
        (["--reference_video", "clip", "--reference_downscale", "4"], ["sides are multiples of 128"]),
        (["--reference_strength", "0.5"], ["no reference is given. Pass --reference_video"]),
        (["--conditioning-attention-mask", "0.5"], ["no reference is given. Pass --reference_video"]),
        (
            ["--reference_video", "clip", "--conditioning-attention-mask", "short", "1"],
            ["short: it has 1 usable frames, but a reference has 9", "Pass an image, or a clip as long"],
        ),
        (["--reference_video", "clip", "--conditioning-attention-mask", "empty", "1"], ["without images"]),
        (
            ["--reference_video", "clip", "--ic_lora_strategy", "none"],
            ["none with references: omit one"],
        ),
    ],
)
def test_what_references_lack_is_one_message(
    release: TinyRelease, tmp_path: Path, words: list[str], messages: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    write_reference(tmp_path / "clip", 0, 1)
    write_mask(tmp_path / "short", 1, 1)
    command = [*release.words, *release.texts, "--prompt", "a cat", "--video_size", 64, 64, "--device", "cpu"]

    code, said = run_here(
        *("ltx2_generate_video.py", *command, "--video_length", 9, *words, "--save_path", "made"),
        folder=tmp_path,
    )

    assert_one_message(code, said, *messages)


def test_lines_have_no_references_where_they_are_refused(release: TinyRelease, tmp_path: Path) -> None:
    write_reference(tmp_path / "clip", 0, 1)
    (tmp_path / "lines.txt").write_text("a cat --v clip", encoding="utf-8")
    words = [*release.words, *release.texts, "--from_file", "lines.txt", "--ic_lora_strategy", "none"]

    code, said = run_here("ltx2_generate_video.py", *words, "--save_path", "made", folder=tmp_path)

    assert (code, "line 1: OptionError: --ic_lora_strategy none with references" in said) == (1, True), said


def test_positions_of_a_reference_are_spread_over_its_target() -> None:
    """Frames 0, 1, 5, 9, ... stand where those of the target do."""
    config = dit_config("2.3")
    full = TokenPositions(config.dim, (3, 2, 2), (24.0,))
    tables = [
        make_table(config, one, device=torch.device("cpu"))
        for one in (full, full._replace(time_factor=2), full._replace(size_factor=2))
    ]
    assert_equal(tables[1][:4], tables[0][:4], "the first latent is of one frame")
    assert (tables[1][4:] - tables[0][4:]).abs().max() > 1e-3
    assert (tables[2] - tables[0]).abs().max() > 1e-3
    frames = torch.arange(33)[None, :, None, None, None]
    assert select_reference_frames(frames, ReferenceRules(1, time_factor=4), 8).flatten().tolist() == [
        0,
        *range(1, 33, 4),
    ]
    assert select_reference_frames(frames, ReferenceRules(1, max_frames=10), 8).shape[1] == 9


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyRelease]:
    """Two clips whose references have half their size, and caches."""
    folder = tmp_path_factory.mktemp("größe 3")
    release = write_release(folder / "model", "2.3")
    for place in ("clips", "references"):
        (folder / place).mkdir()
        for number, name in enumerate("ab"):
            write_media(folder / place / f"{name}.mp4", frames=10 + number + 8 * (place == "references"))
    for name in "ab":
        (folder / "clips" / f"{name}.txt").write_text(f"a gray wall {name}", encoding="utf-8")
    # both as in tables of the known fork
    more = f'reference_directory = "{(folder / "references").as_posix()}"\ntarget_fps = 25'
    write_dataset(folder, size=64, frames="9", batch_size=2, more=more)
    words = [*release.words, "--dataset_config", "dataset.toml"]
    succeed_here("ltx2_cache_latents.py", *words, "--reference_downscale", 2, folder=folder)
    texts = ["ltx2_cache_text_encoder_outputs.py", *words, "--gemma_root", release.gemma]
    succeed_here(*texts, "--text_encoder_dtype", "float32", folder=folder)
    return folder, release


def train(project: tuple[Path, TinyRelease], *words: object) -> tuple[int, str]:
    folder, release = project
    command = [*release.words, "--dataset_config", "dataset.toml", "--network_module", "networks.lora_ltx2"]
    command += ["--network_dim", RANK, "--timestep_sampling", "uniform", "--lora_target_preset", "v2v"]
    command += ["--ltx2_first_frame_conditioning_p", 0, *descent(RATE), "--lora_format", "known", *words]
    return run_here("ltx2_train_network.py", *command, folder=folder)


def loss_of(dit: Any, items: list[Heard], references: list[Tensor], step: int) -> Tensor:
    """The mean loss of the targets alone; references stand behind them, clean and at the time 0."""
    sigmas, noise = uniform_of(items, step).float(), noise_of(items, step)
    found = []
    for place, (item, reference) in enumerate(zip(items, references, strict=True)):
        sigma, grid = sigmas[place], item.latents.shape[1:]
        mixed = (1 - sigma) * item.latents + sigma * noise[place]
        tokens = torch.cat([mixed.flatten(1).T, reference.flatten(1).T])[None]
        count, time = mixed[0].numel(), 1000 * sigma.view(1)
        times = torch.cat([time.expand(count), torch.zeros(reference[0].numel())])[None]
        coords = dit.rope.prepare_video_coords(1, *grid, "cpu", fps=item.fps)
        if reference.numel():
            others = dit.rope.prepare_video_coords(1, *reference.shape[1:], "cpu", fps=item.fps)
            others[:, 1:] *= 2
            coords = torch.cat([coords, others], dim=2)
        made = dit(
            hidden_states=tokens,
            audio_hidden_states=torch.zeros(1, 1, dit.config.audio_in_channels),
            encoder_hidden_states=item.text[None],
            audio_encoder_hidden_states=torch.zeros(1, 4, dit_config("2.3").streams.popitem()[1].text_dim),
            timestep=times,
            sigma=time,
            audio_timestep=time,
            audio_sigma=time,
            num_frames=grid[0],
            height=grid[1],
            width=grid[2],
            audio_num_frames=1,
            fps=item.fps,
            video_coords=coords,
            isolate_modalities=True,
        )
        velocity = made.sample[0, :count].T.unflatten(1, grid)
        found.append((velocity - (noise[place] - item.latents)).square().mean())
    return torch.stack(found).mean()


@pytest.mark.slow_cases("1.0")
@pytest.mark.parametrize("share", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_two_steps_with_references_equal_those_computed_with_diffusers(
    project: tuple[Path, TinyRelease], share: float
) -> None:
    folder, release = project
    words = [] if share == 1 else ["--ic_lora_ref_probability", share]
    code, said = train(project, "--reference_downscale", 2, *words)
    assert code == 0, said[-4000:]

    items, references = [], {}
    for path in sorted((folder / "cache").glob("*_ltx2.safetensors")):
        stored = load_file(path)
        (name,) = (name for name in stored if name.startswith("latents_reference_0_"))
        (own,) = (name for name in stored if re.match(r"latents_\d", name))
        assert name.split("_")[3] == "2x1x1"
        text = load_file(folder / "cache" / f"{path.name.rsplit('_', 3)[0]}_ltx2_te.safetensors")
        (embeds,) = (one for key, one in text.items() if key.startswith("video_prompt_embeds"))
        with safe_open(path, "pt") as file:
            fps = float(file.metadata()["reelsmith_fps"])
        items.append(Heard(stored[own].float(), embeds.float(), fps=fps))
        references[id(items[-1])] = stored[name].float()
    state = release.networks["state"]
    paths = [name.removesuffix(".weight") for name in state if LINEAR.search(name)]
    parts = {
        path.replace(".", "_"): [name.removesuffix(".weight")]
        for path in paths
        for name in dit_diffusers_state({f"{path}.weight": state[f"{path}.weight"]})
    }

    def gradients(factors: Factors, step: int) -> Factors:
        dit = dit_in_diffusers("2.3", state, config=dit_config("2.3"))
        with learning(dit, parts, factors) as found:
            batch, drawn = shuffled(items, step), random.Random(derive_seed(SEED, "references", step))
            sees = share == 1 or drawn.random() >= 1 - share
            seen.append(sees)
            shown = [references[id(one)] if sees else references[id(one)][:, :0] for one in batch]
            loss_of(dit, batch, shown, step).backward()
        return found()

    seen: list[bool] = []
    assert_steps_of_descent(folder / "out", parts, RATE, gradients, "LTX-2")
    assert set(seen) == ({True} if share == 1 else {True, False})
    with safe_open(folder / "out" / "lora.safetensors", "pt") as file:
        said_there = file.metadata()
    names = "reference_downscale_factor", "reference_spatial_scale_factor", "reference_temporal_scale_factor"
    assert [said_there[name] for name in names] == ["2", "2", "1"]


def test_references_of_another_factor_are_not_trained(project: tuple[Path, TinyRelease]) -> None:
    code, said = train(project)
    assert_one_message(code, said, "references were made with size factor 2", "this run has size factor 1")


def test_sides_that_references_cannot_have_are_told_with_the_clip(project: tuple[Path, TinyRelease]) -> None:
    folder, release = project
    words = [*release.words, "--dataset_config", "dataset.toml", "--reference_downscale", 4]

    code, said = run_here("ltx2_cache_latents.py", *words, folder=folder)

    assert_one_message(
        code,
        said,
        "a.mp4: its bucket is 64x64 pixels",
        "4 times smaller (--reference_downscale) sides must be multiples",
    )


@pytest.mark.slow
def test_samples_are_made_from_the_reference_of_their_line(project: tuple[Path, TinyRelease]) -> None:
    folder, release = project
    line = "a cat --w 64 --h 64 --f 9 --s 2 --d 1"
    (folder / "prompts.txt").write_text(f"{line}\n{line} --v references/a.mp4\n", encoding="utf-8")
    words = ["--sample_prompts", "prompts.txt", "--gemma_root", release.gemma, "--sample_at_first"]

    code, said = train(project, "--reference_downscale", 2, *words, "--max_train_steps", 1)

    assert (code, "nothing has a reference" in said) == (0, False), said[-4000:]
    made = sorted((folder / "out" / "sample").glob("lora_e000000_*.mp4"))
    assert len(made) == 2
    assert made[0].read_bytes() != made[1].read_bytes()


def test_checks_show_pairs(
    project: tuple[Path, TinyRelease], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, release = project
    monkeypatch.chdir(folder)
    words = [*release.words, "--dataset_config", "dataset.toml", "--check", "--reference_downscale", "2"]
    with pytest.raises(SystemExit) as end:
        ltx2_cache_latents.main([str(word) for word in words])
    assert end.value.code == 0
    assert "references: 2 items with 1" in capsys.readouterr().out
