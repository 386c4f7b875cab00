"""Inventories for intersphinx, made of ``inventories/*.txt``: where the pages of other projects describe a name.

A project's own inventory cannot be fetched where there is no network, and is a thousand times what this site refers to.
The first line of a file is the address of a project; each other line is a name, its kind and its page.
"""

import zlib
from pathlib import Path


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Write the inventory of each project, in Sphinx's format 2, and return the ``intersphinx_mapping`` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping: dict[str, tuple[str, str]] = {}
    for path in sorted(Path(__file__).parent.glob("inventories/*.txt")):
        address, *names = path.read_text(encoding="utf-8").splitlines()
        head = f"# Sphinx inventory version 2\n# Project: {path.stem}\n# Version: \n# compressed by zlib\n"
        lines = "".join(f"{name} py:{kind} 1 {page} -\n" for name, kind, page in map(str.split, names))
        inventory = folder / f"{path.stem}.inv"
        inventory.write_bytes(head.encode() + zlib.compress(lines.encode()))
        mapping[path.stem] = address, str(inventory)
    return mapping
