"""Bernini-R's sequence, numbers, sentences, guidance and files."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from blissful_tuner.guidance_formulas import POSITIVE, Pass, guide_chain, project_chain
from modules.errors import CacheError
from protocols.data import Batch
from protocols.loading import Placement
from protocols.requests import Prompt
from protocols.steps import Overrides
from tests.parity import bernini as oracle
from tests.parity.reference import relative_error
from tests.tiny.wan_dit import CONFIGS, diffusers_state, tiny_state, write_dit
from wan.bernini import (
    BerniniRequest,
    batch_sources,
    begin_with,
    find_sign,
    list_sources,
    number_sources,
)
from wan.bernini_options import DEFAULT_SCALES, SENTENCES, choose_mode, choose_topic
from wan.checkpoints import identify, load_dit
from wan.model import WanModel
from wan.spec import SourceLatents

CPU = torch.device("cpu")
TIMESTEP = 640.0
TOLERANCE = 1e-4  # of the output's norm; rounding is below 1e-6, the least of the mistakes above 5e-3


@pytest.fixture(scope="module")
def scene() -> SimpleNamespace:
    """A network of two heads, a noisy clip with its text, and a clip and an image of other sizes."""
    config = replace(CONFIGS["t2v"], dim=256, num_heads=2)
    weights = tiny_state("t2v", dim=256)
    network = WanModel(config)
    network.load_state_dict(weights)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    sources = (draw(16, 3, 4, 6), draw(16, 1, 8, 4))
    return SimpleNamespace(
        weights=weights, network=network.eval(), noisy=draw(16, 3, 6, 8), text=draw(9, 32), sources=sources
    )


def predict(scene: SimpleNamespace, count: int) -> torch.Tensor:
    sources = [
        SourceLatents(latents[None], index + 1.0) for index, latents in enumerate(scene.sources[:count])
    ]
    with torch.no_grad():
        made = scene.network(scene.noisy[None], torch.tensor([TIMESTEP]), [scene.text], None, sources=sources)
    return made[0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_velocity_with_sources_is_the_releases(scene: SimpleNamespace, count: int) -> None:
    expected = oracle.velocity(scene.weights, scene.noisy, TIMESTEP, scene.text, scene.sources[:count])

    assert relative_error(predict(scene, count), expected) < TOLERANCE


@pytest.mark.parametrize("mistake", oracle.MISTAKES)
def test_each_misreading_of_the_release_is_seen(scene: SimpleNamespace, mistake: oracle.Mistake) -> None:
    wrong = oracle.velocity(scene.weights, scene.noisy, TIMESTEP, scene.text, scene.sources, mistake)

    assert relative_error(predict(scene, 2), wrong) > 30 * TOLERANCE


def test_the_order_of_the_tokens_changes_nothing_but_the_numbers_do(scene: SimpleNamespace) -> None:
    first, second = scene.sources
    arguments = (scene.noisy[None], torch.tensor([TIMESTEP]), [scene.text], None)
    swapped = [SourceLatents(second[None], 2.0), SourceLatents(first[None], 1.0)]

    with torch.no_grad():
        made = scene.network(*arguments, sources=swapped)[0]

    assert relative_error(made, predict(scene, 2)) < TOLERANCE


def test_sources_are_numbered_videos_first_and_more_than_five_share_the_trained_numbers() -> None:
    clip, image, other = torch.zeros(1, 16, 3, 4, 4), torch.ones(1, 16, 1, 4, 4), torch.ones(1, 16, 1, 2, 2)
    cond = {"latents_reference_10": other, "latents_reference_2": image, "latents_control": clip, "t5": []}

    found = list_sources(cond, None, CPU)

    assert [tuple(source.latents.shape[2:]) for source in found] == [(3, 4, 4), (1, 4, 4), (1, 2, 2)]
    assert [source.number for source in found] == [1, 2, 3]
    assert [source.number for source in list_sources(cond, 1, CPU)] == [1]
    image_to_change = {"latents_control": image, "latents_reference_0": clip}
    assert [source.latents.shape[2] for source in list_sources(image_to_change, None, CPU)] == [3, 1]
    assert number_sources(5) == [1, 2, 3, 4, 5]
    assert number_sources(9) == [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]


def test_the_sentence_stands_directly_in_front_of_the_prompt() -> None:
    prompt = begin_with(Prompt(" a red hat", ((3, 6, 1.2),)), SENTENCES["v2v"])

    assert prompt.text == "You are a helpful assistant specialized in video editing.a red hat"
    (start, end, weight) = prompt.weighted_spans[0]
    assert (prompt.text[start:end], weight) == ("red", 1.2)
    assert begin_with(prompt, SENTENCES["r2v"]) is prompt, "one sentence is enough"
    assert begin_with(Prompt(""), SENTENCES["v2v"]).text == ""


@pytest.mark.parametrize(
    ("is_still", "num_videos", "num_images", "topic", "mode"),
    [
        (False, 1, 1, "rv2v", "rv2v"),
        (False, 1, 0, "v2v", "v2v_apg"),
        (False, 0, 2, "r2v", "r2v_apg"),
        (True, 0, 1, "i2i", "v2v"),
        (True, 0, 0, "t2i", "t2v_apg"),
        (False, 0, 0, "t2v", "t2v_apg"),
    ],
)
def test_topic_and_guidance_follow_from_the_sources(
    is_still: bool, num_videos: int, num_images: int, topic: str, mode: str
) -> None:
    assert choose_topic(is_still, num_videos, num_images) == topic
    assert choose_mode(topic, num_videos, num_images) == mode


CLIP, IMAGE = Path("clip.mp4"), Path("image.png")


def request(mode: str, videos: int = 1, images: int = 1) -> BerniniRequest:
    return BerniniRequest((CLIP,) * videos, (IMAGE,) * images, "v2v", mode, DEFAULT_SCALES)


def test_all_weights_are_smaller_for_low_noise_and_once() -> None:
    guidance = request("rv2v").make_guidance(num_experts=2)

    assert guidance is not None
    assert guidance.counts == (0, 1, None)
    assert guidance.weights == ((pytest.approx(1.0), pytest.approx(3.6)), (1.25, 4.5))
    alone = request("rv2v").make_guidance(num_experts=1)
    assert alone is not None
    assert alone.weights == ((1.25, 4.5),)


def test_passes_that_see_the_same_sources_are_one() -> None:
    without_images = request("rv2v", images=0).make_guidance(1)
    without_video = request("rv2v", videos=0).make_guidance(1)

    assert without_images is not None
    assert (without_images.counts, without_images.weights) == ((0, None), ((1.25,),))
    assert without_video is not None
    assert (without_video.counts, without_video.weights) == ((0, None), ((4.5,),))
    assert request("v2v").make_guidance(1) is None, "plain guidance, both passes with all sources"
    assert request("t2v", 0, 0).make_guidance(1) is None
    projected = request("t2v_apg", 0, 0).make_guidance(1)
    assert projected is not None
    assert (projected.counts, projected.is_projected) == ((None,), True)


def test_chained_guidance_is_the_releases() -> None:
    generator = torch.Generator().manual_seed(3)
    noisy, *passes = (torch.randn(1, 16, 3, 4, 6, generator=generator) for _ in range(4))
    # strong enough that the limit of the norm matters in one frame
    passes[2][:, :, 1] *= 30
    chain = (Pass("negative", Overrides(max_references=0)), Pass("negative", Overrides(max_references=1)))
    velocities = dict(zip((*chain, POSITIVE), passes, strict=True))
    sigma, weights = 0.64, (1.25, 4.0)
    singles = [one[0] for one in passes]

    plain = guide_chain(chain, weights).change(passes[2], velocities)
    clean = {pass_: noisy - sigma * one for pass_, one in velocities.items()}
    projected = project_chain(chain, weights).change(clean[POSITIVE], clean)

    assert relative_error(plain[0], oracle.guide(singles, weights)) < 1e-6
    expected = oracle.guide_projected(noisy[0], sigma, singles, weights)
    assert relative_error(((noisy - projected) / sigma)[0], expected) < 1e-5
    assert relative_error(plain[0], expected) > 0.1


# files


def test_a_trainers_file_is_read_and_its_averaged_copy_is_taken(tmp_path: Path) -> None:
    averaged, other = diffusers_state(tiny_state("t2v")), diffusers_state(tiny_state("t2v", seed=5))
    path = tmp_path / "low.safetensors"
    tensors = {f"ema.diff_dec.transformer_2.{name}": tensor for name, tensor in averaged.items()}
    tensors |= {f"diff_dec.transformer_2.{name}": tensor for name, tensor in other.items()}
    save_file(tensors, path)

    loaded = load_dit(path, Placement(CPU))

    assert torch.equal(loaded.blocks[0].ffn[0].weight, tiny_state("t2v")["blocks.0.ffn.0.weight"])
    assert "ema.diff_dec." in find_sign(path)


def test_a_file_is_known_by_its_folder_its_name_or_its_tensors(tmp_path: Path) -> None:
    plain = write_dit(tmp_path / "models", tiny_state("t2v"), name="wan")
    named = write_dit(tmp_path / "models", tiny_state("t2v"), name="wan2.2_bernini_r_low_noise_fp16")
    in_release = write_dit(tmp_path / "release" / "transformer", tiny_state("t2v"), name="model")
    (tmp_path / "release" / "config.json").write_text('{"model_type": "bernini_renderer"}', encoding="utf-8")

    assert find_sign(plain) == ""
    assert "its name says so" in find_sign(named)
    assert "bernini_renderer" in find_sign(in_release)
    assert "--task bernini-1.3B" in (identify(named) or "")
    assert "bernini" not in (identify(plain) or "")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "models")
        assert find_sign(Path("wan.safetensors")) == ""


def test_sources_of_another_model_are_rejected() -> None:
    batch = Batch({"latents_control": torch.zeros(1, 32, 3, 4, 4)}, ("a",), ("clip 0",))

    with pytest.raises(CacheError, match=r"clip 0: latents_control has 32 channels.*--bernini"):
        batch_sources(batch)
