"""One grid API over HTTP: bounded in time and size, retried with back-off, never redirected, and silent about its credentials.

Credentials travel in request headers alone. No exception made here has another one behind it (an HTTP library's may hold the
request), and what a server says about a refusal is shown with every credential blotted out, should it echo one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final
from urllib.parse import urlsplit

from green_torch.errors import ArgumentError, IntensityError

if TYPE_CHECKING:
    import requests

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 10.0  # between two bytes
BODY_TIMEOUT_S = 20.0  # for the whole body
MOST_BYTES = 8 * 2**20  # of a body, unpacked; ten days of five-minute figures are under 1 MiB
_MOST_WORDS = 200  # characters shown of what a server says
_BACKOFF_S = 0.5
_TRIES = 2  # more, after the first
_PASSING = (500, 502, 503, 504)  # tried again at once
_OK, _REDIRECT, _BAD_REQUEST, _UNAUTHORIZED, _FORBIDDEN, _TOO_MANY, _SERVER = 200, 300, 400, 401, 403, 429, 500


@final
class Secret:
    """A credential that no ``repr``, log or traceback shows. ``reveal`` is for request headers alone.

    Raises:
        ArgumentError: it is empty, or holds what no header can carry; the message doesn't show it.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str, name: str) -> None:
        text = text.strip() if isinstance(text, str) else ""
        if not text or not text.isascii() or not text.isprintable():
            raise ArgumentError(
                f"{name} is empty, or not one line of plain characters (it is not shown here): check how it was copied"
            )
        self._text = text

    def __repr__(self) -> str:
        return "***"

    def reveal(self) -> str:
        """The credential itself."""
        return self._text


@dataclass(frozen=True, slots=True)
class _Headers:
    """Sets headers as ``requests`` sets an authorization: it is dropped on a redirect, and no ``.netrc`` replaces it."""

    named: Mapping[str, Secret]

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers.update({name: secret.reveal() for name, secret in self.named.items()})
        return request


class _Refused(Exception):  # noqa: N818  (it never leaves this module)
    """A body that is not taken."""


@final
class Api:
    """Where a provider's data is asked for. ``mend`` is the line to type where credentials are refused.

    Raises:
        ArgumentError: ``base_url`` is no http(s) address, or holds a user or password.
    """

    def __init__(self, name: str, base_url: str, *, mend: str = "", secrets: tuple[Secret, ...] = ()) -> None:
        parts = urlsplit(base_url) if isinstance(base_url, str) else urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ArgumentError(f'base_url: an address like "https://example.org" is needed for {name}')
        if parts.username or parts.password:
            raise ArgumentError(f"base_url of {name} holds a user or password, which would be written down: leave them out")
        self.name = name
        self.host = parts.netloc
        self.base_url = base_url.rstrip("/")
        self._mend = mend
        self._secrets = secrets

    def get(
        self, path: str, params: Mapping[str, str | int | float] | None = None, headers: Mapping[str, Secret] | None = None
    ) -> dict[str, Any]:
        """The JSON object at a path. Blocks for a minute at worst.

        Raises:
            IntensityError: no answer, or none that can be used.
        """
        content, failure = self._ask(path, params or {}, headers or {})
        if failure is not None:  # raised here, where no other exception and no body of a server's is at hand
            raise failure
        return content

    def _ask(
        self, path: str, params: Mapping[str, Any], headers: Mapping[str, Secret]
    ) -> tuple[dict[str, Any], IntensityError | None]:
        """The answer, and what is wrong with it."""
        try:
            status, retry_after_s, body = self._fetch(path, params, _Headers(headers))
        except Exception as error:  # whatever the libraries raise may hold the request: only its kind is told
            return {}, IntensityError(f"{self.name} could not be reached at {self.host}: {_reason(error)}")
        content, problem = _parsed(body)
        if status == _OK and problem is None:
            return content, None
        return {}, self._refusal(status, retry_after_s, problem or "", _words(content, (*self._secrets, *headers.values())))

    def _fetch(self, path: str, params: Mapping[str, Any], headers: _Headers) -> tuple[int, float | None, bytes]:
        import requests  # only where the network is used
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        retry = Retry(
            total=_TRIES,
            connect=0,  # these two it would log as warnings; the next request is the caller's
            read=False,
            other=0,
            redirect=0,
            status_forcelist=_PASSING,
            backoff_factor=_BACKOFF_S,
            respect_retry_after_header=False,  # it may name hours: the caller keeps to it without sleeping
            raise_on_status=False,
        )
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=retry))
            session.mount("https://", HTTPAdapter(max_retries=retry))
            with session.get(
                self.base_url + path,
                params=params,
                auth=headers,
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                stream=True,
                allow_redirects=False,
            ) as response:
                until_s = time.monotonic() + BODY_TIMEOUT_S
                body = bytearray()
                for chunk in response.iter_content(2**16):
                    body += chunk
                    if len(body) > MOST_BYTES:
                        raise _Refused(f"its answer is longer than {MOST_BYTES // 2**20} MiB")
                    if time.monotonic() > until_s:
                        raise _Refused(f"its answer took more than {BODY_TIMEOUT_S:g} s")
                return response.status_code, _retry_after_s(retry, response.headers.get("Retry-After")), bytes(body)

    def _refusal(self, status: int, retry_after_s: float | None, problem: str, words: str) -> IntensityError:
        said = f"{status}: {words}" if words else f"HTTP {status}"
        if status == _OK:
            return IntensityError(f"{self.name} at {self.host} answered {problem}")
        if status in (_UNAUTHORIZED, _FORBIDDEN):
            return IntensityError(f"{self.name} refused ({said}). {self._mend}".rstrip(), final=True)
        if status == _TOO_MANY:
            return IntensityError(f"{self.name} is asked too often for this account ({said})", retry_after_s=retry_after_s)
        if _REDIRECT <= status < _BAD_REQUEST:
            return IntensityError(
                f"{self.name} at {self.host} points to another address ({said}), which is not followed, since credentials would "
                "travel along: give the right base_url=",
                final=True,
            )
        if _BAD_REQUEST <= status < _SERVER:
            return IntensityError(f"{self.name} does not take the request ({said})", final=True)
        return IntensityError(f"{self.name} at {self.host} fails ({said})", retry_after_s=retry_after_s)


