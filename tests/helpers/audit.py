"""What must not be done while a folder by someone else is read, seen by an audit hook of Python."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# Python itself, what is installed and this repository; what the system says of itself.
_OWN = sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), str(Path(__file__).parents[2])
_SYSTEM = "/proc/", "/sys/", "/etc/", "/dev/null"
_FORBIDDEN = (
    *("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.remove", "os.rename", "os.mkdir"),
    *("socket.connect", "socket.getaddrinfo", "socket.gethostby", "urllib."),
)
_watches: list[tuple[str, list[str]]] = []


@contextmanager
def watched(folder: Path) -> Generator[list[str]]:
    """What is done meanwhile that must not be: to write, run, unpickle, connect, or read elsewhere than in ``folder``.

    Python, the installed packages and this repository may be read.
    """
    done: list[str] = []
    # Else Python may write the bytecode of a package.
    with mock.patch.object(sys, "dont_write_bytecode", True):
        _watches.append((str(folder.resolve()), done))
        try:
            yield done
        finally:
            _watches.pop()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for folder, done in _watches:
        if _is_bad(event, arguments, folder):
            done.append(f"{event} {arguments!r}"[:500])


def _is_bad(event: str, arguments: tuple[Any, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str | bytes):
            return False
        path = os.path.realpath(os.fsdecode(path))
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND):
            return path != "/dev/null"
        is_inside = path.startswith(folder + os.sep)
        return path.endswith((".py", ".bin", ".pkl")) if is_inside else not path.startswith((*_OWN, *_SYSTEM))
    if event == "exec":
        return arguments[0].co_filename.startswith(folder)
    return event.startswith(_FORBIDDEN)


# A hook stays for as long as the process.
sys.addaudithook(_hook)
