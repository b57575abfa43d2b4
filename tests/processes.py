"""What tests of several processes share; light to import, since each process imports it."""

import socket


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
