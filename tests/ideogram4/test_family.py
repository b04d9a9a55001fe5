"""What Ideogram 4 settles for a request and a training, and what it refuses before a network is loaded."""

import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_2.options import Flux2VaeOptions
from ideogram4.family import Ideogram4, family_for_generation
from ideogram4.files import FIRST_TYPE, MODEL_TYPE, SECOND_TYPE, Ideogram4Files
from ideogram4.options import DEFAULT, QUALITY, TURBO, Ideogram4GenerationOptions, Ideogram4TextOptions
from ideogram4.sampling import SAMPLERS
from modules.errors import CacheError, CheckpointError, DatasetError
from modules.media.reading import read_image
from modules.speed_options import VaeOptions
from protocols.data import Batch, MediaTable
from protocols.families import list_same_latents
from protocols.requests import Prepared, Request
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import family_called
from tests.tiny.ideogram4 import SECOND_NAME, save, tiny_state, write_tiny_ideogram4
from tests.tiny.language_models import qwen3_vl, write_model, write_qwen_tokenizer

CAPTION = '{"compositional_deconstruction": {"background": "grass", "elements": []}}'
SECOND = ("--unconditional_dit", f"model/{SECOND_NAME}")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Ideogram4:
    files = write_tiny_ideogram4(tmp_path_factory.mktemp("models"))
    return Ideogram4(Ideogram4Files(files.dit, vae=files.vae, text_encoder=files.text_encoder))


def prepare(family: Ideogram4, **asked: Any) -> Prepared:
    return family.prepare(Request(CAPTION, 1, **asked))


def test_what_is_not_said_is_as_released(family: Ideogram4) -> None:
    prepared = prepare(family)

    assert (prepared.width, prepared.height, prepared.steps) == (1024, 1024, 20)
    assert (prepared.guidance_scale, prepared.negative_prompt) == ((7.0,), "")
    assert (prepared.rules.final_steps, prepared.rules.final_scale) == (2, 3.0)
    assert prepared.flow_shift == pytest.approx(2.0)  # the side over 512


def test_a_scale_of_the_user_holds_in_all_steps(family: Ideogram4) -> None:
    assert prepare(family, guidance_scale=5.0).rules.final_steps == 0


@pytest.mark.parametrize(
    ("preset", "mean", "std"), [(QUALITY, 0.0, 1.5), (DEFAULT, 0.0, 1.75), (TURBO, 0.5, 1.75)]
)
@pytest.mark.parametrize("side", [256, 512, 2048])
def test_noise_levels_are_those_of_the_pipeline(
    family: Ideogram4, preset: str, mean: float, std: float, side: int
) -> None:
    sampler = SAMPLERS[preset]

    prepared = prepare(replace(family, sampler=sampler), width=side, height=side)

    there = _logit_normal_sigmas(sampler.steps, mean + math.log(side / 512), std=std)
    torch.testing.assert_close(torch.tensor(prepared.sigmas[:-1]), there, rtol=1e-6, atol=1e-7)
    assert (prepared.steps, prepared.sigmas[-1]) == (sampler.steps, 0.0)


def test_a_flow_shift_replaces_the_mean(family: Ideogram4) -> None:
    shifted, wide = prepare(family, flow_shift=2.0), prepare(family)
    assert shifted.sigmas == pytest.approx(wide.sigmas)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("models/ideogram4_fp8_scaled.safetensors", (20, 7.0)),
        ("models--fal--ideogram-v4-instant/transformer", (8, 1.0)),
        ("fal/ideogram-v4-fast/transformer", (20, 1.0)),
        ("breakfast_ideogram.safetensors", (20, 7.0)),
    ],
)
def test_a_name_says_what_was_distilled(family: Ideogram4, name: str, expected: tuple[int, float]) -> None:
    default = replace(family, files=replace(family.files, dit=Path(name))).defaults
    assert (default.steps, default.guidance_scale) == expected


@pytest.mark.parametrize(("name", "warned"), [("ideogram-v4-instant", True), ("ideogram-v4-fast", False)])
def test_unpublished_noise_levels_are_said(caplog: pytest.LogCaptureFixture, name: str, warned: bool) -> None:
    options = Ideogram4GenerationOptions(
        dit=Path(name), vae=Flux2VaeOptions(file=VaeOptions()), text=Ideogram4TextOptions()
    )
    family_for_generation(options)
    assert ("the Instant release are not published" in caplog.text) == warned


