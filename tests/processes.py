"""Helpers for tests of several processes; light to import, since each process imports it."""

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

BOOT_ID = "/proc/sys/kernel/random/boot_id"
"""File by which XLA identifies a host."""


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def become_host(number: int, folder: Path) -> None:
    """Give this process and its children a boot id of their own, in a private mount namespace.

    Raises:
      OSError: the process may not do that.
    """
    file = folder / f"boot_id{number}"
    file.write_text(f"{number:08}-1111-2222-3333-444444444444\n")
    new_namespace, bind, private, recursive = 0x20000, 0x1000, 0x40000, 0x4000
    libc = ctypes.CDLL(None, use_errno=True)
    calls = [
        lambda: libc.unshare(new_namespace),
        lambda: libc.mount(b"none", b"/", None, private | recursive, None),
        lambda: libc.mount(os.fsencode(file), BOOT_ID.encode(), None, bind, None),
    ]
    for call in calls:
        if call():
            raise OSError(
                ctypes.get_errno(), f"no private boot id: {os.strerror(ctypes.get_errno())}"
            )


def why_not_hosts(folder: Path) -> str:
    """Return why `become_host` fails on this machine; empty if it works."""
    command = (
        "import pathlib; from tests.processes import become_host;"
        f" become_host(0, pathlib.Path({str(folder)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    return "".join(done.stderr.splitlines()[-1:]) if done.returncode else ""
