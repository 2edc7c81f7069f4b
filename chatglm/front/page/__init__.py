"""The web page (needs gradio): `page.py` has its behaviour, the other modules its looks and what browsers keep."""
