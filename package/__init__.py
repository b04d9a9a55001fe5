"""The build of the installed package; wheels and source archives begin in backend.py."""
