"""Captions written by a vision-language model, and edited: where they go, who makes them, what they say."""
