"""Pictures for models that see: read safely from files, bytes and addresses, and made into pixels."""

from .pixels import pixels_of
from .reading import MOST_BYTES, MOST_PIXELS, PictureError, read_base64, read_picture

__all__ = ["MOST_BYTES", "MOST_PIXELS", "PictureError", "pixels_of", "read_base64", "read_picture"]
