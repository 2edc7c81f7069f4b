"""`python -m tools.engines`: other engines over the exported demo, beside this project's answers."""
