"""Maintenance of the project: the lock, tests with other releases than the locked ones, training of the demo."""
