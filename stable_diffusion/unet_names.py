"""Names of the U-Net's modules in files that follow the released (LDM) layout."""

from networks.module_names import alias, module_path, own_path
from networks.names.stable_diffusion import SD1, SDXL


def diffusers_name(name: str) -> str:
    """Return diffusers' name of a tensor of the U-Net, or of a part of it; an unknown name stays."""
    path, _, leaf = name.rpartition(".")
    for family in (SDXL, SD1):
        found = own_path(path, family)
        if found is not None:
            return f"{found}.{leaf}"
    return name


def path_of(name: str) -> str | None:
    """Return the path of a module of SDXL's U-Net by its underscored released name; None if it has none."""
    return module_path(alias(name, SDXL), SDXL)