def test_only_captions_that_fit_are_cached(family: Ideogram4) -> None:
    latents = torch.zeros(1, 128, 1, 4, 4)
    given: dict[str, Any] = {"latents": latents, "i4_llm_features": [torch.zeros(3, 33280)]}
    batch = Batch(given, ("a cat",), ("a.png",))

    with pytest.raises(CacheError, match=r"has width 33280.*ideogram4_cache_text_encoder_outputs\.py"):
        family.batch_conditions(latents, batch)
    with pytest.raises(DatasetError, match="flip_aug mirrors images"):
        family.check_table(MediaTable(name="data.toml", kind="image", flips=True))


def test_latents_are_normalized_with_the_model_s_own_statistics(family: Ideogram4) -> None:
    """Those in the autoencoder's file are FLUX.2's, so their caches are not shared."""
    vae = family.files.load_vae(torch.device("cpu"))
    means = torch.tensor(family.latent.channel_means)
    file = load_file(family.files.vae_path)["bn.running_mean"]
    assert torch.equal(vae.mean.flatten(), means)
    assert not torch.allclose(means, file, atol=1e-2)
    cached = torch.randn(1, 128, 1, 2, 3)
    back = family.latent.to_model(cached) * vae.deviation[:, None] + vae.mean[:, None]
    torch.testing.assert_close(back, cached)
    assert list_same_latents("ideogram4") == {"ideogram4"}


def test_the_two_networks_are_not_exchanged(family: Ideogram4, tmp_path: Path) -> None:
    """Metadata say which one a file is, else its name."""
    folder = family.files.dit_path.parent
    second = folder / SECOND_NAME
    with pytest.raises(CheckpointError, match="predicts without a text.*this file to --unconditional_dit"):
        replace(family.files, dit=second).check()
    with pytest.raises(CheckpointError, match="neither its metadata nor its name says unconditional"):
        replace(family.files, unconditional_dit=family.files.dit_path).check_second()
    # metadata count more than the name
    named = save(tmp_path / "uncond.safetensors", tiny_state(), {MODEL_TYPE: FIRST_TYPE})
    replace(family.files, dit=named).check()
    bare = save(tmp_path / "unconditional_transformer.safetensors", tiny_state(1))
    replace(family.files, unconditional_dit=bare).check_second()
    narrow = save(tmp_path / "narrow.safetensors", tiny_state(1, ffn_dim=64), {MODEL_TYPE: SECOND_TYPE})
    with pytest.raises(CheckpointError, match="its dimensions differ"):
        replace(family.files, unconditional_dit=narrow).check_second()


