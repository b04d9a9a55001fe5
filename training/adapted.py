"""Warnings if --training_adapter does not fit the targets of a run or its model."""

from collections.abc import Mapping

from checkpoints.file_hashes import name_base
from modules.errors import UserError
from modules.text_files import read_safetensors_texts
from networks.module_names import read_family
from networks.names.layouts import MADE_FOR, TRAINED_ON
from protocols.family import Family
from training.options import TrainingOptions

BASE_MODEL = "base_model"  # the hub's key of a LoRA's base, which some trainers write into files too


def list_adapter_warnings(family: Family, options: TrainingOptions) -> str:
    """Return warnings about --training_adapter, which must be set; "" if there are none.

    Only names, hashes and metadata are compared, because an adapter also loads into other models with the
    same layers.
    """
    path = options.frozen.training_adapter
    assert path is not None
    warnings = []
    for target in options.features.targets:
        if target.keeps_guidance:
            warnings.append(
                f"--training_adapter with {target.option}: the adapter has undone the guidance that was "
                "distilled into the transformer, and the target adds it again, so that it acts twice in what "
                "is learned. Omit one of the two."
            )
    metadata: Mapping[str, str] = {}
    if path.is_file():
        try:
            metadata = read_safetensors_texts(path)
        except (OSError, ValueError, UserError):
            metadata = {}  # errors of the file are reported when it is loaded
    reason = _describe_other_base(family, metadata)
    if reason:
        warnings.append(
            f"--training_adapter {path}: {reason}. An adapter undoes the distillation of one model: pass the "
            "one for this transformer."
        )
    return " ".join(warnings)


def _describe_other_base(family: Family, metadata: Mapping[str, str]) -> str:
    """Return a clause if the adapter's metadata names a different model than the trained one, else ""."""
    made_for = metadata.get(MADE_FOR, "")
    if made_for:
        # A clause saying which other file the adapter was made for
        # "" if it fits the transformer's file.
        bases = [name_base(file) for file in family.dit_files]
        name, _, digest = made_for.rpartition(" ")
        is_known = any(base == made_for or (name and base.endswith(f" {digest}")) for base in bases)
        if is_known or not bases:
            return ""
        return f"its metadata says it was made for {made_for}, not for {' or '.join(bases)}"
    version = metadata.get(TRAINED_ON, "")
    if version:
        trained_version = family.metadata.get("base_model_version", family.name)
        adapter_family = read_family({TRAINED_ON: version})
        trained_family = read_family({TRAINED_ON: trained_version})
        if version == trained_version or adapter_family == trained_family:
            return ""
        return f"its metadata says it is for {version}, and the transformer is {trained_version}"
    base = metadata.get(BASE_MODEL, "")
    repositories = family.release.repositories
    if base and base.casefold() not in [repository.casefold() for repository in repositories]:
        return f"its metadata says it is for {base}, and the transformer is of {' or '.join(repositories)}"
    return ""
