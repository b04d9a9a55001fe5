"""Learn from prompts alone, without images (LECO): --prompts_file.

The network is trained on latents that the model itself denoises from noise: its prediction for a prompt moves
toward that for another prompt, or away from it. The file is read in `leco_file.py`, the passes are in
`leco_passes.py`.
Source of the target: LECO, after Gandikota et al. 2023, arXiv 2303.07345.
"""

import atexit
import functools
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modules.errors import OptionError
from training.features.contract import NO_DATASET, Feature, given_values
from training.features.hooks import HookedModel, PlannedRun, RunFeatures
from training.features.leco_file import LecoPair, read_pairs
from training.features.leco_options import LecoOptions
from training.features.phases import LOSS
from training.features.step_targets import PassCounts, StepTarget

if TYPE_CHECKING:
    from dataset.table import DatasetConfig
    from protocols.family import Family

logger = logging.getLogger(__name__)

MAX_PAIRS_IN_METADATA = 16  # number of pairs in the metadata of saved files
PLACEHOLDER_SIDE = 64  # side in pixels of the placeholder image of the dataset


@dataclass
class LecoProgress:
    """What saved states contain about LECO: a hash of the prompt pairs."""

    leco_pairs: str = ""  # a hash of the pairs; "" before the first step


def _check_family(path: Path, pairs: Sequence[LecoPair], family: "Family") -> "Family":
    """Raise OptionError if the family does not support LECO, or the image sizes of the prompt pairs."""
    # As a hook of `on.family`, it returns the family to train, unchanged.
    from protocols.family_networks import get_custom_network  # torch: only with this feature

    custom_network = get_custom_network(family)
    if custom_network is not None:
        raise OptionError(
            f"--prompts_file {path} is for LoRAs, and this script trains {custom_network.label}. Omit it"
        )
    if not family.noise.keeps_variance:
        raise OptionError(
            f"--prompts_file {path} is for Stable Diffusion, and this script trains {family.name}. Pass "
            "--slider, which learns such a direction from prompts and images"
        )
    step = family.latent.pixel_step
    for pair in pairs:
        if pair.height % step or pair.width % step:
            raise OptionError(
                f"--prompts_file {path}: resolution {pair.height} x {pair.width}: sides of {family.name} are "
                f"multiples of {step}. Use such a size"
            )
    return family


@functools.cache
def make_blank_dataset() -> "DatasetConfig":
    """Return a placeholder dataset: a gray image, which is encoded once and not used for training."""
    import numpy as np  # these imports are slow, and only this feature needs them

    from dataset.config import load_dataset_config
    from modules.media.writing import write_png

    folder = Path(tempfile.mkdtemp(prefix="leco-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_png(folder / "blank.png", np.full((PLACEHOLDER_SIDE, PLACEHOLDER_SIDE, 3), 128, np.uint8))
    (folder / "blank.txt").write_text("", encoding="utf-8")
    table = {
        "image_directory": str(folder),
        "resolution": [PLACEHOLDER_SIDE, PLACEHOLDER_SIDE],
        "caption_extension": ".txt",
    }
    path = folder / "dataset.json"
    path.write_text(json.dumps({"datasets": [table]}), encoding="utf-8")
    return load_dataset_config(path)


def _prepare_passes(
    run: RunFeatures, options: LecoOptions, pairs: Sequence[LecoPair], plan: PlannedRun
) -> None:
    """Encode the prompts before the transformer is loaded; add the training passes once it is loaded."""
    progress = plan.progress.feature_state(LecoProgress)
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()
    if progress.leco_pairs not in {"", digest}:
        logger.warning(
            "%s has other prompts than when the state was saved; the new ones are trained", options.path
        )
    progress.leco_pairs = digest
    from training.features.leco_passes import encode_pairs, leco_passes  # torch: only with this feature

    target = encode_pairs(plan.family, options, pairs, plan.accelerator.device)

    def add_passes(model: HookedModel) -> None:
        run.around(LOSS, partial(leco_passes, target, model.trainable.at_strength))

    run.on.after_load.append(add_passes)


def _equalize_weights(run: RunFeatures) -> None:
    from training.features.leco_passes import weigh_equally  # torch: only with this feature

    run.on.batch.append(weigh_equally)


def _join_leco(run: RunFeatures, options: LecoOptions) -> None:
    """Register --prompts_file: a run trains on pairs of prompts (LECO) instead of a dataset."""
    path = options.path
    trains_text_encoders_only = run.options.lora_parts is not None and not run.options.lora_parts.trains_dit
    if trains_text_encoders_only:
        raise OptionError(
            f"--network_train_text_encoder_only: --prompts_file {path} trains the U-Net alone. Omit it"
        )
    pairs = read_pairs(path)
    if run.options.loop.dataset_config is not None:
        logger.warning("--dataset_config is ignored because --prompts_file %s needs no images", path)
    run.targets.append(
        StepTarget(
            option=f"--prompts_file {path}",
            description=f"prompts of {path}: {len(pairs)} pairs",
            # on average half of the denoising steps with two passes each, and three for the target
            passes=PassCounts(with_gradients=0, without_gradients=options.max_denoising_steps + 3),
            reason_to_exclude_others="LECO learns from its prompts alone",
        )
    )
    run.keeps_few_step_ability = True  # as a slider, it does not undo a distillation for few steps
    run.progress_records.append(LecoProgress)
    preview = json.dumps([asdict(pair) for pair in pairs[:MAX_PAIRS_IN_METADATA]], ensure_ascii=False)
    run.info.in_files |= given_values(options) | {
        "leco_prompt_count": len(pairs),
        "leco_prompts_file": path.name,
        "leco_preview": preview,
    }
    run.needs.add(NO_DATASET)
    run.make_data = make_blank_dataset
    run.on.family.append(partial(_check_family, path, pairs))
    run.on.start.append(_equalize_weights)
    run.on.plan.append(partial(_prepare_passes, run, options, pairs))


LECO = Feature(
    name="leco",
    options=LecoOptions,
    is_on=lambda options: options.prompts_file is not None,
    join=_join_leco,
)
