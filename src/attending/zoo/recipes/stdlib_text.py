"""The Python standard library as a text corpus: data that every machine with Python already has.

About twelve megabytes of source code and prose (docstrings, comments and
``pydoc_data/topics.py``, which is most of the language reference).  Some files are held out for
measuring; which ones depends on nothing but their path, so the split is the same on every
machine and needs no list.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Not the library itself (installed packages, caches), or text about text: test suites repeat the
# code they test and hold deliberately broken syntax and encodings.
EXCLUDED_FOLDERS = frozenset({"site-packages", "__pycache__", "test", "tests", "idle_test"})
# Written when Python was built: it records paths of the build machine, not the library.
EXCLUDED_PREFIX = "_sysconfigdata"
LICENSE = "Python Software Foundation License Version 2 (https://docs.python.org/3/license.html)"


@dataclass(frozen=True)
class Document:
    """One source file: its path below the library's root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def size(self) -> int:
        """Length in bytes of the UTF-8 text, the denominator of bits per byte."""
        return len(self.text.encode("utf-8"))

    @property
    def digest(self) -> str:
        """Says whether another machine has this very file."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def stdlib_root() -> Path:
    """The folder that holds the standard library of the running Python."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_documents(root: Path | None = None) -> list[Document]:
    """Every ``.py`` file of the library that is UTF-8 text, in order of path.

    Args:
        root: Another folder to read instead of the running Python's standard library.
    """
    folder = stdlib_root() if root is None else root
    documents = []
    for file in folder.rglob("*.py"):
        relative = file.relative_to(folder)
        if EXCLUDED_FOLDERS.intersection(relative.parts[:-1]):
            continue
        if relative.name.startswith(EXCLUDED_PREFIX):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            documents.append(Document(relative.as_posix(), text))
    if not documents:
        raise ValueError(
            f"expected .py files below {folder}, found none; this Python may be shipped without "
            "its sources, so pass `root`, a folder that holds them"
        )
    return sorted(documents, key=lambda document: document.path)


def is_held_out(path: str, per_mille: int) -> bool:
    """Whether a file is kept from training: a hash of its path falls below ``per_mille``."""
    return int(hashlib.sha256(path.encode("utf-8")).hexdigest(), 16) % 1000 < per_mille


def split(documents: list[Document], per_mille: int) -> tuple[list[Document], list[Document]]:
    """Divide documents into those to train on and those held out."""
    training = [d for d in documents if not is_held_out(d.path, per_mille)]
    held_out = [d for d in documents if is_held_out(d.path, per_mille)]
    if not training or not held_out:
        raise ValueError(
            f"expected files on both sides of the split, got {len(training)} to train on and "
            f"{len(held_out)} held out of {len(documents)}; change held_out_per_mille (now "
            f"{per_mille}) or bring more files"
        )
    return training, held_out
