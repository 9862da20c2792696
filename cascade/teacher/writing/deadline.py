"""Requests that end at a moment. The timeouts of `requests` bound the silence between two bytes, not their number."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import requests
from requests.adapters import HTTPAdapter


class PromptSession(requests.Session):
    """A session for one thread, whose connections another can cut off.

    `require(address)` may refuse what a name has led to, before anything is sent there (a proxy's is its own to know).
    """

    def __init__(self, require: Callable[[str], None]) -> None:
        super().__init__()
        self.auth = lambda request: request  # else a .netrc's password goes along
        self._adapter = _Watched(require)
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

    def __init__(self, require: Callable[[str], None]) -> None:
        self.sockets: WeakSet[socket.socket] = WeakSet()
        self.require = require
        super().__init__()

    def cut(self) -> None:
        for one in list(self.sockets):
            with suppress(OSError):  # closed meanwhile
                one.shutdown(socket.SHUT_RDWR)  # unlike a close, it wakes the thread that reads

    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        super().init_poolmanager(*arguments, **named)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, *arguments: Any, **named: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **named)
        self._watch(manager)
        return manager

    def _watch(self, manager: Any) -> None:
        kinds = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {scheme: self._watching(kind) for scheme, kind in kinds.items()}

    def _watching(self, pool: Any) -> Any:
        return _watching(pool, self.sockets, self.require)


def _watching(pool: Any, made: WeakSet[socket.socket], require: Callable[[str], None]) -> Any:
    """The class of connection pools, whose sockets are put into `made`, and their addresses looked at."""

    def opened(self: Any) -> socket.socket:
        own: socket.socket = pool.ConnectionCls._new_conn(self)
        made.add(own)
        if self.proxy is None:
            try:
                require(str(own.getpeername()[0]))
            except BaseException:
                own.close()
                raise
        return own

    def connect(self: Any) -> None:
        pool.ConnectionCls.connect(self)
        made.add(self.sock)  # for https another one, around the first

    own = {"connect": connect, "_new_conn": opened}
    connection = type(pool.ConnectionCls.__name__, (pool.ConnectionCls,), own)
    return type(pool.__name__, (pool,), {"ConnectionCls": connection})
