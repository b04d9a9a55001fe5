"""Tools for datasets, used before caching: captions, clips cut from footage, reports."""