def _reason(error: Exception) -> str:
    """The kind of a failure in words; never its text, which may hold the request."""
    import requests

    kinds: tuple[tuple[type[Exception], str], ...] = (
        (_Refused, str(error) if isinstance(error, _Refused) else ""),
        (requests.exceptions.ProxyError, "the proxy of HTTPS_PROXY or HTTP_PROXY does not answer"),
        (requests.exceptions.SSLError, "its certificate is not trusted here (REQUESTS_CA_BUNDLE names another list)"),
        (requests.exceptions.ConnectTimeout, f"no connection within {CONNECT_TIMEOUT_S:g} s"),
        (requests.exceptions.Timeout, f"no answer within {READ_TIMEOUT_S:g} s"),
        (requests.exceptions.ChunkedEncodingError, "its answer broke off"),
        (requests.exceptions.ContentDecodingError, "its answer can't be unpacked"),
        (requests.exceptions.ConnectionError, "no connection (network, name or firewall), or none that lasted"),
    )
    return next((words for kind, words in kinds if isinstance(error, kind)), type(error).__name__)


def _parsed(body: bytes) -> tuple[dict[str, Any], str | None]:
    """The JSON object, and what is wrong with it."""
    try:
        content = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return {}, "something that is not JSON"
    return (content, None) if isinstance(content, dict) else ({}, "JSON that is no object")


def _no_number(name: str) -> float:
    raise ValueError(name)


def _words(content: dict[str, Any], secrets: tuple[Secret, ...]) -> str:
    """What the server says about an error, on one line, with every credential blotted out."""
    said: list[str] = []
    for key in ("error", "message", "detail"):
        value = content.get(key)
        value = value.get("message") if isinstance(value, dict) else value
        if isinstance(value, str) and value not in said:
            said.append(value)
    text = " - ".join(said)
    for secret in secrets:
        for part in {secret.reveal(), *secret.reveal().split()} - {"Bearer", "Basic"}:
            text = text.replace(part, "***")
    return "".join(c if c.isprintable() else " " for c in text)[:_MOST_WORDS]


def _retry_after_s(retry: Any, header: str | None) -> float | None:
    """Seconds, from either form of the header; ``None`` where it has neither."""
    if header is None:
        return None
    try:
        seconds = float(retry.parse_retry_after(header))
    except Exception:  # urllib3's InvalidHeader, an impossible date
        return None
    return seconds if math.isfinite(seconds) else None
