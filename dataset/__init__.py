"""All about datasets: configuration, sources, caches and checks; read loop.py in caching/ first."""
