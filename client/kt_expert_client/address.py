"""Where a server is, as users write it, and what is wrong with an address that leads nowhere."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from kt_expert_client.errors import InvalidRequest, ServerUnavailable

DEFAULT_PORT = 7443
_MAX_PORT = 65535
_HOST_PORT = re.compile(r"(?P<host>[^\[\]:/\s]+|\[[0-9A-Fa-f:.%\w]+\]):(?P<port>\d{1,5})")
_FORMS = f"expected host:port, [IPv6]:port, grpcs://host:port or unix:/path (the server's default port is {DEFAULT_PORT})"
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS_VARIABLES = ("no_grpc_proxy", "no_proxy")  # of both kinds, gRPC takes the first that is set, though it be empty


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """`target` is what gRPC connects to. `secure`: with TLS."""

    text: str
    target: str
    host: str
    port: int
    secure: bool

    @classmethod
    def parse(cls, text: str) -> ServerAddress:
        """Raises InvalidRequest with what is wrong."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            if not path.startswith("/"):
                raise InvalidRequest(f"address {text!r} is not unix: with an absolute path; {_FORMS}")
            return cls(text, f"unix:{path}", "", 0, secure=False)
        scheme, separator, rest = text.partition("://")
        if separator and scheme not in ("grpc", "grpcs"):
            raise InvalidRequest(f"address {text!r} begins with {scheme}://, and a kt-expert-server speaks gRPC; {_FORMS}")
        bare = rest if separator else text
        if bare.endswith("/"):
            raise InvalidRequest(f"address {text!r} ends with a slash; write {text.rstrip('/')!r}")
        match = _HOST_PORT.fullmatch(bare)
        if match is None or not 0 < int(match["port"]) <= _MAX_PORT:
            lacks = f"address {text!r} has no port" if bare and ":" not in bare else f"address {text!r} cannot be read"
            raise InvalidRequest(f"{lacks}; {_FORMS}")
        return cls(text, bare, match["host"].strip("[]"), int(match["port"]), secure=scheme == "grpcs" and bool(separator))

    @property
    def is_local(self) -> bool:
        """On this machine: never through a proxy, and nobody listens in."""
        if not self.host:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")

    @property
    def proxy_variable(self) -> str | None:
        """The variable that names the proxy gRPC goes through to this address; None where it goes there itself."""
        if self.is_local:
            return None
        exceptions = next((os.environ[name] for name in _EXCEPTIONS_VARIABLES if name in os.environ), "")
        if any(_covers(entry.strip(), self.host) for entry in exceptions.split(",") if entry.strip()):
            return None
        name = next((name for name in _PROXY_VARIABLES if name in os.environ), None)
        return name if name is not None and urlsplit(os.environ[name]).scheme == "http" else None

    def describe_failure(self, details: str) -> str:
        """What most likely is the matter, where gRPC could not connect and said `details`."""
        proxy = self.proxy_variable
        if proxy is not None:
            url = _without_password(os.environ[proxy])
            return (
                f"connections to {self.text} go through the proxy that {proxy} names ({url}); if that is not meant, set "
                f"no_proxy={self.host} ({details})"
            )
        if "http1" in details.lower() or "http/1" in details.lower():
            return f"what answers at {self.text} speaks HTTP/1; is it the metrics port? ({details})"
        return details

    def find(self) -> None:
        """Raises ServerUnavailable for an unknown host name or a socket that is not there. A proxy looks names up itself."""
        if self.proxy_variable is not None:
            return
        if not self.host:
            path = self.target.removeprefix("unix:")
            if not os.path.exists(path):
                raise ServerUnavailable(f"there is no socket {path}; is the server started, and with --listen {self.text}?")
            return
        try:
            socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise ServerUnavailable(f"the host name {self.host!r} of {self.text} is not known: {error.strerror}") from error
        except UnicodeError as error:
            raise InvalidRequest(f"the host name {self.host!r} of {self.text} is none") from error


def is_refused(address: ServerAddress, timeout_s: float = 2.0) -> bool:
    """Whether the host answers that nothing listens on the port. Behind a proxy nobody can tell."""
    if not address.host or address.proxy_variable is not None:
        return False
    try:
        with socket.create_connection((address.host, address.port), timeout_s):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def _covers(exception: str, host: str) -> bool:
    """Whether an entry of no_proxy goes for a host, as gRPC reads it: an ending of names, or a network of addresses."""
    if host.lower().endswith(exception.lower()):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(exception, strict=False)
    except ValueError:
        return False


def _without_password(proxy: str) -> str:
    parts = urlsplit(proxy)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
