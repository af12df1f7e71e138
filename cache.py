"""Facts about prepared data that take seconds to find, kept beside it under a fingerprint of all that decides them."""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from atomic import write_atomically
from errors import RunFailed

# Raised when a fact's meaning changes: older files are then never found again.
CACHE_VERSION = 1
# A file has a few bytes per utterance; another vocabulary or setting makes another one.
MAX_FILES = 16

Arrays = Mapping[str, np.ndarray]


class FactCache:
    """Arrays by key, in `DATA_DIR/preflight_cache/*.npz`; no pickle is read or written.

    A folder that cannot be written, or a damaged file, costs the time to find the facts again and nothing else.
    """

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / "preflight_cache"

    def get(self, kind: str, key: object, find: Callable[[], Arrays]) -> Arrays:
        """The arrays of `find()`, from the file where they have been found before.

        Args:
            kind: name of the fact.
            key: JSON values; everything that decides the arrays.
            find: computes them.
        """
        digest = hashlib.sha256(json.dumps([CACHE_VERSION, key], sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{kind}_{digest[:32]}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            arrays = find()
        self._keep(path, arrays)
        return arrays

    def _keep(self, path: Path, arrays: Arrays) -> None:
        # Shared and read-only data is usual on a cluster: then nothing is kept.
        if not os.access(self.folder.parent, os.W_OK):
            return
        try:
            self.folder.mkdir(exist_ok=True)
            write_atomically(path, lambda file: np.savez(file, **arrays))
            files = sorted(self.folder.glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
            for oldest in files[:-MAX_FILES]:
                oldest.unlink(missing_ok=True)
        except (OSError, RunFailed):
            path.unlink(missing_ok=True)
