"""The web page (needs gradio): `page.py` joins its parts, the other modules; `behaviour.js` runs in the browser."""
