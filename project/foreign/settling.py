"""What becomes of another trainer's values for a model, a kind of run and the script that trains it."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dataset.config import KEYS
from dataset.config_keys import Unfit
from dataset.subset_options import SUBSET_KEYS
from downloads.catalogue import ModelSet
from modules.errors import OptionError
from modules.installation import DISTRIBUTIONS
from modules.mistyped import ours_for
from modules.options import facts_of
from modules.text_files import real_path
from project.foreign import contract
from project.foreign.contract import OPTIMIZER_ARGUMENTS, is_off, is_on
from project.foreign.reading import EpochsSaid, ForeignProject, find_beside, is_empty, show
from project.kinds.composing import LORA
from project.kinds.contract import RunKind
from project.new_options import NewOptions
from project.script_facts import AskedOption, ScriptOptions

_OF_LORA = ("network_module", "network_dim", "network_alpha", "network_dropout", "network_args")
_OF_EMBEDDING = ("init_word", "num_vectors_per_token")
_RATES = ("learning_rate", "unet_lr", "text_encoder_lr")
# keys of dataset.toml by which captions, or pictures, are others each time
VARYING_TEXTS = frozenset(
    {"shuffle_caption", "caption_tag_dropout_rate", "caption_dropout_every_n_epochs", "token_warmup_step"}
    | {"enable_wildcard"}
)
VARYING_PICTURES = frozenset({"color_aug", "random_crop", "face_crop_aug_range"})
_OF_RUN = frozenset({"discrete_flow_shift", "min_timestep", "max_timestep"})  # which tables can have, too
_OF_SHUFFLING = ("keep_tokens", "keep_tokens_separator", "caption_separator", "secondary_separator")
_SCHEDULES_WITHOUT_WARMUP = {"constant": "constant_with_warmup"}
_PACKAGES = {"lion": "lion_pytorch", "prodigy": "prodigyopt"}  # optimizer -> the module that has it


class Length(NamedTuple):
    """How long a run is."""

    steps: int
    in_epoch: int  # steps of an epoch


def fill_in(project: ForeignProject, options: NewOptions) -> NewOptions:
    """Return options with the values of the project where nothing else is typed."""
    usual = NewOptions(folder=options.folder)
    named = dict(project.new)
    if project.run.kind not in {LORA.name, ""} and options.trains is None:
        named["train"] = project.run.kind
    if options.family not in {None, project.new.get("family")}:
        task = named.pop("task", None)
        if task is not None and options.task is None:  # it is one of the project's family
            project.left.append(f"task = {task}: --family says otherwise")
    named.pop("max_train_steps", None)  # `choose_length` compares it with the epochs
    values = {}
    for name, value in named.items():
        if getattr(options, name) == getattr(usual, name):
            values[name] = value
        elif getattr(options, name) != value:
            project.left.append(f"{name} = {value}: --{name} says otherwise")
    return dataclasses.replace(options, **values)


def settle(
    project: ForeignProject,
    model: ModelSet,
    kind: RunKind,
    script: ScriptOptions,
    memory: float,
    forms: "Forms",
) -> None:
    """Leave in `training` and `data` what the run takes, and note the reason of what is left.

    memory: GiB of the card; 0: a CPU. forms: which keys dataset.toml can have.
    """
    _settle_rates(project, kind)
    _settle_parts(project, model, kind, script)
    _take_by_name(project, script, _list_chosen(model))
    _settle_optimizer(project, memory)
    _settle_network(project, kind)
    if kind.saves_models:
        _leave_recipe(project, script)
    project.keeps_few = kind.saves_models
    if "min_snr_gamma" in script.known and "min_snr_gamma" not in project.training:
        project.training["min_snr_gamma"] = (
            None  # `new` gives it to models of noise, and no other trainer does
        )
        project.changed.append(f"min_snr_gamma is left out, which {project.title} has only if it is said")
    for name in list(project.training):
        if name not in script.known:
            reason = script.refused.get(name, f"{script.name} has no such option")
            drop(project, name, reason)
    _settle_data(project, forms)


def _list_chosen(model: ModelSet) -> set[str]:
    """Return the options that `new` writes for a model."""
    words = f"{model.commands['train']} {model.data.get('train', '')}".split()
    return {word.removeprefix("--") for word in words if word.startswith("--")}


class Forms(NamedTuple):
    """Which keys the tables of dataset.toml can have."""

    step: int  # of which sides are multiples

    takes_subsets: bool  # the form of the image guides
    has_subsets: bool  # it is written in any case


def drop(project: ForeignProject, name: str, reason: str) -> None:
    """Take an option back, and say why in place of what was said of its key."""
    value = project.training.pop(name)
    key = project.said.get(name, name)
    _forget(project, key)
    if key in project.assumed:
        project.assumed.pop(key)
    elif is_off(value) or value == 0:
        project.idle.append(key)
    else:
        project.left.append(f"{key} = {show(value)}: {reason}")


def _forget(project: ForeignProject, key: str) -> None:
    project.taken = [name for name in project.taken if name != key]
    project.changed = [line for line in project.changed if not line.startswith(f"{key} = ")]


def _settle_rates(project: ForeignProject, kind: RunKind) -> None:
    """Leave rates that are those of another kind of run, or of another optimizer."""
    reason = ""
    if kind.name != project.run.kind:
        said = f" ({project.run.said})" if project.run.said else ""
        reason = f"it is not the rate of such a run{said}, and {kind.title} is trained"
    elif project.has_other_optimizer:
        reason = "another optimizer is taken, with its own"
    if not reason:
        return
    for name in _RATES:
        if name in project.training:
            drop(project, name, reason)
    if project.parts.dit_rate is not None or any(project.parts.text_rates):
        project.left.append(f"the rates of {', '.join(map(show, project.parts.keys))}: {reason}")
    text_rates = tuple(0 if rate == 0 else None for rate in project.parts.text_rates)
    project.parts = dataclasses.replace(project.parts, dit_rate=None, text_rates=text_rates)
    if project.has_other_optimizer:
        for name in list(project.arguments):
            project.arguments.pop(name)
            project.leave(project.said.get(name, name), "it is of that optimizer")


def _settle_parts(project: ForeignProject, model: ModelSet, kind: RunKind, script: ScriptOptions) -> None:
    """Say which networks learn: the transformer or U-Net, text encoders, and at which rates."""
    parts = project.parts
    keys = ", ".join(map(show, parts.keys))
    if kind.learns_word or kind.sees_controls:
        if parts.keys:
            project.leave(keys, f"{kind.title} is all that is trained")
        return
    if not parts.trains_texts:
        project.taken += [show(key) for key in parts.keys]
        if parts.dit_rate is not None and kind is LORA:
            _set_rate(project, parts.dit_rate)
        return
    can_learn = "--network_train_unet_only" in model.commands["train"] and "text_encoder_lr" in script.known
    if kind is not LORA:
        can_learn = "train_text_encoder" in script.known
    if not can_learn:
        learned = keys or "text encoders"
        project.left.append(
            f"{learned}: a text encoder learned there, and none does here: {kind.title} of {model.title} "
            "leaves text encoders as they are"
        )
        if parts.dit_rate is not None and kind is LORA:
            _set_rate(project, parts.dit_rate)
        return
    rates = parts.text_rates
    if kind is LORA:
        project.training["network_train_unet_only"] = False
        if not parts.trains_dit:
            project.training["network_train_text_encoder_only"] = True
        if parts.dit_rate is not None:
            _set_rate(project, parts.dit_rate)
        usual = project.training.get("learning_rate")
        listed = [usual if rate is None else rate for rate in rates]
        told = ""
        if any(rate != usual for rate in listed) and None not in listed:
            listed = listed if len(set(listed)) > 1 else listed[:1]
            project.training["text_encoder_lr"] = listed
            told = f": text_encoder_lr = {', '.join(map(str, listed))}"
        project.changed.append(f"{keys or 'text encoders'}: they learn too, as there{told}")
        return
    if parts.dit_rate is not None:
        _set_rate(project, parts.dit_rate)
    project.training["train_text_encoder"] = True
    names = (
        ["learning_rate_te"]
        if "learning_rate_te" in script.known
        else ["learning_rate_te1", "learning_rate_te2"]
    )
    for name, rate in zip(names, (*rates, *rates[-1:]), strict=False):
        if rate is not None and name in script.known:
            project.training[name] = rate
    project.changed.append(f"{keys or 'text encoders'}: train_text_encoder = true, as there")


def _drop_if_there(project: ForeignProject, name: str, reason: str) -> None:
    if name in project.training:
        drop(project, name, reason)


def _set_rate(project: ForeignProject, rate: float) -> None:
    """Set the rate of all that learns: that of the transformer or U-Net."""
    key = next((key for key in project.parts.keys if "unet" in key or "transformer" in key), "unet_lr")
    if project.training.get("learning_rate") == rate:
        return
    if "learning_rate" in project.training:
        drop(project, "learning_rate", f"{key} is the rate of what learns")
    project.training["learning_rate"] = rate
    project.changed.append(f"{show(key)} = {rate}: learning_rate = {rate}")


def _take_by_name(project: ForeignProject, script: ScriptOptions, chosen: Collection[str]) -> None:
    """Take keys that are options of the script that trains, or keys of dataset.toml, under the same name.

    chosen: options for which `new` writes a value of its own.
    """
    places: set[str] = {*script.known, *KEYS, *SUBSET_KEYS, *facts_of(NewOptions)}
    for key, value in project.others.items():
        shown = f"{show(key)} = {show(value)}"
        if is_empty(value):
            project.empty.append(show(key))
            continue
        try:
            if key in SUBSET_KEYS and key not in _OF_RUN:
                project.data[key] = SUBSET_KEYS[key].form.read(_as_plain(value, SUBSET_KEYS[key].default))
                project.said[key] = show(key)
                project.taken.append(show(key))
            elif key in script.known:
                _take_option(project, script.known[key], key, value, key in chosen)
            elif key in script.refused:
                if is_off(value) or str(value) in {"0", "0.0"}:
                    project.idle.append(show(key))
                else:
                    project.left.append(f"{shown}: {script.refused[key]}")
            else:
                _note_unknown(project, key, value, places)
        except Unfit as error:
            allowed = SUBSET_KEYS[key].form.allowed
            project.left.append(f"{shown}: {error or f'it has to be {allowed}'}")
        except (ValueError, TypeError, OverflowError) as error:
            project.left.append(f"{shown}: {error}")
    project.others = {}
    for key in list(project.unknown):
        if _find_ours(key, places) is not None:
            project.unknown.remove(key)
            _note_unknown(project, key, True, places)


def _note_unknown(project: ForeignProject, key: str, value: Any, places: Collection[str]) -> None:
    """Note a key that has no rule: with our name of it if there is one."""
    ours = _find_ours(key, places)
    if ours is not None and not is_off(value):
        project.leave(key, f"not taken; this program has it as {ours}")
    elif is_off(value):
        project.idle.append(show(key))
    else:
        project.unknown.append(show(key))


def _find_ours(key: str, places: Collection[str]) -> str | None:
    last = key.split(".")[-1].split(":")[-1]
    if last in places:
        return last
    return ours_for(last, places) or None


def _take_option(project: ForeignProject, option: AskedOption, key: str, value: Any, is_chosen: bool) -> None:
    """Take the value of an option. is_chosen: `new` writes another one. Raises ValueError if it cannot be."""
    if option.reaches_out:
        raise ValueError(f"only who types --{key} with the training may say it")
    if is_off(value) or (option.default is None and str(value) in {"0", "0.0"}):
        project.idle.append(show(key))
        return
    read = option.read(value)
    if read == option.default and not is_chosen:
        project.taken.append(show(key))
        return
    project.training[key] = read
    project.said[key] = show(key)
    project.taken.append(show(key))


def _as_plain(value: Any, usual: Any) -> Any:
    """Return a value of a page, which writes numbers and switches as texts, like that which a key has."""
    if isinstance(usual, bool) and not isinstance(value, bool):
        return is_on(value)
    if isinstance(value, str) and isinstance(usual, int | float):
        value = float(value)
    if (
        isinstance(usual, int)
        and not isinstance(usual, bool)
        and isinstance(value, float)
        and value.is_integer()
    ):
        return int(value)
    return value


def _settle_optimizer(project: ForeignProject, memory: float) -> None:
    """Write the arguments that the optimizer has here, and say which are left."""
    training = project.training
    optimizer = training.get("optimizer_type")
    if not memory and optimizer in {"adamw8bit", "pagedadamw8bit", "lion8bit"}:
        ours = "lion" if optimizer == "lion8bit" else "adamw"
        training["optimizer_type"] = ours
        project.changed.append(f"optimizer_type = {optimizer}: it needs a card, so it is {ours} here")
        optimizer = ours
    package = _PACKAGES.get(str(optimizer))
    if package is not None and find_spec(package) is None:
        project.left.append(
            f"optimizer_type = {optimizer}: it is not installed: pip install {DISTRIBUTIONS[package]}"
        )
    if optimizer is None:
        for name in project.arguments:
            project.leave(project.said.get(name, name), "no key says of which optimizer")
        project.arguments = {}
        return
    arguments = {**project.program.arguments.get(optimizer, {}), **_join_arguments(project, optimizer)}
    texts = []
    for name, value in arguments.items():
        key = project.said.get(name, name)
        if name in OPTIMIZER_ARGUMENTS.get(optimizer, {name}):
            texts.append(f"{name}={_as_literal(value)}")
            if key != name or name in project.arguments:
                project.taken.append(key)
        elif is_off(value):
            project.idle.append(key)
        else:
            project.leave(key, f"{optimizer} has no argument {name} here")
    if texts:
        training["optimizer_args"] = texts
        project.said["optimizer_args"] = "optimizer arguments"
        project.changed.append(f"arguments of the optimizer: optimizer_args = {texts}")
    if optimizer == "adafactor" and is_on(arguments.get("relative_step", True)):
        for name in ("learning_rate", "unet_lr"):
            _drop_if_there(project, name, "Adafactor with relative_step finds its own rate, there and here")
        if training.get("lr_scheduler", "adafactor") != "adafactor":
            drop(project, "lr_scheduler", "Adafactor with relative_step finds its own rate, there and here")
        training["lr_scheduler"] = "adafactor"
        if "lr_warmup_steps" in training:
            drop(project, "lr_warmup_steps", "Adafactor with relative_step has its own warm-up, warmup_init")
        if project.warmup_share is not None:
            project.leave(
                project.warmup_share[0], "Adafactor with relative_step has its own warm-up, warmup_init"
            )
            project.warmup_share = None
        training["lr_warmup_steps"] = 0
    elif training.get("lr_scheduler") == "adafactor":
        drop(project, "lr_scheduler", "it is of Adafactor with relative_step=True")


def _join_arguments(project: ForeignProject, optimizer: str) -> dict[str, Any]:
    """Return arguments as the optimizer has them: two numbers of Adam as betas, of Adafactor as eps."""
    found = {name: value for name, value in project.arguments.items() if value is not None}
    for name in project.arguments.keys() - found.keys():
        project.empty.append(project.said.get(name, name))
    if optimizer != "adafactor" and {"beta1", "beta2"} & found.keys():
        key = project.said.get("beta1", project.said.get("beta2", "betas"))
        first, second = found.pop("beta1", 0.9), found.pop("beta2", 0.999)
        project.said["betas"] = key
        found["betas"] = [first, second]
        if "beta2" in project.said:
            project.taken.append(project.said["beta2"])
    if optimizer == "adafactor":
        for name in ("eps", "eps2"):
            if name in found and not {"eps", "eps2"} <= found.keys():
                project.leave(project.said.get(name, name), "Adafactor has two of them")
                found.pop(name)
        if "eps2" in found:
            found["eps"] = [found["eps"], found.pop("eps2")]
            project.taken.append(project.said["eps2"])
        if found.get("beta2") is not None:
            project.idle.append(project.said["beta2"])
            found.pop("beta2")
    return found


def _as_literal(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_as_literal, value))
    return str(value).strip()


def _settle_network(project: ForeignProject, kind: RunKind) -> None:
    """Write rank, alpha and arguments of the network, or leave them if none is trained."""
    training = project.training
    arguments = {name: value for name, value in project.network_arguments.items() if value not in (0, False)}
    for name in project.network_arguments.keys() - arguments.keys():
        project.idle.append(project.said[name])
    if arguments and kind is LORA:
        training["network_args"] = [
            f"{name}={value:g}" if not isinstance(value, bool) else f"{name}={value}"
            for name, value in arguments.items()
        ]
        project.said["network_args"] = "arguments of the network"
        project.taken += [project.said[name] for name in arguments]
        project.changed.append(f"arguments of the network: network_args = {training['network_args']}")
    elif arguments:
        for name in arguments:
            project.leave(project.said[name], f"{kind.title} is trained")
    rank = training.get("network_dim")
    if kind is LORA and rank is not None and "network_alpha" not in training:
        training["network_alpha"] = alpha = rank if project.program.alpha is None else project.program.alpha
        project.changed.append(f"no alpha is said: network_alpha = {alpha}, as in {project.title}")
    if kind is not LORA:
        for name in _OF_LORA:
            if name in training:
                drop(project, name, f"{kind.title} is trained")
    if not kind.learns_word:
        for name in _OF_EMBEDDING:
            if name in training:
                drop(project, name, f"{kind.title} is trained")


def _leave_recipe(project: ForeignProject, script: ScriptOptions) -> None:
    """Take out what `new` gives to the optimizer of a whole model, if the project has another one."""
    training = project.training
    accumulates = training.get("gradient_accumulation_steps", 1) > 1
    optimizer = training.get("optimizer_type", "adafactor")
    if "fused_backward_pass" in script.known and (optimizer != "adafactor" or accumulates):
        training["fused_backward_pass"] = False
    if "optimizer_type" in training and optimizer != "adafactor":
        training.setdefault("optimizer_args", [])
        training.setdefault("max_grad_norm", 1.0)
    if "lr_scheduler" in training and "lr_warmup_steps" not in training and project.warmup_share is None:
        training["lr_warmup_steps"] = 0


def _settle_data(project: ForeignProject, forms: Forms) -> None:
    """Leave keys that the tables of dataset.toml cannot have, and those that do nothing without others."""
    data = project.data
    steps = data.get("bucket_reso_steps", forms.step)
    if steps % forms.step:
        data.pop("bucket_reso_steps")
        _forget(project, "bucket_reso_steps")
        project.left.append(f"bucket_reso_steps = {steps}: this model needs a multiple of {forms.step}")
    for name in list(data):
        key = project.said.get(name, name)
        if name in SUBSET_KEYS and data[name] == SUBSET_KEYS[name].default:
            data.pop(name)
        elif name not in KEYS and not (forms.takes_subsets or forms.has_subsets):
            data.pop(name)
            _forget(project, key)
            project.left.append(
                f"{key}: {name} is of [[datasets.subsets]], which this model's script does not take"
            )
    if not VARYING_TEXTS & data.keys():
        for name in _OF_SHUFFLING:
            if name in data:
                data.pop(name)
                _forget(project, project.said[name])
                project.idle.append(project.said[name])


def needs_subsets(data: Mapping[str, Any]) -> bool:
    """Return whether keys of dataset.toml are such that only the form with subsets has them."""
    return any(name not in KEYS for name in data)


def find_table_keys(project: ForeignProject, folder: Path, place: Path) -> dict[str, Any]:
    """Return the keys that a project has for one of several folders.

    folder: that is described. place: in it.
    """
    for known in project.places.values():
        if known.path is None or not known.data:
            continue
        found = find_beside(project.path, str(known.path))
        if found is not None and real_path(found) == real_path(place):
            return known.data
    names = [
        known for known in project.places.values() if known.path is not None and known.path.name == place.name
    ]
    return names[0].data if len(names) == 1 and place != folder else {}


def choose_length(project: ForeignProject, options: NewOptions, in_epoch: int, num_files: int) -> NewOptions:
    """Return options with the number of steps that the project names, or that its epochs make.

    in_epoch: steps of an epoch with dataset.toml as it is written.
    """
    in_epoch = _count_steps_of_epoch(project, in_epoch)
    steps = project.new.get("max_train_steps") or None
    key_of_steps = project.said.get("max_train_steps", "max_train_steps")
    epochs = [said for said in project.epochs if said.number]
    project.idle += [said.key for said in project.epochs if not said.number]
    if steps is None and "max_train_steps" in project.new:
        _forget(project, key_of_steps)
        project.idle.append(key_of_steps)
    if options.max_train_steps != NewOptions(folder=options.folder).max_train_steps:
        for said in epochs:
            project.left.append(f"{said.key} = {said.number}: --max_train_steps says otherwise")
        if steps is not None and steps != options.max_train_steps:
            _leave_steps(project, key_of_steps, f"{steps}: --max_train_steps says otherwise")
        _settle_times(project, Length(options.max_train_steps, in_epoch))
        return options
    chosen = _choose_epochs(epochs, steps, in_epoch)
    for said in epochs:
        if said is not chosen:
            counted = key_of_steps if chosen is None else chosen.key
            project.left.append(f"{said.key} = {said.number}: {counted} counts, as in {project.title}")
    if chosen is not None:
        if steps is not None:
            _leave_steps(project, key_of_steps, f"{steps}: {chosen.key} counts, as in {project.title}")
        steps = min(chosen.number * in_epoch, contract.MOST_STEPS)
        text = f"max_train_steps = {steps}, with {in_epoch} in an epoch of {num_files} files here"
        source = f", as {project.title} has it" if chosen.key in project.assumed else ""
        project.changed.append(f"{chosen.key} = {chosen.number}{source}: {text}")
    if steps is None:
        steps = options.max_train_steps
    _settle_times(project, Length(steps, in_epoch))
    return dataclasses.replace(options, max_train_steps=steps)


def _count_steps_of_epoch(project: ForeignProject, in_epoch: int) -> int:
    """Return the steps of an epoch, also of a project that draws so many items of each dataset."""
    drawn = [dataset.num_drawn for dataset in project.places.values()]
    if drawn and all(count is not None for count in drawn):
        batch = project.data.get("batch_size", 1) * project.training.get("gradient_accumulation_steps", 1)
        in_epoch = math.ceil(sum(count or 0 for count in drawn) / batch)
    return max(in_epoch, 1)


def _leave_steps(project: ForeignProject, key: str, reason: str) -> None:
    """Note that the steps that a project names are not taken. reason: the steps, and what counts."""
    _forget(project, key)
    project.assumed.pop(key, None)
    project.left.append(f"{key} = {reason}")


def _choose_epochs(epochs: list[EpochsSaid], steps: int | None, in_epoch: int) -> EpochsSaid | None:
    """Return the epochs that count; None if a number of steps does."""
    first = next((said for said in epochs if said.counts == contract.FIRST), None)
    if first is not None or steps is None:
        return first or next(iter(epochs), None)
    soonest = [said for said in epochs if said.counts == contract.SOONEST and said.number * in_epoch < steps]
    return soonest[0] if soonest else None


def _settle_times(project: ForeignProject, length: Length) -> None:
    """Write what is done after so many epochs, and the warm-up, in steps of this run."""
    training = project.training
    for name, said in project.per_epoch.items():
        if said.number and name not in training:
            training[name] = min(said.number * length.in_epoch, contract.MOST_STEPS)
            project.changed.append(f"{said.key} = {said.number}: {name} = {training[name]}")
        elif said.number:
            project.left.append(f"{said.key} = {said.number}: {project.said[name]} says it")
        else:
            project.idle.append(said.key)
    for name in ("save_every_n_steps", "sample_every_n_steps"):
        if training.get(name) == 0:
            drop(project, name, "")
    if "save_every_n_steps" in training and project.keeps_few:
        training["save_last_n_steps"] = training["save_every_n_steps"]
    if "save_every_n_steps" in training:  # states as long as `new` keeps them: until the next one
        training["save_last_n_steps_state"] = training["save_every_n_steps"]
    if project.warmup_share is not None:
        key, share = project.warmup_share
        if training.get("lr_warmup_steps"):
            project.left.append(f"{key}: {project.said['lr_warmup_steps']} says it")
        elif share:
            steps = training["lr_warmup_steps"] = round(share * length.steps)
            project.changed.append(
                f"{key} = {share * 100:g}: percent of the steps, so lr_warmup_steps = {steps}"
            )
        else:
            project.idle.append(key)
    if training.get("lr_warmup_steps"):
        scheduler = training.get("lr_scheduler", "constant")
        with_warmup = _SCHEDULES_WITHOUT_WARMUP.get(scheduler)
        if with_warmup is not None:
            training["lr_scheduler"] = with_warmup
            project.changed.append(f"lr_scheduler = {with_warmup}: {scheduler}, behind the warm-up")


def explain_model(project: ForeignProject, error: OptionError) -> OptionError:
    """Return an error about a missing model or task with the keys of the project that name one."""
    said = [f"{key} = {value}" for key, value in project.models.items()]
    if "family" in project.new:
        said.append(f"--family {project.new['family']}, by its other keys")
    if not said:
        return error
    return OptionError(f"{error}\n  {project.path} says {', '.join(said)}")
