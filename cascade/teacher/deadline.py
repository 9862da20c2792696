"""Requests that end at a moment. The timeouts of `requests` bound the silence between two bytes, not their number."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import requests
from requests.adapters import HTTPAdapter


class PromptSession(requests.Session):
    """A session for one thread, whose connections another can cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = lambda request: request  # else a .netrc's password goes along
        self._adapter = _Watched()
        self.mount("https://", self._adapter)
        self.mount("http://", self._adapter)

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[threading.Event]:
        """What is under way in this session after so long fails as a broken connection does; the event tells so."""
        over = threading.Event()

        def cut() -> None:
            over.set()
            self._adapter.cut()

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield over
        finally:
            timer.cancel()


class _Watched(HTTPAdapter):
    """Knows the connections that it has made."""

    def __init__(self) -> None:
        self.connections: WeakSet[Any] = WeakSet()
        super().__init__()

    def cut(self) -> None:
        for connection in list(self.connections):
            if connection.sock is not None:
                with suppress(OSError):  # closed meanwhile
                    # Unlike a close, it wakes the thread that reads.
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        super().init_poolmanager(*arguments, **named)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, *arguments: Any, **named: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **named)
        self._watch(manager)
        return manager

    def _watch(self, manager: Any) -> None:
        kinds = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {scheme: _watching(kind, self.connections) for scheme, kind in kinds.items()}


def _watching(pool: Any, made: WeakSet[Any]) -> Any:
    """The class of connection pools, whose connections are put into `made`."""

    def connect(self: Any) -> None:
        made.add(self)
        pool.ConnectionCls.connect(self)

    connection = type(pool.ConnectionCls.__name__, (pool.ConnectionCls,), {"connect": connect})
    return type(pool.__name__, (pool,), {"ConnectionCls": connection})
