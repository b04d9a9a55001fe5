"""Plans of generations from the command lines of all families, compared with what really runs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import qwen_image_generate_image
from blissful_tuner.guidance import make_guidance
from blissful_tuner.step_cache import StepCaches
from fpack_generate_video import DEFAULTS
from frame_pack.family import LATENT
from frame_pack.family import family_for_generation as framepack_for_generation
from frame_pack.options import FramePackGenerationOptions
from frame_pack.requests import FramePackRequest
from generation.denoise import SeededNoise, on_device, predictor
from generation.memory import predict_decoding, predict_denoising, resolve_options
from generation.options import GenerationOptions, read_generation
from generation.script_options import ScriptDefaults
from modules.devices import GIB
from modules.errors import MemoryPlanError
from protocols.data import MediaEncoders
from protocols.loading import Placement
from protocols.requests import Request
from protocols.rules import MagCache, TeaCache
from protocols.steps import DitAt, EncodedPrompts, Step
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.dry_run import ACCELERATOR, HOST, WEIGHTS, Ledger
from runtime.planning.kernels import PlannedKernels
from runtime.planning.memory_plan import MemoryPart
from tests.commands import run_script
from tests.preparing import prepare
from tests.tiny import wan_dit
from tests.tiny.families import FAMILIES, TinyFamily
from tests.tiny.framepack import write_tiny_framepack
from tests.tiny.framepack_dit import CONFIG, tiny_state, write_dit
from tests.tiny.qwen_image import write_tiny_qwen_image
from wan.family import Wan, family_for_generation
from wan.options import WanGenerationOptions

Own = TypeVar("Own")
QUICK = {"wan i2v-14B", "framepack"}
CASES = [
    pytest.param(each, id=each.name, marks=() if each.name in QUICK else pytest.mark.slow)
    for each in FAMILIES
]


@pytest.mark.slow_cases("framepack")
@pytest.mark.parametrize("family", CASES)
def test_a_plan_is_printed_and_nothing_is_made(family: TinyFamily, tmp_path: Path) -> None:
    family.prepare(tmp_path)
    size = ["--video_size", "32", "32", "--guidance_scale", "5"]
    script, *arguments = family.generate
    done = run_script(
        script,
        *arguments,
        *size,
        *("--prompt", "a cat", "--save_path", "out", "--plan", "2", "--device", "cpu"),
        folder=tmp_path,
    )
    lines = done.stdout.splitlines()
    names = [line.split("  ")[0] for line in lines if not line.startswith(" ")]
    assert any(name.startswith("text encoder") for name in names)
    assert any(name.startswith("denoising") for name in names)
    assert any(name.startswith("decoding") for name in names)
    # all options with paths but those of pretrained models and of tokenizers name an image or a video
    of_media = [word for word in arguments if "name_or" not in word and "tokenizer" not in word]
    takes_media = any(word.endswith(("_path", "--src_video")) for word in of_media)
    assert any(name.startswith("images and videos") for name in names) == takes_media
    assert lines[-1].startswith("Fits: 0.")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_plan_keeps_layers_of_a_language_model_on_the_host_if_there_is_no_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_tiny_qwen_image(tmp_path)
    models = ["--dit", files.dit, "--vae", files.vae, "--text_encoder", files.text_encoder]
    size = ["--image_size", "32", "32", "--prompt", "a", "--save_path", "out", "--device", "cpu"]
    found = {}
    for room in ("24", "0.1"):
        qwen_image_generate_image.main([*map(str, models), *size, "--plan", room])
        found[room] = capsys.readouterr().out
    note = "copied layer by layer"
    assert (note in found["24"], note in found["0.1"]) == (False, True)


def options_of(defaults: ScriptDefaults, record: type[Own], *words: object) -> tuple[GenerationOptions, Own]:
    """What a script reads of its command line."""
    return read_generation("", defaults, record, [*map(str, words)])


def tiny_generation(tmp_path: Path) -> tuple[Wan, GenerationOptions]:
    path = wan_dit.write_dit(tmp_path, wan_dit.tiny_state("t2v", dtype=torch.bfloat16, num_layers=6))
    words = ("--task", "t2v-1.3B", "--dit", path, "--prompt", "x", "--save_path", "out")
    options, own = options_of(ScriptDefaults(fps=16, guidance_scale=5.0), WanGenerationOptions, *words)
    return family_for_generation(own), options


REQUEST = prepare(Request("x", 0, 96, 64, 9, 4, 5.0, None, 3.0, "unipc", 16.0, "y"))
TEXT: dict[str, Tensor | list[Tensor]] = {"t5": [torch.zeros(7, 32, dtype=torch.bfloat16)]}


@pytest.mark.slow_cases("", "magcache", "teacache")
@pytest.mark.parametrize(
    "cache",
    [None, MagCache((2.0,), 0.0, 1e-9, 6), TeaCache(1e-9, (1.0, 0.0))],
    ids=["", "magcache", "teacache"],
)
def test_denoising_takes_what_was_predicted(tmp_path: Path, cache: MagCache | TeaCache | None) -> None:
    """Of both passes of a step, also later, when each finds what the step before has left."""
    family, options = tiny_generation(tmp_path)
    texts, extra = {0: EncodedPrompts(TEXT, dict(TEXT))}, MemoryPart("more", 0)
    plain = predict_denoising(family, options, REQUEST, texts, {0: {}}, extra)
    request = replace(REQUEST, request=replace(REQUEST.request, step_cache=cache))
    predicted = predict_denoising(family, options, request, texts, {0: {}}, extra)

    dit = family.load_dit(Placement(HOST)).requires_grad_(False)
    noise, other = torch.zeros(1, 16, 3, 8, 12), dict(TEXT)
    with PlannedKernels(), Ledger(HOST) as ledger, torch.no_grad():
        for tensor in dit.parameters():
            ledger.track(tensor, WEIGHTS)
        caches: AbstractContextManager[DitAt] = nullcontext(lambda _: dit)
        if cache is not None:
            caches = StepCaches(request, family.dit).section(lambda _: dit)
        with caches as dit_at:
            for step in range(3):
                predict = predictor(family, dit_at, Step(step, 4, 1.0, 1000.0 - step, noise + step), True)
                _ = predict(TEXT), predict(other)
        real = max(sum(moment.values()) for moment in ledger.peaks.values())
    assert predicted.phase(0).device == pytest.approx(real, rel=0.02)
    assert predicted.phase(predicted.max_swapped_blocks).device < predicted.phase(0).device
    if cache is None:
        return
    tokens = 3 * 4 * 6 * family.files.dit_header().config.dim
    # the input of the blocks in float32, the other pass's residual in 16 bits; what is compared of both
    kept = tokens * (4 + 2 + (2 * 2 if isinstance(cache, TeaCache) else 0))
    assert predicted.phase(0).device - plain.phase(0).device == pytest.approx(kept, rel=0.25)


ROWS, COLUMNS, SECTIONS = 8, 12, 2


def text(tokens: int) -> dict[str, Any]:
    return {
        "llama_vec": torch.zeros(32, CONFIG.text_dim, dtype=torch.float16),
        "llama_attention_mask": torch.arange(32) < tokens,
        "clip_l_pooler": torch.zeros(CONFIG.pooled_dim, dtype=torch.float16),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [("--f1",), ("--rope_scaling_timestep_threshold", "900", "--guidance_rescale", "0.5")],
    ids=["f1", "scaled"],
)
def test_a_section_takes_what_was_predicted(tmp_path: Path, more: tuple[str, ...]) -> None:
    path = write_dit(tmp_path, tiny_state(dtype=torch.bfloat16, double_blocks=5, single_blocks=6))
    words = ("--dit", path, "--prompt", "x", "--save_path", tmp_path / "out", *more)
    options, own = options_of(DEFAULTS, FramePackGenerationOptions, *words)
    family = framepack_for_generation(own)
    asked = Request(
        "x", 0, 8 * COLUMNS, 8 * ROWS, 4 * 9 * SECTIONS + 1, 4, 5.0, 10.0, 3.0, "unipc-bh1", 30.0, "y"
    )
    request = replace(prepare(asked), family_settings=FramePackRequest((Path("start.png"),) * SECTIONS))
    encoded = {index: EncodedPrompts(text(20), text(11)) for index in range(SECTIONS)}
    image = {
        "image_embeddings": torch.zeros(1, 7, CONFIG.image_dim),
        "start_latents": torch.zeros(1, 16, 1, ROWS, COLUMNS),
    }
    inputs = dict.fromkeys(range(SECTIONS), image)

    predicted = predict_denoising(family, options, request, encoded, inputs, MemoryPart("more", 0))

    dit = family.load_dit(Placement(HOST)).requires_grad_(False)
    section = on_device(next(family.sections(request, encoded, inputs, SeededNoise(0, HOST))), HOST)
    given = [section.noise, *(tensor for tensor in section.positive.values() if torch.is_tensor(tensor))]
    given += [tensor for tensor in (section.negative or {}).values() if torch.is_tensor(tensor)]
    with PlannedKernels(), Ledger(HOST) as ledger, torch.no_grad():
        for tensor in dit.parameters():
            ledger.track(tensor, WEIGHTS)
        for tensor in given:
            ledger.track(tensor)
        step = Step(0, 4, 1.0, 1000.0, section.noise)
        predict = predictor(family, lambda _: dit, step, options.split_uncond)
        make_guidance(request, options.guidance)(step, predict, section)
        real = max(sum(moment.values()) for moment in ledger.peaks.values())
    assert predicted.phase(0).device == pytest.approx(real, rel=0.02)
    assert predicted.max_swapped_blocks == 4  # both lists keep a block: 2 and 5 are swapped
    assert predicted.phase(predicted.max_swapped_blocks).device < predicted.phase(0).device


def test_a_conversation_may_begin_before_it_is_said_what_is_made(tmp_path: Path) -> None:
    """Images come with the lines; auto has to know before."""
    files, room = write_tiny_framepack(tmp_path / "models"), DeviceMemory("some GPU", 8 * GIB, 8 * GIB)
    words = (*files.models, "--latent_window_size", 2, "--save_path", tmp_path / "out", "--interactive")
    options, own = options_of(DEFAULTS, FramePackGenerationOptions, *words)
    family = framepack_for_generation(own)
    assert resolve_options(family, options, HOST, room) == (options, None)

    options, _ = options_of(DEFAULTS, FramePackGenerationOptions, *words, "--blocks_to_swap", "auto")
    with pytest.raises(
        MemoryPlanError, match="complete request on the command line: --image_path is missing"
    ):
        resolve_options(family, options, HOST, room)


class Decoding:
    """As much of a family as decoding needs; it yields chunks of so many frames."""

    latent = LATENT

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes, self.made = sizes, 0

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        return MediaEncoders(None)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        for size in self.sizes:
            self.made += 1
            yield torch.empty(1, 3, size, 8, 8, device=ACCELERATOR)


@pytest.mark.parametrize(("sizes", "made"), [((1, 4, 4, 4, 4, 4), 4), ((40, 36, 36, 33), 1), ((1, 4), 2)])
def test_of_a_video_no_more_is_decoded_than_shows_what_decoding_holds(
    sizes: tuple[int, ...], made: int
) -> None:
    """FramePack's pieces are two sections each; a long video has many."""
    family: Any = Decoding(sizes)
    predict_decoding(family, Request("x", 0, 64, 64, 145), MemoryPart("more", 0))
    assert family.made == made
