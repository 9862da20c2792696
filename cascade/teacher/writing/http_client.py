"""Requests to one endpoint: each ends at its deadline, follows no redirect and reaches no unchecked address."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from anyio import fail_after
from anyio.from_thread import BlockingPortal, start_blocking_portal

from cascade.runtime.errors import UserError
from cascade.teacher.writing.address import is_here

_MAX_BYTES = 64_000_000
"""A response with a longer body, counted after decompression, is dropped."""

_CONNECT_SECONDS = 30.0
"""A connection that takes longer has failed, even where the request may take longer as a whole."""

_CONNECTED = "connection.connect_tcp"
"""What httpx2 calls the opening of a connection in its `trace` extension."""


@dataclass(frozen=True)
class Response:
    """What a server has sent within the time that it had."""

    status: int
    """0 where no whole response came."""
    headers: Mapping[str, str]
    """Their names are read without regard to case."""
    body: bytes
    problem: str = ""
    """Why no whole response came."""


class HTTPClient:
    """Sends requests to one url; several threads may call `post` at a time.

    The requests run in an event loop of the client's own thread, where a deadline cancels whatever a request waits for:
    the address, a connection, the next byte.
    """

    def __init__(
        self, client: httpx2.AsyncClient, portal: BlockingPortal, url: str, require_peer: Callable[[str], None]
    ) -> None:
        self.client, self.portal, self.url, self.require_peer = client, portal, url, require_peer

    def post(self, content: bytes, headers: Mapping[str, str], *, seconds: float) -> Response:
        """The response to a JSON body, whatever its status, or the reason why there is none after `seconds`.

        Raises:
            UserError: the url or a header cannot be sent, or `require_peer` refuses the address that was connected to.
        """
        return self.portal.call(self._post, content, headers, seconds)

    async def _post(self, content: bytes, headers: Mapping[str, str], seconds: float) -> Response:
        try:
            with fail_after(seconds):
                return await self._exchange(content, headers, min(seconds, _CONNECT_SECONDS))
        except TimeoutError:
            return Response(0, {}, b"", f"no whole answer within {seconds:g} seconds")
        except (httpx2.LocalProtocolError, httpx2.InvalidURL) as error:  # their texts may show the key
            raise UserError(f"{self.url}: cannot be asked ({type(error).__name__}); look at url and key") from None
        except httpx2.RequestError as error:
            return Response(0, {}, b"", f"{type(error).__name__}: {_reason(error)}")

    async def _exchange(self, content: bytes, headers: Mapping[str, str], connect_seconds: float) -> Response:
        request = self.client.build_request(
            "POST",
            self.url,
            content=content,
            headers={"Content-Type": "application/json"} | dict(headers),
            timeout=httpx2.Timeout(None, connect=connect_seconds),
            extensions={"trace": self._peer_check()},
        )
        response = await self.client.send(request, stream=True)
        try:
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > _MAX_BYTES:
                    return Response(0, {}, b"", f"its answer is larger than {_MAX_BYTES:,} bytes")
            return Response(response.status_code, response.headers, bytes(body))
        finally:
            await response.aclose()

    def _peer_check(self) -> Callable[[str, dict[str, Any]], Any]:
        """A `trace` that hands the address of a new connection to `require_peer`, before anything is sent there.

        A connection to a proxy is not checked: what the url's name stands for is the proxy's to know.
        """
        host = httpx2.URL(self.url).raw_host.decode()
        direct = True

        async def check(event: str, info: dict[str, Any]) -> None:
            nonlocal direct
            if event == f"{_CONNECTED}.started":
                direct = info["host"] == host
            elif event == f"{_CONNECTED}.complete" and direct:
                stream = info["return_value"]
                try:
                    self.require_peer(str(stream.get_extra_info("server_addr")[0]))
                except BaseException:
                    await stream.aclose()
                    raise

        return check


@contextmanager
def http_client(url: str, require_peer: Callable[[str], None], *, max_connections: int) -> Iterator[HTTPClient]:
    """A client for one url; leaving it with an exception ends the requests that are under way.

    Proxies and certificates are those of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY; SSL_CERT_FILE,
    SSL_CERT_DIR, else the system's). A .netrc is not read: no key but the endpoint's own is sent.

    Raises:
        UserError: the environment names a proxy or certificates that cannot be used.
    """
    limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
    try:
        # What is on this machine is asked directly: a proxy would see its key.
        direct = httpx2.AsyncHTTPTransport(limits=limits) if is_here(url) else None
        client = httpx2.AsyncClient(limits=limits, transport=direct)
    except ImportError as error:
        raise UserError(
            f"{url}: the environment (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY) names a SOCKS proxy; "
            "pip install 'httpx2[socks]', or give an http proxy"
        ) from error
    except OSError as error:  # of ssl, too
        raise UserError(f"{url}: the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read: {error}") from error
    except (ValueError, httpx2.InvalidURL):  # their texts may show a proxy's password
        raise UserError(f"{url}: ALL_PROXY, HTTPS_PROXY or HTTP_PROXY in the environment is no proxy's url") from None
    with start_blocking_portal() as portal:  # cancels what is under way when an exception leaves it
        yield HTTPClient(client, portal, url, require_peer)
        portal.call(client.aclose)


def _reason(error: BaseException) -> str:
    """What was wrong in the first place (connection refused, an unknown certificate), as the system says it."""
    cause: BaseException | None = error
    text = str(error)
    while cause is not None:
        text = str(cause) or text
        if isinstance(cause, ConnectionError) and cause.errno:  # asyncio's own text leaves the reason out
            text = f"[Errno {cause.errno}] {os.strerror(cause.errno)}"
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return text
