"""Values of the options that make pictures begin small, and what does not go together."""

import pytest

from modules.errors import OptionError
from stable_diffusion.options import GenImgOptions, read_gen_img
from stable_diffusion.sampling_options import read_unsharp


def read(*words: object) -> GenImgOptions:
    return read_gen_img(None, ["--ckpt", "sd.safetensors", "--prompt", "a cat", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--highres_fix_scale", 2], "0.5 where other programs say 2"),
        (["--highres_fix_scale", 0.5, "--image_path", "."], "--highres_fix_scale .*--image_path"),
        (["--gradual_latent_timesteps", 750], "--sampler euler_a only"),
        (["--gradual_latent_unsharp_params", "4,1,1"], "--gradual_latent_unsharp_params 4,1,1: give an odd"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: list[object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(*words)


def test_both_spellings_of_the_interval_are_read() -> None:
    for name in ("gradual_latent_every_n_steps", "gradual_latent_ratio_every_n_steps"):
        assert read(f"--{name}", 5).gradual_latent.gradual_latent_every_n_steps == 5


def test_unsharp_masks_are_read() -> None:
    assert read_unsharp("--o", "3,0.5,0.7,0") == (3, 0.5, 0.7, False)
    assert read_unsharp("--o", "5, 1, 0.7") == (5, 1.0, 0.7, True)
    for wrong in (
        "",
        "3",
        "3,0.5",
        "3,0.5,0.5,2",
        "3,0.5,0.5,1,1",
        "2,1,1,1",
        "3,0,1,1",
        "3,nan,1,1",
        "3,1,inf,1",
    ):
        with pytest.raises(OptionError, match="--o"):
            read_unsharp("--o", wrong)
