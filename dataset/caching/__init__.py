"""The caching loop and its two halves.

existing: existing caches by their sources; tensors computed before
latents: encode the items without a valid latent cache
loop: encode media to latents and captions to embeddings
on_ray: cache on a Ray cluster, by shards of the work
planning: cache files of a source, and which are valid
prefetch: work ahead in threads; write in the background
reports: report what a caching run did
text_plans: text caches: valid, unfinished and missing outputs
texts: encode the captions without a valid text cache
work: caching in parts that any process can do
"""
