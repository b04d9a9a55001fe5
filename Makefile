.PHONY: check fast all format tables house delete
check:  ## format, lint, types, import arrows, tests
	python run_tests.py
fast:   ## quick tests
	python run_tests.py --fast
all:    ## slow tests too
	python run_tests.py --all
format:
	.venv/bin/python -m ruff format . && .venv/bin/python -m ruff check --fix .
tables: ## what scripts say of their options without importing them: after any change of an option
	.venv/bin/python -m tests.tables
house:  ## what a reader of the code must hold in mind
	.venv/bin/python benchmarks/house.py
delete: ## delete a feature of training, a kind of network, a form of data or a page in a copy, and check what is left: make delete NAME=skip
	.venv/bin/python -m tests.deleting $(NAME)
