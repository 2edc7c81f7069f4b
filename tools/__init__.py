"""What keeps the project going: the lock, tests with other releases than the locked ones, the making of the demo."""
