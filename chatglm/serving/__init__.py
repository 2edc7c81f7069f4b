"""The HTTP server: `app` has the routes of `openai` and `legacy`, `chat_engine` runs their requests together."""
