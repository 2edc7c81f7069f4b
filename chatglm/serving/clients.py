"""Who sends a request: the name of an API key, or an address. Each may use the server's time and memory fairly."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from ..engine import CLIENT
from .errors import ApiError

#: Bytes of the bodies that are in memory, of one client and of all: until their requests are answered.
MOST_BYTES, MOST_BYTES_OF_ALL = 16 * 2**20, 64 * 2**20
#: Bodies of this size are always taken in.
SMALL_BODY = 2**14

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")


@dataclass
class Client:
    """A client with requests under way.

    `lane`: the client's long checks and encodings run one by one, so that they never hold up those of others.
    """

    name: str
    requests: int = 0
    bytes: int = 0
    lane: asyncio.Lock = field(default_factory=asyncio.Lock)
    embedding: asyncio.Lock = field(default_factory=asyncio.Lock)


_CURRENT: ContextVar[Client | None] = ContextVar("_CURRENT", default=None)
_ACCOUNT: ContextVar[Body | None] = ContextVar("_ACCOUNT", default=None)


def charge(count: int) -> None:
    """Counts memory that the current request will take besides its body, as `Body.add` does."""
    account = _ACCOUNT.get()
    if account is not None:
        account.add(count)


@contextlib.asynccontextmanager
async def in_lane() -> AsyncIterator[None]:
    """Waits until the current client may start another piece of work that takes a while."""
    client = _CURRENT.get()
    async with contextlib.nullcontext() if client is None else client.lane:
        yield


@contextlib.asynccontextmanager
async def embedding_alone() -> AsyncIterator[None]:
    """Waits until the current client's other requests for embeddings are answered: their vectors take memory."""
    client = _CURRENT.get()
    async with contextlib.nullcontext() if client is None else client.embedding:
        yield


class Clients:
    """The clients that have requests under way.

    Args:
        keys: name -> API key; one with an empty name is shared, and its users are told apart by address. None lets
            everybody in.

    Raises:
        ValueError: a key is empty or cannot be sent, or two are equal.
    """

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        for name, key in (keys or {}).items():
            check_key(name, key)
        self._keys = None if not keys else {name: key.encode() for name, key in keys.items()}
        if self._keys is not None and len(set(self._keys.values())) < len(self._keys):
            raise ValueError("two API keys are equal: give each client its own")
        self._clients: dict[str, Client] = {}
        self.bytes = 0

    def name_of(self, authorization: bytes, address: str) -> str:
        """Returns the client's name. Raises ApiError (401) for a wrong key."""
        if self._keys is None:
            return address
        scheme, _, given = authorization.partition(b" ")
        found = [name for name, key in self._keys.items() if hmac.compare_digest(given.strip(), key)]
        if scheme.lower() != b"bearer" or not found:
            reason = "give the API key of this server in the header Authorization: Bearer KEY"
            raise ApiError(401, reason, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found[0] or address

    @property
    def need_keys(self) -> bool:
        return self._keys is not None

    @contextlib.contextmanager
    def request_of(self, name: str) -> Iterator[Body]:
        """Makes this the current client while its request is under way; gives the account of the request's body."""
        client = self._clients.setdefault(name, Client(name))
        client.requests += 1
        body = Body(self, client)
        tokens = CLIENT.set(name), _CURRENT.set(client), _ACCOUNT.set(body)
        try:
            yield body
        finally:
            CLIENT.reset(tokens[0])
            _CURRENT.reset(tokens[1])
            _ACCOUNT.reset(tokens[2])
            client.bytes -= body.size
            self.bytes -= body.size
            client.requests -= 1
            if not client.requests:
                del self._clients[name]


class Body:
    """Counts the bytes of a body while they arrive."""

    def __init__(self, clients: Clients, client: Client) -> None:
        self._clients, self._client = clients, client
        self.size = 0

    def add(self, count: int) -> None:
        """Raises ApiError (429) if the client, or all clients, then have more in memory than is good for the others."""
        self.size += count
        self._client.bytes += count
        self._clients.bytes += count
        too_many = self._client.bytes > MOST_BYTES or self._clients.bytes > MOST_BYTES_OF_ALL
        if too_many and self.size > SMALL_BODY:
            reason = "too much text is being read at once: send it again when other requests are answered"
            headers = {"Retry-After": "2", "Connection": "close"}
            raise ApiError(429, reason, code="too_much_at_once", headers=headers)


def check_key(name: str, key: str) -> None:
    """Raises ValueError unless clients can send this key: an empty one would let everybody in."""
    whose = f"the API key of {name}" if name else "the API key"
    if not key.strip():
        raise ValueError(f"{whose} is empty: give one, or leave the option out to let everybody in")
    if key != key.strip() or not key.isprintable():
        raise ValueError(f"{whose} holds blanks or control characters at an end or inside, which headers cannot carry")


def read_keys(path: Path) -> dict[str, str]:
    """Reads a file of API keys: a name and a key on each line; lines that begin with `#` are comments.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not of this form, a name stands twice, or there is no key at all.
    """
    keys: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]):
            raise ValueError(
                f"{path}, line {number}: give a name (letters, digits, _.@-) and a key, with a blank between"
            )
        if words[0] in keys:
            raise ValueError(f"{path}, line {number}: the name {words[0]} stands there twice")
        keys[words[0]] = words[1]
    if not keys:
        raise ValueError(f"{path} holds no API key: write a name and a key on each line")
    return keys


def address_of(scope_client: tuple[str, int] | None) -> str:
    """Returns the address that stands for a client: of IPv6 the network, because a client has a whole one."""
    if not scope_client:
        return "local"
    try:
        address = ipaddress.ip_address(scope_client[0])
    except ValueError:
        return scope_client[0]
    if address.version == 6 and not address.is_loopback:
        return str(ipaddress.ip_network((int(address), 64), strict=False).network_address) + "/64"
    return str(address)
