"""Fixtures: small prepared sets without a synthesiser, tiny models, and where real speech lies."""

import contextlib
import gc
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

# Each of the two workers has one of two cores; with more threads they would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, DynamoBackend

import roundtrip
import train
from audio import SAMPLE_RATE_HZ, Clip, measure
from corpora import SourceRow
from errors import exit_status
from integrity import SCHEMA_VERSION, sealed
from pretrained import _quiet_transformers
from shards import PartWriter
from stopping import end_loaders

REPOSITORY = Path(__file__).parent.parent


def pytest_sessionfinish() -> None:
    """End loading processes that a test has left: they do not hear SIGTERM, and Python would wait for them for ever."""
    end_loaders()


os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Two convolutions with a frame of 20 ms, one layer: a step takes milliseconds.
TINY_MODEL = {
    "model_type": "wav2vec2",
    "conv_dim": [16, 16],
    "conv_kernel": [20, 16],
    "conv_stride": [20, 16],
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
}


# Every change of the waveform, for --config or Augmentation.
AUGMENTATION = {
    "augment_speed": [0.9, 1.0, 1.1],
    "augment_reverb": ["simulated"],
    "augment_noise": ["white", "pink", "babble"],
    "augment_band_hz": [2_500.0, 7_500.0],
    "augment_volume_db": 6.0,
    "augment_gap_seconds": 0.1,
}


# The other kind of encoder: group norm over the first convolution, layer norm behind each block.
TINY_GROUP_NORM_MODEL = TINY_MODEL | {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}

# Large random weights: an untrained model that says something else in every frame, and nothing near a tie.
TALKATIVE = {"initializer_range": 0.5}


def write_recipe(path: Path, data_dir: Path, **settings: object) -> Path:
    """A recipe for --config: the tiny model, five updates of eight utterances, a row of the log for each."""
    recipe = {
        "data_dir": str(data_dir),
        "model_config": TINY_MODEL | TALKATIVE,
        "vocabulary": "train",
        "freeze_feature_encoder": False,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "max_steps": 5,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
    }
    path.write_text(yaml.safe_dump(recipe | settings))
    return path


def run_command(main: Callable[[], None], *arguments: object) -> int:
    """A command of the program in this process, its name and flags as given; the status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, arguments)))
        return exit_status(main)


def train_two_updates(folder: Path, **settings: object) -> Path:
    """A model that says something else about every clip, from folder / data: folder / run / model."""
    base = {"max_steps": 2, "model_config": TINY_GROUP_NORM_MODEL | TALKATIVE, "do_predict": False}
    recipe = write_recipe(folder / "recipe.yaml", folder / "data", **base | settings)
    assert run_command(train.main, "train.py", "--config", recipe, "--output_dir", folder / "run") == 0
    return folder / "run" / "model"


class Seconds:
    """A clock that moves only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def alone(
    distributed_type: DistributedType = DistributedType.NO, backend: DynamoBackend = DynamoBackend.NO
) -> SimpleNamespace:
    """An Accelerator that sees one process."""
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
    return SimpleNamespace(num_processes=1, distributed_type=distributed_type, state=state)


def write_part(
    folder: Path,
    rows: Sequence[tuple[str, np.ndarray, str, str]],
    rows_per_batch: int = 3,
    metadata: Sequence[dict[str, str]] = (),
) -> None:
    """A shard part as prepare.py writes it, from (id, int16 audio, text, speaker) rows and columns of the corpus."""
    folder.mkdir(parents=True)
    with (folder / "data.arrow").open("wb") as file:
        writer = PartWriter(file, list(metadata[0]) if metadata else [])
        for number, (utterance_id, samples, text, speaker) in enumerate(rows, 1):
            clip = Clip(samples, measure(samples), SAMPLE_RATE_HZ, hashlib.sha256(samples.tobytes()).hexdigest())
            of_corpus = metadata[number - 1] if metadata else {}
            writer.add(SourceRow(utterance_id, None, "", text, speaker, of_corpus), clip)
            if number % rows_per_batch == 0:
                writer._write_batch()
        facts = writer.finish() | {"schema_version": SCHEMA_VERSION}
    (folder / "part.json").write_text(sealed(facts))
    # prepare.py's mark of a finished preparation, with the parts of each split.
    data_dir = folder.parents[1]
    parts = {split: {"parts": len(list((data_dir / split).glob("part_*")))} for split in ("train", "dev", "test")}
    facts = {"schema_version": SCHEMA_VERSION, "flags": ["--corpus", "corpus"], "splits": parts}
    (data_dir / "prepare.json").write_text(sealed(facts))


