"""The bundled demo checkpoints, and the scripts that make them. See README.md beside this file."""
