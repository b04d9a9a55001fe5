"""Plans of generations, from the command lines of all families."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blissful_tuner.step_cache import StepCaches
from generation.denoise import predictor
from generation.memory import rehearse_denoising
from generation.options import GenerationOptions, generation_parser, read_arguments
from generation.script_options import ScriptDefaults
from modules.contract.loading import Placement
from modules.contract.requests import Request
from modules.contract.rules import MagCache, TeaCache
from modules.contract.steps import DitAt, EncodedPrompts, Step
from modules.options import read_options
from modules.parser import add_options
from modules.planning.dry_run import HOST, WEIGHTS, Ledger
from modules.planning.kernels import PlannedKernels
from modules.planning.memory_plan import MemoryPart
from tests.commands import run_script
from tests.preparing import prepare
from tests.tiny import wan_dit
from tests.tiny.families import FAMILIES, TinyFamily
from wan.family import Wan, family_for_generation
from wan.options import WanGenerationOptions

QUICK = {"wan i2v-14B", "hunyuan_video", "framepack", "lumina"}
CASES = [
    pytest.param(each, id=each.name, marks=() if each.name in QUICK else pytest.mark.slow)
    for each in FAMILIES
]


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
    takes_media = any(word.endswith("_path") and "name_or" not in word for word in arguments)
    assert any(name.startswith("images and videos") for name in names) == takes_media
    assert lines[-1].startswith("Fits: 0.")
    assert not (tmp_path / "out").exists()


def tiny_generation(tmp_path: Path) -> tuple[Wan, GenerationOptions]:
    path = wan_dit.write_dit(tmp_path, wan_dit.tiny_state("t2v", dtype=torch.bfloat16, num_layers=6))
    parser = generation_parser("", ScriptDefaults(fps=16, guidance_scale=5.0))
    add_options(parser, WanGenerationOptions)
    args = read_arguments(
        parser, ["--task", "t2v-1.3B", "--dit", str(path), "--prompt", "x", "--save_path", "out"]
    )
    options, family = (
        read_options(GenerationOptions, args),
        family_for_generation(read_options(WanGenerationOptions, args)),
    )
    return family, options


REQUEST = prepare(Request("x", 0, 96, 64, 9, 4, 5.0, None, 3.0, "unipc", 16.0, "y"))
TEXT: dict[str, Tensor | list[Tensor]] = {"t5": [torch.zeros(7, 32, dtype=torch.bfloat16)]}


@pytest.mark.parametrize(
    "cache",
    [None, MagCache((2.0,), 0.0, 1e-9, 6), TeaCache(1e-9, (1.0, 0.0))],
    ids=["", "magcache", "teacache"],
)
def test_denoising_takes_what_was_predicted(tmp_path: Path, cache: MagCache | TeaCache | None) -> None:
    """Of both passes of a step, also later, when each finds what the step before has left."""
    family, options = tiny_generation(tmp_path)
    texts, extra = {0: EncodedPrompts(TEXT, dict(TEXT))}, MemoryPart("more", 0)
    plain, _ = rehearse_denoising(family, options, REQUEST, texts, {0: {}}, extra)
    request = replace(REQUEST, asked=replace(REQUEST.asked, step_cache=cache))
    phase, most = rehearse_denoising(family, options, request, texts, {0: {}}, extra)

    dit = family.load_dit(Placement(HOST)).requires_grad_(False)
    noise, other = torch.zeros(1, 16, 3, 8, 12), dict(TEXT)
    with PlannedKernels(), Ledger(HOST) as ledger, torch.no_grad():
        for tensor in dit.parameters():
            ledger.see(tensor, WEIGHTS)
        caches: AbstractContextManager[DitAt] = nullcontext(lambda _: dit)
        if cache is not None:
            caches = StepCaches(request, family.dit).section(lambda _: dit)
        with caches as dit_at:
            for step in range(3):
                predict = predictor(family, dit_at, Step(step, 4, 1.0, 1000.0 - step, noise + step), True)
                _ = predict(TEXT), predict(other)
        real = max(sum(moment.values()) for moment in ledger.peaks.values())
    assert phase(0).device == pytest.approx(real, rel=0.02)
    assert phase(most).device < phase(0).device
    if cache is None:
        return
    tokens = 3 * 4 * 6 * family.files.dit_header().config.dim
    # the input of the blocks in float32, the other pass's residual in 16 bits; what is compared of both
    kept = tokens * (4 + 2 + (2 * 2 if isinstance(cache, TeaCache) else 0))
    assert phase(0).device - plain(0).device == pytest.approx(kept, rel=0.25)
