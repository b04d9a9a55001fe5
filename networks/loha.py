"""LoHa for the Linear layers of a network's blocks: `--network_module networks.loha`, for every family."""

from networks.factored import loha_shapes, module_of_kind

check_settings, create_arch_network, create_arch_network_from_weights = module_of_kind(
    lambda arguments: loha_shapes, ("hada_w1_a",)
)
