"""What the front doors share: arguments, texts, the terminal, a conversation, the web page."""
