"""The address of the page: this machine only, or others with a password."""

import ipaddress
import socket

from moddistill.errors import UserError, invalid


def listen(host: str, port: int, password: str) -> socket.socket:
    """Returns a socket that listens on a port of a host; port 0 is any that is free.

    Raises:
      UserError: the host is not this machine alone and there is no password, it has no such
        address, or the port is in use.
    """
    if not password and not _is_loopback(host):
        expected = "a loopback address such as 127.0.0.1, or --password with it"
        raise invalid("--host", host, expected)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]  # which repeats the address
        raise UserError(
            f"--host, --port: expected a free port, got {host}:{port}: {reason}"
        ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
