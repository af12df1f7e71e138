"""Time of preflight.py on a set of the size of Common Voice English: the first time, and from its cache.

    python benchmarks/preflight_time.py [--train 136747] [--dev 58619] [--folder DIR]

A prepared set is made with that many utterances: sentences, speakers, durations and measurements drawn at random, no
audio, since no check reads any. The model is the demo's, so that the figure is that of the checks and not of a large
model's two passes. Both runs are started from the shell; the time to import the program is measured beside them.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from integrity import SCHEMA_VERSION, hash_index, write_sealed
from shards import part_schema

CHUNK_SIZE = 10_000
ROWS_PER_BATCH = 128
# Common Voice: 5.1 s on average, 15 characters a second.
MEAN_SECONDS, DEVIATION = 5.1, 0.35
CHARACTERS_PER_SECOND = 13
WORDS, SPEAKERS = 20_000, 8_000


def main() -> None:
    """Print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=136_747)
    parser.add_argument("--dev", type=int, default=58_619)
    parser.add_argument("--folder", help="keep the prepared set here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary) / "data"
        if not folder.exists():
            write_set(folder, {"train": arguments.train, "dev": arguments.dev})
        recipe = Path(temporary) / "recipe.yaml"
        write_recipe(recipe, folder)
        imports = seconds_of([sys.executable, "-c", "import preflight, assembly"])
        print(f"{'':<28}{'seconds':>9}{'less imports':>14}")
        print(f"{'imports alone':<28}{imports:>9.1f}")
        for cache in folder.glob("preflight_cache/*"):
            cache.unlink()
        for name in ("first time", "from the cache"):
            seconds = seconds_of([sys.executable, "preflight.py", "--config", str(recipe)])
            print(f"{name:<28}{seconds:>9.1f}{seconds - imports:>14.1f}", flush=True)


def seconds_of(command: list[str]) -> float:
    """Wall time of a command, which must succeed."""
    started_at = time.perf_counter()
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started_at


def write_recipe(path: Path, data_dir: Path) -> None:
    """The demo's model on the set, with the English recipe's limits."""
    demo = yaml.safe_load((REPOSITORY / "configs" / "demo.yaml").read_text())
    english = {
        "data_dir": str(data_dir), "output_dir": str(path.parent / "run"), "demo_corpus": False, "do_predict": False,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(demo | english | {"max_duration_in_seconds": 15.0}))


def write_set(data_dir: Path, sizes: dict[str, int]) -> None:
    """Splits of these sizes, as prepare.py lays them out."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(rng.choice(letters, rng.integers(1, 10))) for _ in range(WORDS)]
    parts = {}
    for split, size in sizes.items():
        starts = range(0, size, CHUNK_SIZE)
        for number, start in enumerate(starts, 1):
            rows = min(CHUNK_SIZE, size - start)
            write_part(data_dir / split / f"part_{number}", split, start, rows, words, rng)
        parts[split] = {"parts": len(starts)}
    parts["test"] = {"parts": 0}
    write_sealed(data_dir / "prepare.json", {"schema_version": SCHEMA_VERSION, "flags": [], "splits": parts})


def write_part(folder: Path, split: str, first: int, rows: int, words: list[str], rng: np.random.Generator) -> None:
    """One part whose utterances have a length and no audio."""
    folder.mkdir(parents=True)
    schema, index = part_schema([]), hashlib.sha256()
    with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(first, first + rows, ROWS_PER_BATCH):
            count = min(ROWS_PER_BATCH, first + rows - start)
            batch = pa.record_batch(columns(schema, split, start, count, words, rng), schema=schema)
            hash_index(index, batch)
            writer.write_batch(batch)
    data = (folder / "data.arrow").read_bytes()
    facts = {
        "schema_version": SCHEMA_VERSION,
        "rows": rows,
        "seconds": rows * MEAN_SECONDS,
        "data_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "index_sha256": index.hexdigest(),
    }
    write_sealed(folder / "part.json", facts)


def columns(
    schema: pa.Schema, split: str, start: int, count: int, words: list[str], rng: np.random.Generator
) -> list[pa.Array]:
    """The values of one record batch, in the order of the schema; a column not named here is 0."""
    seconds = np.clip(rng.lognormal(np.log(MEAN_SECONDS), DEVIATION, count), 1.0, 15.0)
    ids = [f"{split}_{row:07d}.mp3" for row in range(start, start + count)]
    values = {
        "id": ids,
        "audio": [[]] * count,
        "num_samples": (seconds * 16_000).astype(np.int32),
        "text": [sentence(one, words, rng) for one in seconds],
        "speaker": [f"speaker_{number}" for number in rng.integers(0, SPEAKERS, count)],
        "peak": rng.uniform(0.1, 0.9, count).astype(np.float32),
        "rms": rng.uniform(0.02, 0.1, count).astype(np.float32),
        "bandwidth_hz": rng.uniform(3_000, 6_000, count).astype(np.float32),
        "highest_frequency_hz": rng.uniform(12_000, 15_000, count).astype(np.float32),
        "source_rate_hz": np.full(count, 32_000, np.int32),
        "audio_sha256": [hashlib.sha256(name.encode()).hexdigest() for name in ids],
    }
    assert values.keys() <= set(schema.names)
    return [
        pa.array(
            values[field.name] if field.name in values else np.zeros(count, field.type.to_pandas_dtype()), field.type
        )
        for field in schema
    ]


def sentence(seconds: float, words: list[str], rng: np.random.Generator) -> str:
    """About as many characters as are spoken in the time, as a transcriber writes them."""
    wanted, chosen = seconds * CHARACTERS_PER_SECOND, []
    while sum(map(len, chosen)) + len(chosen) < wanted:
        chosen.append(words[int(rng.integers(WORDS))])
    return " ".join(chosen).capitalize() + "."


if __name__ == "__main__":
    main()
