.PHONY: check slow format
check:  ## format, lint, types, import arrows, tests
	python run_tests.py
slow:   ## the tests that take longer
	python run_tests.py -m slow
format:
	.venv/bin/python -m ruff format . && .venv/bin/python -m ruff check --fix .
