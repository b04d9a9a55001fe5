"""The build of the installed package; wheels and source archives begin in backend.py.

backend: the build backend that pyproject.toml names
checkout_names: modules of a checkout by their installed names
reelsmith/: what stands at the top of the package
release: the steps of a release, for .github/workflows/release.yml
staging: lays out the files of a distribution
updating: a newer version of a checkout, and the way back
"""
