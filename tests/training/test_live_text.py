"""Texts that are encoded while training, and text encoders that learn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.errors import OptionError
from runtime.planning.dry_run import NETWORK, TEXTS, find_peak_phase, round_up_bytes
from tests.training.toy import same, write_prompts
from tests.training.toy_images import (
    TextFamily,
    TinyText,
    image_toy_options,
    train_image_toy,
    write_images,
    write_subset,
)
from training.caching_inside import find_live_encoders
from training.data.live import LiveTextEncoders
from training.learner import FULL_MODEL
from training.plan import read_config
from training.planning.memory import predict_memory
from training.run import prepare_run

CPU = torch.device("cpu")
UNET_ONLY = "--network_train_unet_only"


def test_texts_without_caches_are_encoded_in_each_step(tmp_path: Path) -> None:
    write_images(tmp_path)
    family = TextFamily()

    tensors = train_image_toy(tmp_path, UNET_ONLY, family=family)

    assert _prefixes(tensors) == {"lora_unet"}
    assert sorted(set(family.made[-1].asked)) == [f"red, big, number {index}" for index in range(4)]
    assert all(encoder.made is None for encoder in family.made)  # freed


def test_text_caches_are_used_if_nothing_changes(tmp_path: Path) -> None:
    write_images(tmp_path, texts=True)
    family = TextFamily()

    train_image_toy(tmp_path, UNET_ONLY, family=family)

    assert not family.made


def _prefixes(tensors: dict[str, Tensor]) -> set[str]:
    return {"_".join(name.split("_")[:2]) for name in tensors}


@pytest.mark.parametrize(
    ("arguments", "prefixes"),
    [
        ((), {"lora_unet", "lora_te1"}),
        (("--network_args", "train_t5xxl=True"), {"lora_unet", "lora_te1", "lora_te3"}),
        (("--network_train_text_encoder_only",), {"lora_te1"}),
    ],
)
def test_text_encoders_learn(arguments: tuple[str, ...], prefixes: set[str], tmp_path: Path) -> None:
    write_images(tmp_path)

    tensors = train_image_toy(tmp_path, *arguments)

    assert _prefixes(tensors) == prefixes
    ups = [tensor for name, tensor in tensors.items() if "lora_up" in name]
    assert all(tensor.abs().sum() > 0 for tensor in ups)


def test_each_text_encoder_has_its_own_rate(tmp_path: Path) -> None:
    write_images(tmp_path)
    both = "--network_args", "train_t5xxl=True"

    tensors = train_image_toy(tmp_path, *both, "--text_encoder_lr", 1e-2, 0, "--unet_lr", 0)

    moved = {name: tensor for name, tensor in tensors.items() if "lora_up" in name and tensor.any()}
    assert _prefixes(moved) == {"lora_te1"}


def test_a_rate_for_an_encoder_that_does_not_learn_is_left_over(tmp_path: Path) -> None:
    write_images(tmp_path)
    one, two = [train_image_toy(tmp_path, "--text_encoder_lr", *rates) for rates in ((1e-3,), (1e-3, 0.5))]

    assert same(one, two)
    with pytest.raises(OptionError, match="--text_encoder_lr has 3 values, but 2 text encoders can learn"):
        train_image_toy(tmp_path, "--text_encoder_lr", 1, 1, 1)


def test_a_network_without_parts_for_text_encoders_is_refused_them(tmp_path: Path) -> None:
    write_images(tmp_path)
    oft = "--network_module", "networks.oft", "--network_dim", 2

    with pytest.raises(OptionError, match="networks.oft"):
        train_image_toy(tmp_path, *oft)
    assert _prefixes(train_image_toy(tmp_path, *oft, UNET_ONLY)) == {"lora_unet"}


@pytest.mark.parametrize("name", ["networks.loha", "networks.lokr"])
def test_text_encoders_learn_with_factors_of_other_kinds(tmp_path: Path, name: str) -> None:
    write_images(tmp_path)

    tensors = train_image_toy(tmp_path, "--network_module", name, "--network_dim", 2)

    assert _prefixes(tensors) == {"lora_unet", "lora_te1", "lora_te3"}
    zeros = {"networks.loha": ("hada_w2_a",), "networks.lokr": ("lokr_w2", "lokr_w2_b")}[name]
    learned = [tensor for path, tensor in tensors.items() if path.endswith(zeros)]
    assert learned
    assert all(tensor.any() for tensor in learned)


def test_what_is_cached_stays_cached_while_another_encoder_learns(tmp_path: Path) -> None:
    write_images(tmp_path, texts=True)
    family = TextFamily()

    tensors = train_image_toy(tmp_path, "--cache_text_encoder_outputs", family=family)

    assert _prefixes(tensors) == {"lora_unet", "lora_te1"}
    # of those that stay, the one that does not learn is not asked; others have made the caches
    asked = [(encoder.name, len(encoder.asked)) for encoder in family.made]
    assert asked == [("clip", 6), ("t5", 0), ("clip", 4), ("t5", 4)]


def test_a_killed_run_with_learning_encoders_goes_on_to_the_bit(tmp_path: Path) -> None:
    write_images(tmp_path)
    full = train_image_toy(tmp_path, "--save_state", "--save_every_n_steps", 3)
    state = tmp_path / "output" / "x-step00000003-state"

    resumed = train_image_toy(tmp_path, "--resume", state, "--output_dir", tmp_path / "again")

    assert same(full, resumed)


VARYING = "shuffle_caption = true"


def test_encoders_whose_outputs_are_all_cached_do_not_learn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the guides' commands; but something has to learn."""
    write_images(tmp_path)
    both = ("--cache_text_encoder_outputs", "--network_module", "networks.lora")

    with caplog.at_level("INFO"):
        options = image_toy_options(tmp_path, *both)
        texts = find_live_encoders(TextFamily(), options, read_config(options, TextFamily(), FULL_MODEL))

    assert texts is None
    assert "Text encoders are not trained (clip and t5)" in caplog.text
    options = image_toy_options(tmp_path, *both, "--network_train_text_encoder_only")
    with pytest.raises(OptionError, match="outputs of clip and t5 change"):
        find_live_encoders(TextFamily(), options, read_config(options, TextFamily(), FULL_MODEL))


