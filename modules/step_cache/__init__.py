"""Step caches: a rule decides which passes to skip; a runner adds what the blocks added the last time.

rules: MagCache and TeaCache decide which passes are skipped
runner: skip the blocks of a pass, add their residual
"""
