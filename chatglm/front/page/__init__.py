"""The web page (needs gradio): `page.py` is the whole, the other modules are its parts, `behaviour.js` in the browser."""
