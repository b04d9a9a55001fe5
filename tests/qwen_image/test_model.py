"""The Qwen-Image transformer against diffusers' in float32."""

from pathlib import Path

import pytest
import torch

from checkpoints.stored.forms import get_quantized_weight
from modules.speed_options import Quantization
from protocols.loading import Placement
from qwen_image.family import QwenImage
from qwen_image.files import QwenImageFiles
from tests.parity.running import assert_equal
from tests.qwen_image.making import in_diffusers, pack, predict_with, tiny_inputs, tiny_model
from tests.tiny.qwen_image import CONFIG, tiny_state, write_dit


@torch.no_grad()
def test_velocities_equal_those_of_diffusers() -> None:
    """Odd numbers of rows and columns, two times, and a text with padding."""
    given = tiny_inputs()

    ours = tiny_model()(**given)

    assert_equal(pack(ours), predict_with(in_diffusers(tiny_state()), given), "velocity")


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("sizes", [[(6, 10)], [(6, 8), (2, 30)]], ids=str)
@torch.no_grad()
def test_references_of_any_size_are_seen_as_in_diffusers(sizes: list[tuple[int, int]], clean: bool) -> None:
    """A long one moves the places of the text. clean: modulated with time 0, as in Edit-2511."""
    given, generator = tiny_inputs(), torch.Generator().manual_seed(3)
    references = [torch.randn(2, CONFIG.channels, 1, *size, generator=generator) for size in sizes]
    model = tiny_model()

    ours = model(**given, references=references, clean_references=clean)

    assert_equal(pack(ours), predict_with(in_diffusers(tiny_state(), clean), given, references), "velocity")
    other = model(**given, references=references, clean_references=not clean)
    assert (ours - other).abs().max() > 0.01 * ours.abs().max()
    assert torch.equal(model(**given, clean_references=True), model(**given))


def test_sizes_that_do_not_fit_are_refused() -> None:
    given = tiny_inputs()
    with pytest.raises(ValueError, match="cannot be cut into patches"):
        tiny_model()(**{**given, "noisy": given["noisy"][..., :-1]})


@pytest.mark.parametrize(
    ("form", "expected"), [("fp8", []), ("int8", []), ("nf4", ["0.txt", "1.img", "1.txt"])]
)
def test_modulation_is_stored_in_4_bits_but_not_in_8(form: str, expected: list[str], tmp_path: Path) -> None:
    files = QwenImageFiles(write_dit(tmp_path, tiny_state(num_layers=2)))
    dit = QwenImage(files).load_dit(
        Placement(torch.device("cpu"), quantization=Quantization("rows", form=form))
    )

    stored = [name for name, part in dit.named_modules() if get_quantized_weight(part) is not None]

    assert stored
    ours = [name.split(".", 1)[1].partition("_mod")[0] for name in stored if "_mod." in name]
    assert sorted(ours) == expected
