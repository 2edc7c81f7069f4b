"""Fetches a picture from an address that a stranger may have chosen: public hosts only, within limits."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

from .reading import PictureError

SECONDS, MOST_REDIRECTS = 10.0, 3
_CHUNK = 2**16


def fetch(url: str, most_bytes: int) -> bytes:
    """The bytes at a URL, at most one more than `most_bytes`.

    Every host, also of a redirect, is looked up once and must be public; the connection goes to the address that was
    checked. Environment variables for proxies are not used.

    Raises:
        PictureError: another scheme, an address in a private network, no answer in ten seconds, or no success.
    """
    until = time.monotonic() + SECONDS
    try:
        for _ in range(MOST_REDIRECTS + 1):
            status, target, body = _get(url, most_bytes, until)
            if status == 200:
                return body
            if target is None:
                raise PictureError(f"fetching the picture failed: the server answered {status}")
            url = urljoin(url, target)
    except PictureError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PictureError(f"fetching the picture failed: {str(error) or type(error).__name__}") from None
    raise PictureError(f"fetching the picture failed: more than {MOST_REDIRECTS} redirects")


def _get(url: str, most_bytes: int, until: float) -> tuple[int, str | None, bytes]:
    """The status, where a redirect leads, and the body of a success."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PictureError(f"pictures come by http or https, not from {url[:100]}")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = public_address(parts.hostname, port)
    raw = socket.create_connection((address, port), timeout=_left(until))
    with raw, (ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname) if secure else raw) as one:
        connection = http.client.HTTPConnection(parts.hostname, port)
        connection.sock = one
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "chatglm", "Accept": "image/*"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308):
            return answer.status, answer.getheader("Location"), b""
        body = b""
        while answer.status == 200 and len(body) <= most_bytes:
            one.settimeout(_left(until))
            chunk = answer.read(_CHUNK)
            if not chunk:
                break
            body += chunk
        return answer.status, None, body[: most_bytes + 1]


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise PictureError(f"fetching the picture took longer than {SECONDS:g} s")
    return left


def public_address(host: str, port: int) -> str:
    """The address of a host. Raises PictureError if any of its addresses is not public."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        if not (mapped or address).is_global or address.is_multicast:
            raise PictureError(f"{host} is in a private network: pictures are fetched from public addresses only")
    return found[0]
