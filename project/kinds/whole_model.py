"""`new --train whole`: train the weights of the model itself instead of a LoRA.

Decides which models support it, which options the run gets, and how often it saves.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from downloads.catalogue import ModelSet
from downloads.listing import gigabytes
from modules.installation import find_script
from modules.speed_options import BASE_FORMS
from project.kinds.contract import RunKind, drop_lora_options
from project.model_sizes import list_transformers, transformer_bytes
from project.options import choose_save_intervals

# options for the storage of frozen weights
FORMS = frozenset(switch for form in BASE_FORMS for switch in form.switches)
# Source: the table in docs/whole_models.md. Hardly any optimizer states, one gradient at a time
RECIPE: Mapping[str, Any] = {
    "optimizer_type": "adafactor",
    "optimizer_args": ["relative_step=False", "scale_parameter=False", "warmup_init=False"],
    "learning_rate": 1e-5,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 10,
    "max_grad_norm": 0,
    "fused_backward_pass": True,
}
GIB_BESIDES_WEIGHTS = 3  # GiB for the activations of one 1024 x 1024 image with checkpointing
SAVES = 4  # number of saves over the run, because each is a whole model
NUM_KEPT_SAVES = 2  # number of saves and states kept in addition to the result


def full_training_command(model: ModelSet) -> list[str]:
    """Return the script for full training of a model, and the options it needs in addition to RECIPE."""
    train = shlex.split(model.commands["train"])
    lora_script = next(word for word in train if word.endswith(".py"))
    default = lora_script.replace("_network.py", ".py")
    return shlex.split(model.properties.get("whole", default))


def why_not_full(model: ModelSet, memory: float) -> str | None:
    """Return why full training of a model is impossible in `memory` GiB of GPU memory; None if possible.

    If `memory` is 0, the run is on the CPU.
    """
    name = model.title
    if not model.properties["fp8"]:  # no option casts it to 8 bits: its files have 8 bits
        return f"the file of {name} has weights in 8 bits, in which steps would be lost"
    argv = full_training_command(model)
    if not argv or find_script(argv[0]) is None:
        return f"{name} has no script that trains it whole"
    if len(list_transformers(model)) > 1:
        return f"{name} has two transformers, which are trained one at a time: see docs/wan22.md"
    size = transformer_bytes(model) / 2**30
    # without block swapping, all weights have to be on the GPU
    if memory and not model.properties.get("swaps", True) and size + GIB_BESIDES_WEIGHTS > memory:
        return (
            f"{name} takes {size:.1f} GiB of weights and about {GIB_BESIDES_WEIGHTS} more, "
            f"but the card has {memory:g} GiB"
        )
    return None


def change_to_full(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    """Convert the options of a LoRA training run to options for full fine-tuning.

    `memory` is the GPU's memory in GiB; 0 means a CPU, on which the weights stay in float32.
    """
    changed = drop_lora_options(values, memory)
    changed = {name: value for name, value in changed.items() if name not in FORMS and name != "dit_dtype"}
    recipe = dict(RECIPE)
    if memory:
        recipe["full_bf16"] = True
    return changed | recipe


def saves_models(values: Mapping[str, Any]) -> bool:
    """Return whether a run with these options saves full models, not small files such as LoRAs."""
    return "fused_backward_pass" in values and "network_module" not in values


def derive_intervals(steps: int, saves_models: bool) -> dict[str, int]:
    """Return how often to save weights and states and draw samples in a run of this many steps.

    `saves_models` says whether the run saves full models, which are large.
    """
    times = choose_save_intervals(steps)
    if saves_models:
        every = max(steps // SAVES, 1)
        kept = (NUM_KEPT_SAVES - 1) * every
        times |= {"save_every_n_steps": every, "save_last_n_steps": kept, "save_last_n_steps_state": kept}
    return times


def describe_full(model: ModelSet, memory: float) -> list[str]:
    """Return lines about the memory and the disk space that full training needs.

    `memory` is the GPU memory in GiB; 0 means a CPU.
    """
    weights = transformer_bytes(model)
    written = sum(part.size_bytes or 0 for part in list_transformers(model))
    if not memory:
        # float32 takes twice the bytes of the 16-bit files
        weights_text = f"{2 * weights / 2**30:.1f} GiB in float32"
    elif weights / 2**30 + GIB_BESIDES_WEIGHTS <= memory:
        weights_text = f"{weights / 2**30:.1f} GiB in bf16, which fits a card of {memory:g} GiB"
    else:
        # some GPU memory is left for activations and everything else
        gib_in_ram = weights / 2**30 - max(memory - GIB_BESIDES_WEIGHTS, 0)
        weights_text = f"{weights / 2**30:.1f} GiB in bf16, of which about {gib_in_ram:.0f} GiB stay in RAM"
    # the last saves and the result; the state of each of these saves contains the weights, too
    maximum = gigabytes((NUM_KEPT_SAVES + 1) * written + NUM_KEPT_SAVES * weights)
    return [
        f"The whole model is trained. Its weights: {weights_text}",
        f"Each saved file has {gigabytes(written)}; with the states output takes about {maximum}",
    ]


FULL = RunKind(
    name="whole",
    title="the whole model",
    find_training_command=full_training_command,
    why_unsupported=why_not_full,
    adapt_options=change_to_full,
    describe=describe_full,
    needs_bfloat16=True,
    saves_large_files=True,
)
