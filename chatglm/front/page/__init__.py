"""The web page (needs gradio): `page.py` is how it behaves, the others how it looks and what browsers keep."""
