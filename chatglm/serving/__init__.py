"""The HTTP side: `engine` runs requests together, `app` has the routes of `openai` and `legacy`."""
