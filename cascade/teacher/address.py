"""Where an endpoint is, and the key to it, before anything is sent."""

import ipaddress
import os
from urllib.parse import urlsplit

from cascade.errors import UserError
from cascade.recipe.generate import Endpoint
from cascade.secrets import remember


def check_endpoint(endpoint: Endpoint) -> str:
    """The key, or '' where none is asked for; refuses addresses that no key should be sent to.

    Raises:
        UserError: the key's variable is empty, or the address is not https, or of the local network's own kind.
    """
    place = f"generate.endpoint.url: {endpoint.url}"
    try:
        parts = urlsplit(endpoint.url)
        host = parts.hostname or ""
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"{place}: expected https://HOST/v1 (http for this machine)")
    if parts.username or parts.password or parts.query:
        raise UserError(f"{place}: no user, password or query in it; the key goes into an environment variable")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    here = host == "localhost" or (address is not None and address.is_loopback)
    if address is not None and address.is_link_local:
        raise UserError(f"{place}: link-local addresses are not asked")
    if parts.scheme == "http" and not here and not endpoint.allow_http:
        raise UserError(f"{place}: plain http would show key and text to the network; use https, or allow_http: true")
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        raise UserError(f"generate.endpoint.key_env: the environment variable {endpoint.key_env} is not set")
    if not all("!" <= letter <= "~" for letter in key):
        raise UserError(
            f"generate.endpoint.key_env: {endpoint.key_env} holds spaces, line breaks or other signs; no key"
        )
    remember(key)
    return key
