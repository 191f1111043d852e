"""What a model folder's files are at this moment, in a short text: two equal texts mean the same model."""

from __future__ import annotations

import hashlib
from pathlib import Path

_KINDS = (".safetensors", ".json", ".jinja", ".model")
"""Weights, configurations and tokenizers, templates, tiktoken vocabularies."""


def fingerprint(folder: Path) -> str:
    """Of every file that a model is made of: its name, device, inode, size and both times of change.

    A file that is written anew, in place or by a rename, with its old size and even its old time, gets another time of
    change of its inode, which no program can set. No file is read. A folder that is not there has a fingerprint too:
    opening it raises the error.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix not in _KINDS:
            continue
        try:
            status = path.stat()  # of the file behind a link: the hub's cache is made of links
        except OSError:
            continue  # a dangling link, or gone since it was listed: not what a model is made of
        parts = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(repr((str(path.relative_to(folder)), parts)).encode())
    return digest.hexdigest()
