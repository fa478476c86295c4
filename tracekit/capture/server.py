"""A running server: requests with timeouts and retries, and what kind of server it is."""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

from tracekit.errors import SourceError, UsageError

Api = Literal["chat", "completions", "generate"]
"""An endpoint: two of the OpenAI API, and SGLang's own."""

LARGEST = 1 << 30
"""Longest response that is read, in bytes."""
_PIECE = 1 << 20
_LONGEST_WAIT = 60.0
_PATHS: dict[Api, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "generate": "/generate",
}
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class RefusedError(SourceError):
    """The server will not do what is asked of it, whatever the request: there is no point in going on."""


class _RequestError(Exception):
    """A request failed; it may be worth another try."""

    def __init__(self, reason: str, *, again: bool, wait: float | None = None, status: int | None = None) -> None:
        super().__init__(reason)
        self.again = again
        self.wait = wait
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow nothing: the key and the prompts are for the server that was named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Server:
    """One server; may be used by several threads at once."""

    def __init__(self, url: str, *, timeout: float, retries: int, backoff: float, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"the URL {url!r}", expected="one such as http://localhost:8000")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise UsageError(
                "the URL holds more than an address and a path",
                expected="one such as http://localhost:8000",
                remedy="A key goes into an environment variable: --api-key-env NAME",
            )
        try:
            _ = parts.port
        except ValueError as error:
            raise UsageError(f"the URL {url!r}: {error}", expected="one such as http://localhost:8000") from None
        path = parts.path.rstrip("/")
        self.api = next((api for api, end in _PATHS.items() if path.endswith(end)), None)
        """The endpoint that the URL itself names."""
        path = path.removesuffix(_PATHS[self.api]) if self.api else path.removesuffix("/v1")
        self._base = f"{parts.scheme}://{parts.netloc}{path}"
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._key = api_key
        self._opener = urllib.request.build_opener(_NoRedirect)

    def endpoint(self, api: Api) -> str:
        """Return the address of an endpoint."""
        return self._base + _PATHS[api]

    def identify(self, model: str | None) -> tuple[str | None, str]:
        """Return the engine (``vllm``, ``sglang`` or None) and the name of the model.

        Raises
        ------
        SourceError
            The server cannot be reached, or serves several models and none is named.
        """
        where = f"{self._base}/v1/models"
        try:
            answer = self._patiently(where, None, threading.Event())
        except _RequestError as error:
            if model is not None and error.status in (404, 405):
                return None, model
            raise self._refused(error, where) from None
        entries = answer.get("data") if isinstance(answer, dict) else None
        listed = [e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)] if entries else []
        owners = {e.get("owned_by") for e in listed}
        engine = next((name for name in ("vllm", "sglang") if name in owners), None)
        names = [e["id"] for e in listed]
        if model is not None:
            if names and model not in names:
                raise SourceError(f"serves {', '.join(names[:8])}", where=where, expected=f"a model named {model!r}")
            return engine, model
        if len(names) != 1:
            raise SourceError(
                f"serves {', '.join(names[:8])}" if names else "names no model",
                where=where,
                expected="one model",
                remedy="Name one with --model",
            )
        return engine, names[0]

    def ask(self, api: Api, body: Mapping[str, Any], stop: threading.Event) -> dict[str, Any]:
        """Return the response to one request, after as many tries as it takes and are allowed.

        Raises
        ------
        RefusedError
            No request would succeed.
        SourceError
            This one did not.
        """
        where = self.endpoint(api)
        try:
            answer = self._patiently(where, body, stop)
        except _RequestError as error:
            if error.status in (301, 302, 303, 307, 308, 401, 403, 404, 405):
                raise self._refused(error, where) from None
            raise SourceError(self._safe(str(error)), where=where) from None
        if isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        if not isinstance(answer, dict):
            raise SourceError(f"answered with a {type(answer).__name__}", where=where, expected="an object")
        return answer

    def _patiently(self, where: str, body: Mapping[str, Any] | None, stop: threading.Event) -> Any:
        jitter = random.Random(json.dumps(body, sort_keys=True))
        for tried in range(self._retries + 1):
            try:
                return self._once(where, body)
            except _RequestError as error:
                if not error.again or tried == self._retries or stop.is_set():
                    if tried:
                        raise _RequestError(
                            f"{error} (after {tried + 1} tries)", again=False, status=error.status
                        ) from None
                    raise
                wait = self._backoff * 2**tried * (0.75 + jitter.random() / 2)
                if stop.wait(min(_LONGEST_WAIT, max(wait, error.wait or 0))):
                    raise
        raise AssertionError

    def _once(self, where: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(where, data, headers)
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = self._body(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._status(error) from None
        except TimeoutError:
            raise _RequestError(f"no answer within {self._timeout:g} s", again=True) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _RequestError(f"no answer within {self._timeout:g} s", again=True) from None
            raise _RequestError(f"cannot be reached ({error.reason})", again=True) from None
        except (http.client.HTTPException, OSError) as error:
            raise _RequestError(f"the connection broke ({error or type(error).__name__})", again=True) from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _RequestError(f"answered with something that is not JSON ({error})", again=True) from None

    def _body(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        length = response.headers.get("Content-Length")
        pieces, size = [], 0
        while piece := response.read1(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST:
                raise _RequestError(f"answered with more than {LARGEST} bytes", again=False)
            if time.monotonic() > deadline:
                raise TimeoutError
        if length is not None and length.isdecimal() and size < int(length):
            raise _RequestError(f"the answer was cut off after {size} of {length} bytes", again=True)
        return b"".join(pieces)

    def _status(self, error: urllib.error.HTTPError) -> _RequestError:
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        location = error.headers.get("Location") if 300 <= error.code < 400 else None
        detail = f"redirects to {location}, which is not followed" if location else _message(text)
        wait = _seconds(error.headers.get("Retry-After"))
        reason = f"status {error.code} {error.reason}" + (f": {detail}" if detail else "")
        return _RequestError(reason, again=error.code in _AGAIN, wait=wait, status=error.code)

    def _refused(self, error: _RequestError, where: str) -> RefusedError:
        remedies = {
            401: "Name the environment variable that holds the key with --api-key-env",
            403: "Name the environment variable that holds the key with --api-key-env",
            404: "Is this the address of a vLLM or SGLang server, and does it have this endpoint? See --api",
            405: "Is this the address of a vLLM or SGLang server, and does it have this endpoint? See --api",
            None: "Is the server running, and is this its address?",
        }
        return RefusedError(self._safe(str(error)), where=where, remedy=remedies.get(error.status))

    def _safe(self, text: str) -> str:
        """Take the key out of what the server says."""
        return text.replace(self._key, "***") if self._key else text


def routing_of(response: Mapping[str, Any]) -> bool:
    """Whether a response carries routing, wherever its engine puts it."""
    places: list[Any] = [response]
    found = response.get("choices")
    if isinstance(found, list):
        places += found
    for place in list(places):
        if isinstance(place, dict):
            places += [place.get(key) for key in ("meta_info", "sglext", "sgl_ext", "nvext")]
    return any(isinstance(place, dict) and place.get("routed_experts") for place in places)


def _message(text: str) -> str:
    """Return what a body of an error says, in one short line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return " ".join(str(value).split())[:300]


def _seconds(value: str | None) -> float | None:
    """Return the seconds of a ``Retry-After``, which may be a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value[:9])
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None