def test_an_encoder_that_is_told_to_learn_is_not_cached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path)
    both = ("--network_args", "train_t5xxl=True", "--text_encoder_lr", 1e-3, 1e-2)

    plain, asked = [
        train_image_toy(tmp_path, *both, *more) for more in ((), ("--cache_text_encoder_outputs",))
    ]

    assert _prefixes(asked) == {"lora_unet", "lora_te1", "lora_te3"}
    assert same(plain, asked)
    assert "is ignored because it would keep the outputs of clip and t5, which are trained" in caplog.text


def test_rates_of_encoders_that_do_not_learn_stop_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path)
    rates = ("--text_encoder_lr", 1e-3, 1e-2)

    plain, given = [train_image_toy(tmp_path, UNET_ONLY, *more) for more in ((), rates)]

    assert same(plain, given)
    assert "--text_encoder_lr has no effect" in caplog.text


def test_captions_that_vary_exclude_their_caches(tmp_path: Path) -> None:
    write_subset(tmp_path, VARYING)

    with pytest.raises(OptionError, match="captions of .* vary"):
        train_image_toy(tmp_path, "--cache_text_encoder_outputs", UNET_ONLY)


def test_captions_that_vary_are_encoded_as_they_are_drawn(tmp_path: Path) -> None:
    """The same ones in two runs of a seed, whatever text caches there are."""
    write_subset(tmp_path, VARYING)
    families = TextFamily(), TextFamily()

    for family in families:
        train_image_toy(tmp_path, UNET_ONLY, family=family)

    asked, again = (family.made[-1].asked for family in families)
    assert asked == again
    assert len(asked) == 6
    assert all(sorted(text.split(", "))[0] == "big" for text in asked)
    assert {text.split(", ")[0] for text in asked} > {"red"}


def test_samples_show_the_text_encoder_that_learns(tmp_path: Path) -> None:
    """Their texts are encoded anew each time; the other encoder's once."""
    write_images(tmp_path)
    prompts = write_prompts(tmp_path, "a sample --w 32 --h 32 --f 1 --s 2\n")
    family = TextFamily()

    train_image_toy(tmp_path, "--sample_prompts", prompts, "--sample_every_n_steps", 3, family=family)

    first, second = family.made[:2]
    assert first.asked.count("a sample") > second.asked.count("a sample") == 0
    assert len(list((tmp_path / "output" / "sample").glob("x_00000[36]_00_*.png"))) == 2


def test_validation_encodes_its_captions(tmp_path: Path) -> None:
    write_images(tmp_path)
    family = TextFamily()

    train_image_toy(tmp_path, UNET_ONLY, "--validation_split", 0.25, family=family)

    assert len(set(family.made[-1].asked)) == 4


def test_the_memory_plan_counts_the_text_encoders(tmp_path: Path) -> None:
    """And what is trained in them."""
    write_images(tmp_path)
    family, options = TextFamily(), image_toy_options(tmp_path)
    with prepare_run(family, options) as run:
        batch = run.feed.read((0, 0))
        assert run.plan.live_encoders is not None
        known = replace(batch, batch=run.plan.live_encoders.add_encoded_captions(batch.batch))
    encoders = family.text_encoders()

    cached = find_peak_phase(predict_memory(family, options, known.moved(torch.detach), CPU).phase_peaks)[1]
    frozen = find_peak_phase(
        predict_memory(family, options, batch, CPU, live_encoders=LiveTextEncoders(encoders)).phase_peaks
    )[1]
    texts = LiveTextEncoders(encoders, family.made[-2:-1])
    learning = find_peak_phase(predict_memory(family, options, batch, CPU, live_encoders=texts).phase_peaks)[
        1
    ]

    assert TEXTS not in cached
    weights = sum(round_up_bytes(tensor.nbytes) for tensor in TinyText(1).state_dict().values())
    assert frozen[TEXTS] == learning[TEXTS] == 2 * weights
    assert cached[NETWORK] == frozen[NETWORK] < learning[NETWORK]
    assert [encoder.made for encoder in family.made[-2:]] == [None, None]