def test_an_encoder_of_another_width_is_refused(family: Ideogram4, tmp_path: Path) -> None:
    """As Qwen3-VL 4B, whose states are narrower."""
    wide = write_tiny_ideogram4(tmp_path / "wide", text_dim=13 * 96)
    with pytest.raises(CheckpointError, match=r"takes width 1248(.|\n)*qwen3vl_8b_fp8_scaled"):
        replace(family.files, dit=wide.dit).check()
    write_qwen_tokenizer(tmp_path)
    write_model(tmp_path / "model.safetensors", qwen3_vl(layers=4))
    with pytest.raises(CheckpointError, match="has only 4 layers, but 36 are needed"):
        replace(family.files, text_encoder=tmp_path).check()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A dataset with caches."""
    family = family_called("ideogram4")
    family.prepare(tmp_path)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    return tmp_path


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_samples_of_a_training_are_those_of_both_networks(project: Path, whole: bool) -> None:
    """What is trained changes the first one alone; a generation makes the same picture afterwards."""
    (project / "prompts.txt").write_text(f"{CAPTION} --w 32 --h 32 --d 7 --s 2\n", encoding="utf-8")
    family = family_called("ideogram4")
    words = train_whole() if whole else [*family.train]
    more = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", "1", "--max_train_steps", "1"]
    more += ["--output_dir", "out", "--output_name", "own", "--learning_rate", "0.01"]
    succeed_here(*words, *SECOND, *more, folder=project)
    (sample,) = (project / "out" / "sample").glob("*_7.png")

    made_with = {"--lora_weight": "out/own.safetensors"}
    generate = [*family.generate]
    if whole:
        made_with = {}
        generate[generate.index("--dit") + 1] = "out/own.safetensors"
    words = ["--prompt", CAPTION, "--image_size", "32", "32", "--seed", "7", "--infer_steps", "2"]
    for number, second in enumerate((SECOND, ())):
        lora = [word for pair in made_with.items() for word in pair]
        succeed_here(*generate, *second, *words, *lora, "--save_path", f"made {number}", folder=project)

    both, one = (
        read_image(next((project / f"made {number}").glob("*.png"))).astype(int) for number in (0, 1)
    )
    assert abs(read_image(sample).astype(int) - both).max() <= 1
    assert abs(one - both).max() > 1


def train_whole() -> list[str]:
    """The command that trains the whole model."""
    family = family_called("ideogram4")
    words = [word.replace("ideogram4_train_network.py", family.train_full) for word in family.train]
    network = {"--network_module", "--network_dim", "--network_alpha"}
    return [word for number, word in enumerate(words) if not {word, words[max(number - 1, 0)]} & network]


@pytest.mark.slow
def test_a_plan_counts_both_networks(project: Path) -> None:
    """The second one waits in host memory, and is next to the trained one for samples."""
    (project / "prompts.txt").write_text("a cat --w 32 --h 32 --s 2\n", encoding="utf-8")
    train = [
        *family_called("ideogram4").train,
        *SECOND,
        "--plan",
        "--output_dir",
        "out",
        "--output_name",
        "own",
    ]
    for prompts, phases in ((), 0), (("--sample_prompts", "prompts.txt"), 1):
        printed = StringIO()
        run_here(*train, *prompts, folder=project, printed=printed)
        told = printed.getvalue()
        assert told.count("samples by both transformers") == phases
        assert told.count("second transformer") == 2 * phases


def test_a_whole_model_says_which_network_it_is(project: Path) -> None:
    """musubi-tuner reads no file without it."""
    more = ["--max_train_steps", "1", "--output_dir", "out", "--output_name", "whole"]
    succeed_here(*train_whole(), *more, folder=project)

    with safe_open(project / "out" / "whole.safetensors", "pt") as file:
        assert file.metadata()[MODEL_TYPE] == FIRST_TYPE


def test_caches_of_musubi_tuner_are_used(project: Path) -> None:
    """Raw means 128 h w, and states of a caption in 8 bits."""
    for path in (project / "cache").glob("*_i4.safetensors"):
        (name,) = load_file(path)
        assert name.startswith("latents_1x")
        assert load_file(path)[name].ndim == 3
    for path in (project / "cache").glob("*_i4_te.safetensors"):
        ((name, states),) = load_file(path).items()
        assert name == "varlen_i4_llm_features_bfloat16"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        small = {name.replace("bfloat16", "float8_e4m3fn"): states.to(torch.float8_e4m3fn)}
        save_file(small, path, {key: metadata[key] for key in ("architecture", "caption1", "format_version")})
    more = ["--max_train_steps", "1", "--output_dir", "out", "--output_name", "lora"]
    succeed_here(*family_called("ideogram4").train, *more, folder=project)


def test_a_caption_that_is_checked_stops_caching(tmp_path: Path) -> None:
    family = family_called("ideogram4")
    family.prepare(tmp_path)
    printed = StringIO()
    code, _ = run_here(*family.cache_texts, "--check", folder=tmp_path, printed=printed)
    assert "4 of 4 captions are plain sentences, and Ideogram 4 was trained with JSON" in printed.getvalue()
    assert not code
    code, said = run_here(*family.cache_texts, "--validate_caption_structure", folder=tmp_path)
    assert code
    assert "it is no JSON object" in said
    more = ("--validate_caption_structure", "--warn_on_caption_issues")
    code, said = run_here(*family.cache_texts, *more, folder=tmp_path)
    assert not code
    assert "it is no JSON object" in said


def test_the_network_without_text_is_not_trained(project: Path) -> None:
    train = [word.replace("dit.safetensors", SECOND_NAME) for word in family_called("ideogram4").train]
    code, said = run_here(*train, "--output_dir", "out", "--output_name", "lora", folder=project)
    assert "predicts without a text" in assert_one_message(code, said)
