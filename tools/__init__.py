"""Commands that belong to no model."""
