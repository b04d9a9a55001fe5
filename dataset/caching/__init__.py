"""The caching loop and its two halves.

caption_files: the texts to encode, one cache file per caption
cleanup: remove cache files that no longer belong to any item
existing: existing latent caches, by the stem of their source
given_tensors: whether a family can use tensors computed before
latents: encode the items without a valid latent cache
loop: encode media to latents and captions to embeddings
on_ray: cache on a Ray cluster, by shards of the work
planning: cache files of a source, and which are valid
prefetch: work ahead in threads; write in the background
processes: the share of one process in common work
reports: report what a caching run did
source_jobs: work on many sources ahead; failures end no run
text_plans: text caches: valid, unfinished and missing outputs
texts: encode the captions without a valid text cache
work: caching in parts that any process can do
"""
