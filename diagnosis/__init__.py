"""Diagnosis: why a LoRA does not learn what it should, as findings about datasets, runs and LoRA files."""