def make_rows(
    count: int, seed: int, speakers: Sequence[str] = ("ann", "ben")
) -> list[tuple[str, np.ndarray, str, str]]:
    """Noise of 0.3 to 1.2 s with two to six letters each; the letter decides the tone under the noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        letters = rng.choice(list("ABCDE"), rng.integers(2, 7))
        tones = [np.sin(np.arange(3_000) * 0.05 * (1 + "ABCDE".index(letter))) for letter in letters]
        signal = np.concatenate(tones) * 8_000 + rng.normal(0, 300, 3_000 * len(letters))
        text = "".join(letters[:2]) + (" " + "".join(letters[2:]) if len(letters) > 2 else "")
        rows.append((f"u{seed}_{index}", signal.astype(np.int16), text, speakers[index % len(speakers)]))
    return rows


CHECK_IN_CLEAN_PROCESS = roundtrip.check_in_clean_process


def check_in_this_process(folder: Path, probe: Path) -> list[roundtrip.Failure]:
    """The checks of a saved model without the 5 to 10 s that a new process costs."""
    with _quiet_transformers():
        return roundtrip.check_folder(folder, probe)


@pytest.fixture(scope="session", autouse=True)
def no_clean_process() -> Iterator[None]:
    """Runs in this process check there what they save, by the very same checks; see `clean_process`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roundtrip, "check_in_clean_process", check_in_this_process)
        yield


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved model is opened in a new process, as for a user."""
    monkeypatch.setattr(roundtrip, "check_in_clean_process", CHECK_IN_CLEAN_PROCESS)


def forget_processes() -> None:
    """Accelerate keeps its state in singletons, which a process of the user has once."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process that a user starts without a launcher, with one thread."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name == "WORLD_SIZE"]:
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget_processes()


@contextlib.contextmanager
def training() -> Iterator[Callable[..., int]]:
    """Runs train.py with the given arguments in this process, whose state of Accelerate ends with each: its status."""

    def command(*arguments: object) -> int:
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            return exit_status(train.main)
        finally:
            forget_processes()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        yield command
    torch.set_num_threads(threads)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared set: train in two parts (13 utterances), dev (5), test (4, one of a new speaker)."""
    rows = make_rows(13, seed=1)
    write_part(tmp_path / "data" / "train" / "part_1", rows[:8])
    write_part(tmp_path / "data" / "train" / "part_2", rows[8:])
    write_part(tmp_path / "data" / "dev" / "part_1", make_rows(5, seed=2))
    write_part(tmp_path / "data" / "test" / "part_1", make_rows(4, seed=3, speakers=("ann", "cem")))
    return tmp_path / "data"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MiB; skips where it cannot be mounted."""
    with mounted(tmp_path / "small_disk", "size=20m") as folder:
        yield folder


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that even root cannot write to (trap 36); skips where it cannot be mounted."""
    with mounted(tmp_path / "read_only_disk", "ro") as folder:
        yield folder


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs: mounted at `folder` by root, else in a namespace of its own that is seen through /proc."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or shutil.which("unshare") is None:
        pytest.skip("mounting a tmpfs needs the programs mount and unshare")
    if subprocess.run(mount, capture_output=True).returncode == 0:
        yield folder
        gc.collect()  # A model that was opened in this process may still map its file.
        subprocess.run(["umount", str(folder)], check=True)
        return
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", '"$@" && echo mounted && exec cat', "sh"]
    with subprocess.Popen([*inside, *mount], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip("mounting a tmpfs needs root or user namespaces")
        yield Path(f"/proc/{holder.pid}/root{folder}")
        holder.stdin.close()


def fill(disk: Path, bytes_left: int = 0) -> Path:
    """Write a file until the disk is full but for `bytes_left`; its path, to make room again."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - bytes_left)
    return filler


@pytest.fixture(scope="session")
def corpora() -> Callable[[str], Path]:
    """The folder of a real corpus by name (`digits`, `yo`); skips with the reason where it is absent."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("CTC_CORPORA", REPOSITORY.parent / "shared" / "corpora"))
        if not (root / name).is_dir():
            pytest.skip(f"real speech {name!r} is not here; name its parent folder in CTC_CORPORA")
        return root / name

    return find
