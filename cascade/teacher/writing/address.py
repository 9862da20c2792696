"""Checks an endpoint's address and finds its key, before anything is sent.

A recipe may come from a stranger: it can neither name a machine that only this network reaches, nor have one of this
machine's other keys sent to a place of its choice.
"""

import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

from cascade.recipe.generate import Endpoint
from cascade.runtime.errors import UserError
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.runtime.secrets import remember

KEY_PREFIX = "CASCADE_"
"""Environment variables that begin so hold keys that the user has meant for the endpoints of recipes."""

SERVICES = {
    "ANTHROPIC_API_KEY": "anthropic.com",
    "CEREBRAS_API_KEY": "cerebras.ai",
    "COHERE_API_KEY": "cohere.com",
    "DEEPSEEK_API_KEY": "deepseek.com",
    "FIREWORKS_API_KEY": "fireworks.ai",
    "GEMINI_API_KEY": "generativelanguage.googleapis.com",
    "GROQ_API_KEY": "groq.com",
    "HF_TOKEN": "router.huggingface.co",
    "MISTRAL_API_KEY": "mistral.ai",
    "NVIDIA_API_KEY": "nvidia.com",
    "OPENAI_API_KEY": "openai.com",
    "OPENROUTER_API_KEY": "openrouter.ai",
    "TOGETHER_API_KEY": "together.xyz",
    "XAI_API_KEY": "x.ai",
}
"""Environment variable of a service's key -> the service's domain, the only place that the key is sent to."""

_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_PLAIN = re.compile(r"[!-~]+")
_LOOPBACK = re.compile(r"127(?:\.\d{1,3}){3}")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_endpoint(endpoint: Endpoint, permissions: Permissions = NO_PERMISSIONS, *, needs_key: bool = True) -> str:
    """The endpoint's key, '' where none is named or needed; refuses addresses that no key should be sent to.

    Raises:
        UserError: the address is not https, or on a network that is not allowed; the key's variable is empty, or not
            for that address.
    """
    place = f"generate.endpoint.url: {endpoint.url}"
    try:
        parts = urlsplit(endpoint.url)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"{place}: expected https://HOST/v1 (http for this machine)")
    if parts.username or parts.password or parts.query:
        raise UserError(f"{place}: no user, password or query in it; the key goes into an environment variable")
    if not _HOST.fullmatch(host) or not _PLAIN.fullmatch(endpoint.url):
        raise UserError(f"{place}: expected a host's name of letters, digits, '.' and '-', and no odd signs")
    here = is_here(endpoint.url)
    for text in _addresses(host, port):
        require_address(text, endpoint.url, permissions)
    if parts.scheme == "http" and not here and not endpoint.allow_http:
        raise UserError(f"{place}: plain http would show key and text to the network; use https, or allow_http: true")
    return _key(endpoint.key_env, host, here) if endpoint.key_env and needs_key else ""


def is_here(url: str) -> bool:
    """Whether a url names this machine; any other name can lead anywhere, and elsewhere a moment later."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    return host in ("localhost", "::1") or _LOOPBACK.fullmatch(host) is not None


def require_address(text: str, url: str, permissions: Permissions = NO_PERMISSIONS) -> None:
    """Refuse an address that a url's host stands for, or that was connected to.

    Raises:
        UserError: the address is link-local, or of another network than the url says.
    """
    here = is_here(url)
    address: _Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        address = inner or address
    place = f"generate.endpoint.url: {url}: {address}"
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        raise UserError(f"{place} is a link-local, unspecified or multicast address; those are not asked")
    if address.is_loopback != here:
        raise UserError(
            f"{place} is {'not ' if here else ''}this machine; write localhost for it, and for nothing else"
        )
    private = not address.is_global or getattr(address, "is_site_local", False)
    if private and not here and not permissions.private_networks:
        raise UserError(f"{place} is on a private network; where you trust the recipe, give --allow-private")


def _addresses(host: str, port: int | None) -> list[str]:
    """The addresses that a host's name stands for; none where this machine cannot tell (offline, behind a proxy)."""
    try:
        entries = socket.getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(entry[4][0]) for entry in entries]


def _key(name: str, host: str, here: bool) -> str:
    """The key in an environment variable, if it may be sent to the host."""
    place = f"generate.endpoint.key_env: {name}"
    owner = SERVICES.get(name)
    fits = name.startswith(KEY_PREFIX) or (owner is not None and (host == owner or host.endswith(f".{owner}")))
    if not (fits or here):
        whose = f"is the key to {owner}" if owner else "may be the key to something else"
        raise UserError(f"{place} {whose} and is not sent to {host}; put that server's key into {KEY_PREFIX}KEY")
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"generate.endpoint.key_env: the environment variable {name} is not set")
    if not all("!" <= letter <= "~" for letter in key):
        raise UserError(f"{place} holds spaces, line breaks or other signs; no key")
    remember(key)
    return key
