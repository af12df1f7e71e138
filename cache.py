"""Facts about prepared data that take seconds to find, kept beside it under a fingerprint of all that decides them."""

import contextlib
import hashlib
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

# Raised when a fact's meaning changes: older files are then never found again.
CACHE_VERSION = 2
# A file has a few bytes per utterance; another vocabulary or setting makes another one.
MAX_FILES = 16
UNFINISHED = ".unfinished"
# What numpy and zipfile raise over a file that is missing, damaged or foreign.
UNREADABLE = (OSError, ValueError, TypeError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)

Arrays = Mapping[str, np.ndarray]


class FactCache:
    """Arrays by key, in `DATA_DIR/preflight_cache/*.npz`; no pickle is read or written.

    A folder that cannot be written, as shared data on a cluster often is, or a damaged file costs the time to find the
    facts again and nothing else.
    """

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / "preflight_cache"

    def get(self, kind: str, key: object, find: Callable[[], Arrays], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """The arrays of `find()`, from the file where they have been found before.

        Args:
            kind: name of the fact.
            key: JSON values; everything that decides the arrays.
            find: computes them.
            shapes: of the arrays by name; a file with others is taken as absent.
        """
        digest = hashlib.sha256(json.dumps([CACHE_VERSION, key], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{kind}_{digest[:32]}.npz"
        with contextlib.suppress(*UNREADABLE), np.load(path, allow_pickle=False) as file:
            kept = {name: file[name] for name in shapes}
            if all(kept[name].shape == shape for name, shape in shapes.items()):
                return kept
        arrays = find()
        assert {name: array.shape for name, array in arrays.items()} == dict(shapes)
        self._keep(path, arrays)
        return arrays

    def _keep(self, path: Path, arrays: Arrays) -> None:
        """Write the file under a name that no other run has, on this machine or another, then rename it.

        It need not survive a power failure, so nothing waits for the disk.
        """
        unfinished = path.with_suffix(f".{os.getpid()}_{uuid.uuid4().hex[:8]}{UNFINISHED}")
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            try:
                with unfinished.open("wb") as file:
                    np.savez(file, **arrays)
                unfinished.replace(path)
            finally:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)
            # What killed runs left unfinished grows old and goes too.
            files = sorted(self.folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
            for oldest in files[:-MAX_FILES]:
                oldest.unlink()
