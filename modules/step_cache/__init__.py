"""Step caches: a rule decides which passes to skip; a runner adds what the blocks added the last time.

calibration: measure a model for step caches
rules: decide which passes are skipped: MagCache, TeaCache
runner: skip the blocks of a pass, add their residual
"""
