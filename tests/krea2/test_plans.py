"""Plans of generations that edit, compared with what really runs."""

from pathlib import Path

import pytest
import torch

from blissful_tuner.guidance import make_guidance
from generation.denoise import SeededNoise, on_device, predictor
from generation.memory import predict_denoising
from krea2.family import family_for_generation
from krea2.options import Krea2GenerationOptions
from krea2_generate_image import DEFAULTS
from protocols.loading import Placement
from protocols.requests import Request
from protocols.steps import EncodedPrompts, Step
from runtime.planning.dry_run import HOST, WEIGHTS, Ledger
from runtime.planning.kernels import PlannedKernels
from runtime.planning.memory_plan import MemoryPart
from tests.generation.test_memory import options_of
from tests.preparing import prepare
from tests.tiny.krea2 import CONFIG, tiny_state, write_dit

BLOCKS, TOKENS, ROWS, COLUMNS = 9, 640, 4, 6  # of the reference; rows and columns of latents of the picture
KEPT = BLOCKS * TOKENS * 2 * CONFIG.num_kv_heads * CONFIG.head_width * 2  # bytes, in 16 bits


@pytest.mark.slow
def test_a_plan_counts_the_keys_and_values_of_references(tmp_path: Path) -> None:
    """Beside a picture and a text that are small against the reference, also in the second step."""
    path = write_dit(tmp_path, tiny_state(dtype=torch.bfloat16, num_layers=BLOCKS))
    words = ("--dit", path, "--prompt", "x", "--save_path", "out")
    asked = Request("x", 0, 8 * COLUMNS, 8 * ROWS, 1, 4, 1.0, None, 3.0, "euler", 1.0, "")
    text = {"krea2_vl_embed": [torch.zeros(7, CONFIG.states, CONFIG.text_dim, dtype=torch.bfloat16)]}
    encoded = {0: EncodedPrompts(text)}
    inputs = {0: {"latents_control_0": torch.zeros(1, 16, 1, 2 * 20, 2 * TOKENS // 20)}}
    for more in ((), ("--kv_cache",)):
        options, own = options_of(DEFAULTS, Krea2GenerationOptions, *words, *more)
        family, request = family_for_generation(own), prepare(asked)
        predicted = predict_denoising(family, options, request, encoded, inputs, MemoryPart("more", 0))

        dit = family.load_dit(Placement(HOST)).requires_grad_(False)
        section = on_device(next(family.sections(request, encoded, inputs, SeededNoise(0, HOST))), HOST)
        with PlannedKernels(), Ledger(HOST) as ledger, torch.no_grad():
            for tensor in (*dit.parameters(), section.noise, section.positive["latents_control_0"]):
                ledger.track(tensor, WEIGHTS if isinstance(tensor, torch.nn.Parameter) else None)
            for number in range(2):
                step = Step(number, 4, 1.0, 1000.0 - number, section.noise)
                predict = predictor(
                    family, lambda _, dit=dit: dit, step, options.splits_guidance, section.overrides
                )
                make_guidance(request, options.guidance, family.experts)(step, predict, section)
            real = max(sum(moment.values()) for moment in ledger.peaks.values())
        assert predicted.phase(0).device == pytest.approx(real, rel=0.02)
        kept = (section.overrides.section_cache or {}).values()
        assert sum(one.nbytes for pair in kept for one in pair) == (KEPT if more else 0)
