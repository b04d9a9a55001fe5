"""Teach open video models something new, and make videos with them. Commands: reelsmith --help"""
