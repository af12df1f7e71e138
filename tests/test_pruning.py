"""--prune_list: which clips a file leaves out, how it is said, and files that are refused."""

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command, write_recipe
from test_selection import make_dataset, select

import pruning
import train
from config import TrainConfig
from data import ShardDataset
from errors import UsageError
from findings import Finding
from joined import JoinedDataset
from pruning import find_pruned
from selection import Selection, write_drop_list

CLIPS = [(16_000 + 160 * row, "one") for row in range(20)]


@pytest.fixture
def dataset(tmp_path: Path) -> ShardDataset:
    """Clips u0 to u19 of 1.00 to 1.19 s."""
    return make_dataset(tmp_path, CLIPS)


def write_ranking(path: Path, rows: list[int], suggested: int, seconds_off: float = 0.0) -> Path:
    """A ranking of these rows in this order."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["rank", "id", "score", "suggested", "seconds"])
        for place, row in enumerate(rows, 1):
            seconds = CLIPS[row][0] / 16_000 + seconds_off
            is_suggested = "yes" if place <= suggested else "no"
            table.writerow([place, f"u{row}", f"{10 - place / 2:.4f}", is_suggested, f"{seconds:.3f}"])
    return path


def finding(selection: Selection) -> Finding:
    return next(one for one in selection.findings if one.check == "prune list")


RANKED = np.random.default_rng(0).permutation(20).tolist()


@pytest.mark.parametrize(("fraction", "count"), [(None, 3), (0.1, 2), (0.25, 5), (0.5, 10), (0.95, 19), (0.01, 0)])
def test_a_ranking_leaves_out_what_it_suggests_or_its_worst_share(
    fraction: float | None, count: int, dataset: ShardDataset, tmp_path: Path
) -> None:
    path = write_ranking(tmp_path / "train_ranking.csv", RANKED, suggested=3)
    selection = select(dataset, prune_list=str(path), prune_fraction=fraction)
    assert sorted(RANKED[count:]) == selection.rows.tolist()
    dropped = {row: (reason, detail) for row, reason, detail in selection.dropped}
    for place, row in enumerate(RANKED[:count], 1):
        detail = f"train_ranking.csv, rank {place} of 20, score {10 - place / 2:.4g}"
        assert dropped[row] == ("prune_list", detail)
    assert finding(selection).facts["left_out"] == count


def test_promise_4_pruned_clips_have_a_reason_in_the_drop_list(dataset: ShardDataset, tmp_path: Path) -> None:
    path = write_ranking(tmp_path / "train_ranking.csv", RANKED, suggested=3)
    selection = select(dataset, prune_list=str(path), min_duration_in_seconds=1.005, train_fraction=0.5)
    assert selection.drops_by_reason.total() + len(selection.rows) == 20
    write_drop_list(tmp_path / "drop_list.csv", dataset, selection)
    with (tmp_path / "drop_list.csv").open(newline="") as file:
        pruned = [row["id"] for row in csv.DictReader(file) if row["reason"] == "prune_list"]
    assert sorted(pruned) == sorted(f"u{row}" for row in RANKED[:3] if row != 0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.txt", "u3\n\nu7 \nu3\n"),
        ("list.csv", "id,why\nu7,noise\nu3,\n"),
        ("list.tsv", "why\tid\nnoise\tu7\n\tu3\n"),
        ("bom.csv", "\ufeffid\nu3\nu7\n"),
        ("own.csv", "rank,id,seconds\n1,u3,99\n2,u7,99\n"),  # not a ranking of ours: all lines, whatever else they say
        ("noeol", "u7\nu3"),
    ],
)
def test_any_other_list_leaves_out_all_its_ids(name: str, content: str, dataset: ShardDataset, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    selection = select(dataset, prune_list=str(tmp_path / name))
    assert [(row, why) for row, why, _ in selection.dropped] == [(3, "prune_list"), (7, "prune_list")]
    assert {detail for _, _, detail in selection.dropped} == {name}
    assert (finding(selection).verdict, finding(selection).facts["listed"]) == ("ok", 2)


def test_a_ranking_of_one_of_several_sets_is_understood(dataset: ShardDataset, tmp_path: Path) -> None:
    """Without the set's name in its ids; where two sets have such clips, it is not."""
    others = make_dataset(tmp_path / "others", [(16_000, "one")] * 3)
    path = write_ranking(tmp_path / "train_ranking.csv", [row for row in RANKED if row > 2], suggested=3)
    config = TrainConfig(prune_list=str(path))
    joined = JoinedDataset(("a", "b"), [others, dataset])
    expected = [row for row in RANKED if row > 2][:3]
    assert sorted(np.flatnonzero(find_pruned(joined, config).rows).tolist()) == sorted(3 + row for row in expected)
    path.write_text("id\nu0\n")
    with pytest.raises(UsageError, match="write them as SET/id"):
        find_pruned(joined, config)


