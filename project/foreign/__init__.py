"""Projects of other trainers, which `new --from` reads."""
