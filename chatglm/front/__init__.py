"""What the programs at the top share: arguments, texts, the terminal, a conversation, the web page."""