def test_ids_that_the_corpus_lacks_are_counted_and_warned_of(dataset: ShardDataset, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("u3\nv3\nv4\n")
    found = finding(select(dataset, prune_list=str(tmp_path / "list.txt")))
    assert (found.verdict, found.facts["missing"], found.facts["left_out"]) == ("warning", 2, 1)
    assert "lists 3 clips, 1 are here" in found.result


@pytest.mark.parametrize(
    ("name", "content", "fraction", "said"),
    [
        ("list.txt", "a\nb\n", None, "none of its 2 ids is in"),
        ("list.txt", "", None, "names no clip"),
        ("list.txt", "u1\n", 0.5, "--prune_fraction needs a ranking"),
        ("list.csv", "name\nu1\n", None, "has no column `id`; it has name"),
        ("list.csv", "", None, "has no column `id`; it has none"),
        ("list.csv", "a,id\nx\n", None, "line 2 is damaged"),
        ("r.csv", "rank,id,score,suggested,seconds\none,u1,2,yes,1\n", None, "line 2 is damaged"),
        ("r.csv", "rank,id,score,suggested,seconds\n1,u1\n", 0.9, "line 2 is damaged"),
        ("binary.txt", b"\xff\xfe\x00u1", None, "cannot be read"),
        (None, None, None, "cannot be read: No such file"),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(
    name: str | None, content: str | bytes | None, fraction: float | None, said: str, dataset: ShardDataset,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / (name or "absent.csv")
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match="--prune") as refusal:
        select(dataset, prune_list=str(path), prune_fraction=fraction)
    assert said in str(refusal.value)


def test_a_ranking_of_other_clips_with_the_same_ids_is_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    path = write_ranking(tmp_path / "train_ranking.csv", RANKED, suggested=3, seconds_off=0.01)
    with pytest.raises(UsageError, match=r"is about other data: u\d+ has .* \(3 clips differ\)"):
        select(dataset, prune_list=str(path))


def test_a_list_that_leaves_nothing_is_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"u{row}\n" for row in range(20)))
    selection = select(dataset, prune_list=str(tmp_path / "list.txt"))
    count = next(one for one in selection.findings if one.check == "training clips")
    assert (count.verdict, "--prune_list" in count.remedy) == ("refused", True)


def test_halves_have_no_clip_in_common_and_none_is_left(dataset: ShardDataset) -> None:
    for share in (0.5, 0.25, 0.001):
        first = select(dataset, train_fraction=share).rows
        rest = select(dataset, train_fraction=share, train_rest=True).rows
        assert sorted([*first, *rest]) == list(range(20))
        assert len(first) == max(1, round(20 * share))


def test_promise_6_a_long_list_is_read_into_numbers(tmp_path: Path) -> None:
    """32 bytes a line and their copies; as Python's own numbers and texts they would take 200."""
    with (tmp_path / "train_ranking.csv").open("w") as file:
        file.write("rank,id,score,suggested,seconds\n")
        file.writelines(f"{line},clips/common_voice_{line}.mp3,1.5,no,4.2\n" for line in range(1, 100_001))
    tracemalloc.start()
    listed = pruning._read(tmp_path / "train_ranking.csv", 0.5)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(listed.keys), listed.total, listed.ranks.max()) == (50_000, 100_000, 50_000)
    assert peak_bytes < 100 * 100_000


def test_a_resume_with_another_list_is_refused(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The list decides who trains: the run keeps it in config.yaml, and another one is another run."""
    (tmp_path / "list.txt").write_text("u1_3\n")
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=2, save_steps=1, do_predict=False)
    flags = ("train.py", "--config", recipe, "--output_dir", tmp_path / "run", "--prune_list", tmp_path / "list.txt")
    assert run_command(train.main, *flags) == 0
    assert "prune_list 1" in capsys.readouterr().out
    assert "prune_list: " in (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "train_results.json").unlink()
    (tmp_path / "list.txt").write_text("u1_3\nu1_4\n")
    again = ("train.py", "--config", tmp_path / "run" / "config.yaml", "--resume_from_checkpoint", "last")
    assert run_command(train.main, *again) == 2
    assert "the selection of training utterances" in capsys.readouterr().err
