"""Findings about datasets that explain why a training falls short."""
