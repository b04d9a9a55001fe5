"""Names that people give models: of any spelling, of further trained models, and of those not supported."""

from pathlib import Path

import pytest

from downloads.catalogue import model_sets
from downloads.naming import DownloadOptions, read_family
from modules.errors import OptionError
from modules.script_options import parse_options
from project.model_sizes import find_smaller, weight_options
from project.options import find_models
from tests.faults.messages import assert_one_message, run_here


@pytest.mark.parametrize(
    ("name", "family", "task"),
    [
        ("sdxl", "stable_diffusion", "xl"),
        ("SD1.5", "stable_diffusion", "1.5"),
        ("stable-diffusion-xl", "stable_diffusion", "xl"),
        ("flux.1-dev", "flux", "dev"),
        ("wan2.2", "wan22", None),
        ("h3", "minimax_h3", None),
        ("kontext", "flux_kontext", None),
        ("z-image-turbo", "z_image", "turbo"),
        ("circlestone-labs/Anima", "anima", "base"),
    ],
)
def test_a_model_is_found_in_any_spelling(name: str, family: str, task: str | None) -> None:
    for models in (find_models(), list(model_sets())):
        assert read_family(name, models) == (family, task, False)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        *((name, "xl") for name in ("pony", "Illustrious", "noobai", "animagine", "Pony-Diffusion-V6-XL")),
        ("dreamshaper-8", "1.5"),
        ("DreamShaperXL", "xl"),
    ],
)
def test_a_further_trained_model_names_its_release(name: str, base: str) -> None:
    assert read_family(name, find_models()) == ("stable_diffusion", base, True)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        *(("sd3", "Stable Diffusion 3"), ("sd3.5-large", "Stable Diffusion 3")),
        *(("svd", "Stable Video Diffusion"), ("cogvideox", "CogVideoX"), ("animatediff", "AnimateDiff")),
        *(("chroma-radiance", "Chroma1-Radiance"), ("HunyuanImage-3.0", "HunyuanImage-3.0")),
    ],
)
def test_a_model_that_is_not_supported_is_named_and_no_other_is_taken(name: str, title: str) -> None:
    with pytest.raises(
        OptionError, match=f"^--family {name}: {title} is not supported. For images choose from"
    ):
        read_family(name, find_models())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        *(("wan-t2v", "Did you mean wan?"), ("lumina2", "mean lumina?")),
        *(("sdx", "Did you mean sdxl?"), ("stable_difusion", "Did you mean stable_diffusion?")),
    ],
)
def test_a_longer_name_gets_the_family_that_it_begins_with(name: str, hint: str) -> None:
    with pytest.raises(OptionError) as error:
        read_family(name, find_models())
    assert str(error.value).endswith(hint)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("tools/download.py --family pony", "Pass `new` --family sdxl --model_file ckpt=FILE"),
        ("tools/download.py --family svd", "Stable Video Diffusion is not supported"),
        ("tools/download.py --family sdxl --task 1.5", "--family sdxl names xl, --task is 1.5"),
        ("new_project.py . --family illustrious", "Pass `new` --family sdxl --model_file ckpt=FILE"),
        ("new_project.py . --family pony --model_file ckpt=missing.safetensors", "there is no such file"),
        ("new_project.py . --family cogvideox", "CogVideoX is not supported"),
    ],
)
def test_commands_say_what_to_type_for_a_name(words: str, told: str, tmp_path: Path) -> None:
    assert_one_message(*run_here(*words.split(), folder=tmp_path), told)


@pytest.mark.parametrize("words", ["--family sdxl", "sdxl", "--family stable_diffusion --task XL"])
def test_downloads_know_the_spellings_of_new(words: str) -> None:
    (options,) = parse_options("", words.split(), DownloadOptions)

    assert [(model.family, model.task) for model in options.sets()] == [("stable_diffusion", "xl")]


# rows of docs/small_cards.md
@pytest.mark.parametrize(
    ("model", "forms"),
    [
        ("wan t2v-14B", "nf4 nf4 nf4 nf4"),
        ("hunyuan_video t2v", "nf4 nf4 nf4 nf4"),
        ("flux dev", "nf4 nf4 nf4 int8"),
        ("flux_3 klein-base", "nf4 int8 int8 int8"),
        ("krea2 raw", "nf4 nf4 nf4 nf4"),
        ("qwen_image_21 base", "nf4 nf4 int8 int8"),
        ("z_image base", "nf4 int8 int8 int8"),
        ("hunyuan_image 2.1", "nf4 nf4 nf4 nf4"),
    ],
)
def test_a_card_gets_the_form_of_weights_that_the_page_has(model: str, forms: str) -> None:
    [named] = [each for each in find_models() if f"{each.family} {each.task}" == model]

    options = [weight_options(named, memory)[0] for memory in (8, 10, 12, 16)]

    assert options == [{"nf4": "--nf4_base", "int8": "--convrot_int8"}[form] for form in forms.split()]


@pytest.mark.parametrize(
    ("model", "smaller"),
    [
        *(
            ("minimax_h3 t2va", ["t2va-small"]),
            ("wan t2v-14B", ["t2v-1.3B"]),
            ("wan22 t2v-A14B", ["ti2v-5B"]),
        ),
        *(("flux dev", []), ("wan flf2v-14B", []), ("minimax_h3 t2va-small", [])),
    ],
)
def test_a_model_beyond_the_card_names_smaller_ones_of_its_inputs(model: str, smaller: list[str]) -> None:
    [named] = [each for each in find_models() if f"{each.family} {each.task}" == model]

    assert [each.task for each in find_smaller(named, find_models(), memory=12)] == smaller
    assert find_smaller(named, find_models(), memory=0) == []
