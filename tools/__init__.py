"""What keeps the project going: the lock of its requirements, and tests with other releases than the locked ones."""
