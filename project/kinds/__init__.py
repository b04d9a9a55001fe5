"""Kinds of runs that `new --train` names."""
