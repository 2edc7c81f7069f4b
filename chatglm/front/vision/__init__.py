"""Chats about a picture: in the terminal, and on a web page (which needs gradio)."""
