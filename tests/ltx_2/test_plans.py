"""Plans of LTX-2: a step and a denoising with sound take what was predicted."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.step_cache import StepCaches
from generation.denoise import SeededNoise, iterate_sections, on_device, predictor
from generation.memory import heaviest_step, predict_denoising
from generation.options import GenerationOptions, generation_parser
from generation.options import read_arguments as read_generation
from ltx2_generate_video import DEFAULTS
from ltx_2.family import Ltx2, family_for_generation, family_for_training
from ltx_2.options import Ltx2GenerationOptions, Ltx2TrainingOptions
from modules.options import read_options
from modules.parser import add_options
from protocols.data import AUDIO_LATENTS, FPS, HAS_AUDIO
from protocols.loading import Placement
from protocols.requests import Prepared, Request
from protocols.rules import MagCache
from protocols.steps import DitAt, EncodedPrompts
from runtime.planning.dry_run import HOST, WEIGHTS, Ledger, find_peak_phase
from runtime.planning.kernels import PlannedKernels
from runtime.planning.memory_plan import MemoryPart
from tests.ltx_2.release import SIZES, TinyRelease, write_release
from tests.training.planning.test_rehearsal import GIVEN, assert_alike, counted, noisy, predicted
from training.loss import NoisyAudio, NoisyBatch
from training.options import TrainingOptions, read_arguments, training_parser

VIDEO, HEARD = SIZES["2.3"]
pytestmark = pytest.mark.slow  # counting takes long
TEXT = 11  # tokens
MOMENTS = 400  # of sound: more tokens than the picture has


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("model"), num_layers=5)


def texts(count: int) -> dict[str, Tensor]:
    return {
        "video_prompt_embeds": torch.zeros(count, TEXT, VIDEO.text_dim),
        "audio_prompt_embeds": torch.zeros(count, TEXT, HEARD.text_dim),
    }


def batch_of(count: int, has_sound: bool) -> NoisyBatch:
    tensors: dict[str, Tensor | list[Tensor]] = {
        "latents": torch.zeros(count, VIDEO.channels, 3, 8, 8),
        FPS: torch.full((count,), 24000),
        **texts(count),
    }
    found = noisy(tensors)
    if not has_sound:
        return found
    shape = (count, 2, MOMENTS, HEARD.channels // 2)
    times = found.sigmas
    audio = NoisyAudio(torch.zeros(shape), times, 1000 * times, torch.ones(count))
    tensors |= {AUDIO_LATENTS: torch.zeros(shape), HAS_AUDIO: torch.ones(count, dtype=torch.bool)}
    return replace(found, batch=replace(found.batch, tensors=tensors), audio=audio)


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"]], ids=["all kept", "checkpointing"])
def test_a_step_with_sound_takes_what_was_predicted(
    release: TinyRelease, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    parser = training_parser("")
    add_options(parser, Ltx2TrainingOptions)
    network = ["--network_module", "networks.lora_ltx2", "--network_dim", "4", *release.words]
    # AdamW's counts of steps would be many for such small weights, and on the device of the real step alone
    words = [*network, "--ltx2_mode", "av", "--optimizer_type", "SGD"]
    args = read_arguments(parser, [*GIVEN, *words, *more], {})
    family = family_for_training(read_options(Ltx2TrainingOptions, args))
    options = read_options(TrainingOptions, args)
    totals = []
    for has_sound in (False, True):
        batch = batch_of(2, has_sound)
        with monkeypatch.context() as patch:
            real = counted(family, options, batch, patch)

        found = predicted(family, options, batch)

        assert_alike(found, real)
        totals.append(sum(find_peak_phase(found)[1].values()))
    assert totals[1] > 1.5 * totals[0]


def generation(release: TinyRelease, *more: str) -> tuple[Ltx2, GenerationOptions]:
    parser = generation_parser("", DEFAULTS)
    add_options(parser, Ltx2GenerationOptions)
    words = [*release.words, "--gemma_root", str(release.gemma), "--prompt", "x", "--save_path", "out", *more]
    args = read_generation(parser, words)
    family = family_for_generation(read_options(Ltx2GenerationOptions, args))
    return family, read_options(GenerationOptions, args)


def measured(
    family: Ltx2,
    options: GenerationOptions,
    prepared: Prepared,
    encoded: Mapping[int, EncodedPrompts],
) -> int:
    """The most bytes of tensors while two steps are made on the CPU."""
    dit = family.load_dit(Placement(HOST)).requires_grad_(False)
    with PlannedKernels(), Ledger(HOST) as ledger, torch.no_grad():
        for tensor in dit.parameters():
            ledger.track(tensor, WEIGHTS)
        section = on_device(
            next(iterate_sections(family, prepared, encoded, {0: {}}, SeededNoise(0, HOST))), HOST
        )
        step = heaviest_step(prepared, options, family.experts, section.noise)
        guidance = make_guidance(prepared, options.guidance)
        caches: AbstractContextManager[DitAt] = nullcontext(lambda _: dit)
        if prepared.request.step_cache is not None:
            caches = StepCaches(prepared, family.dit).section(lambda _: dit)
        with caches as dit_at:
            for index in range(2):
                at, told = replace(step, index=index), (section.overrides, section.clean_streams)
                guidance(at, predictor(family, dit_at, at, options.splits_guidance, *told), section)
    return max(sum(moment.values()) for moment in ledger.peaks.values())


@pytest.mark.parametrize("cache", [None, MagCache((2.0,), 0.0, 1e-9, 6)], ids=["", "magcache"])
def test_denoising_with_sound_takes_what_was_predicted(release: TinyRelease, cache: MagCache | None) -> None:
    request = Request("x", 0, 256, 256, 25, 4, 3.0, fps=24.0, negative_prompt="y", step_cache=cache)
    encoded, extra = {0: EncodedPrompts(texts(1), texts(1))}, MemoryPart("more", 0)
    found = []
    for mode in ("v", "av"):
        family, options = generation(release, "--ltx2_mode", mode, "--attn_mode", "torch")
        prepared = family.prepare(request)

        predicted = predict_denoising(family, options, prepared, encoded, {0: {}}, extra).phase(0).device

        assert predicted == pytest.approx(measured(family, options, prepared, encoded), rel=0.03)
        found.append(predicted)
    assert found[1] > 1.2 * found[0]
