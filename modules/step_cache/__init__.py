"""Step caches: a rule decides which passes to skip; a runner adds what the blocks added the last time."""
