"""The build of the installed package; wheels and source archives begin in backend.py.

backend: the build backend that pyproject.toml names
checkout_names: modules of a checkout by their installed names
reelsmith/: modules at the top level of the installed package
release: the steps of a release, for .github/workflows/release.yml
staging: lays out the files of a distribution
updating: updates a checkout, or unpacks a newer one
"""
