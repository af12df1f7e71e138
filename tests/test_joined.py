"""Several prepared sets in one run: rows, names and facts of the joined split, and runs over two sets end to end."""

import csv
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import TALKATIVE, TINY_MODEL, make_rows, run_command, training, write_part, write_recipe
from test_train import MASKS, MEASURED_RESULTS, assert_same_run, stopped_at, tree

import evaluate
import preflight
import report
from cache import FactCache
from config import TrainConfig, parse_arguments
from coverage import check_coverage
from data import Collator, ShardDataset
from errors import UsageError
from identities import identities
from joined import JoinedDataset, members, name_sets, open_sets
from languages import find_language
from overlap import find_overlap
from slices import find_groupings
from text import TextNormalizer, Vocabulary, build_vocabulary
from transcripts import measure_letters, measure_texts, normalised_texts


@pytest.fixture
def command() -> Iterator[Callable[..., int]]:
    with training() as run:
        yield run


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """`big` (13 + 5 + 4 clips, with a gender), and `small` (5 + 3 + 3 of another speaker, with an accent)."""
    for name, seed, sizes, speakers in (("big", 1, (13, 5, 4), ("ann", "ben")), ("small", 11, (5, 3, 3), ("cem",))):
        for number, (split, size) in enumerate(zip(("train", "dev", "test"), sizes, strict=True)):
            column = "gender" if name == "big" else "accent"
            metadata = [{column: ("x", "y", "")[row % 3]} for row in range(size)]
            rows = make_rows(size, seed + number, speakers)
            write_part(tmp_path / "sets" / name / split / "part_1", rows, metadata=metadata)
    return tmp_path / "sets" / "big", tmp_path / "sets" / "small"


# --- The joined split ----------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_sets_one_behind_the_other(two: tuple[Path, Path]) -> None:
    joined, sets = open_sets(two, "train"), [ShardDataset(folder / "train") for folder in two]
    assert isinstance(joined, JoinedDataset)
    assert len(joined) == 18
    expected = [(name, one[row]) for name, one in zip(("big", "small"), sets, strict=True) for row in range(len(one))]
    for row, (name, utterance) in enumerate(expected):
        found = joined[row]
        assert (found.id, found.text) == (f"{name}/{utterance.id}", utterance.text)
        np.testing.assert_array_equal(found.audio, utterance.audio)
        assert joined.num_samples[row] == len(utterance.audio)
    assert joined.seconds == pytest.approx(sum(one.seconds for one in sets))
    np.testing.assert_array_equal(joined.numpy_column("rms"), np.concatenate([one.numpy_column("rms") for one in sets]))
    assert joined.folder.name == "train"
    assert joined.sets_of(np.array([0, 12, 13, 17])).tolist() == [0, 0, 1, 1]
    for row in (-1, 18):
        with pytest.raises(IndexError):
            joined[row]


@pytest.mark.parametrize("rows", [None, [0, 5, 12, 13, 17], [14, 15], [3], []])
def test_columns_are_joined_and_empty_where_a_set_has_none(two: tuple[Path, Path], rows: list[int] | None) -> None:
    joined = open_sets(two, "train")
    chosen = None if rows is None else np.array(rows, np.int64)
    wanted = list(range(18)) if rows is None else rows
    expected = {
        "corpus": ["big"] * 13 + ["small"] * 5,
        "gender": [("x", "y", "")[row % 3] for row in range(13)] + [""] * 5,
        "accent": [""] * 13 + [("x", "y", "")[row % 3] for row in range(5)],
        "speaker": [("ann", "ben")[row % 2] for row in range(13)] + ["cem"] * 5,
        "id": [f"big/u1_{row}" for row in range(13)] + [f"small/u11_{row}" for row in range(5)],
    }
    assert set(expected) <= set(joined.column_names)
    for name, values in expected.items():
        assert list(joined.column(name, chosen)) == [values[row] for row in wanted], name
    with pytest.raises(UsageError, match="has no column 'age'; it has id, audio"):
        list(joined.column("age"))


def test_a_joined_split_goes_to_workers_without_its_readers(two: tuple[Path, Path]) -> None:
    joined = open_sets(two, "train")
    joined[0], joined[13]
    sent = pickle.dumps(joined)
    assert len(sent) < 20_000, "an index, no audio"
    np.testing.assert_array_equal(pickle.loads(sent)[13].audio, joined[13].audio)


def test_one_folder_is_the_set_itself(two: tuple[Path, Path]) -> None:
    alone = open_sets(two[:1], "train")
    assert isinstance(alone, ShardDataset)
    assert alone[0].id == "u1_0"
    assert members(alone) == (alone,)


def test_the_fingerprint_tells_sets_and_order_and_not_their_names(two: tuple[Path, Path]) -> None:
    first = open_sets(two, "train").fingerprint
    assert open_sets(two[::-1], "train").fingerprint != first
    moved = two[0].rename(two[0].with_name("renamed"))
    assert open_sets((moved, two[1]), "train").fingerprint == first


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["data/en", "data/ha"], ["en", "ha"]),
        (["a/prepared", "b/prepared"], ["a/prepared", "b/prepared"]),
        (["x/en/v1", "x/ha/v1", "y/en/v1"], ["x/en/v1", "x/ha/v1", "y/en/v1"]),
        (["data/en/"], ["en"]),
    ],
)
def test_sets_are_named_by_what_tells_them_apart(folders: list[str], names: list[str]) -> None:
    assert name_sets([Path(folder) for folder in folders]) == names


def test_a_set_may_lack_dev_or_test_and_never_train(two: tuple[Path, Path]) -> None:
    shutil.rmtree(two[1] / "dev")
    dev = open_sets(two, "dev")
    assert (len(dev), set(dev.column("corpus"))) == (5, {"big"})
    shutil.rmtree(two[0] / "dev")
    with pytest.raises(UsageError, match="big/dev lacks part_1"):
        open_sets(two, "dev")
    with pytest.raises(UsageError, match=r"absent/train holds no prepared data: run python prepare\.py"):
        open_sets((two[0], two[0].with_name("absent")), "train")


def test_a_clip_of_one_set_in_the_test_split_of_another_is_left_out(two: tuple[Path, Path]) -> None:
    """Of big's training, the clips that small tests on; sentences and speakers across sets are counted as well."""
    shutil.rmtree(two[1] / "test")
    stolen = make_rows(13, seed=1, speakers=("ann", "ben"))[3:5]
    write_part(two[1] / "test" / "part_1", [(f"t{row[0]}", *row[1:]) for row in stolen])
    sets = {split: open_sets(two, split) for split in ("train", "dev", "test")}
    overlap = find_overlap(sets, FactCache(two[0]))
    assert np.flatnonzero(overlap.leaked["audio_in_test"]).tolist() == [3, 4]
    assert overlap.details["audio_in_test"](3) == "the same samples as test utterance small/tu1_3"
    facts = {finding.check: finding.facts["train-test"] for finding in overlap.findings}
    assert facts["shared speakers"]["values"] == 2
    assert facts["shared sentences"]["utterances"] >= 2


def test_facts_of_a_set_are_kept_beside_it_and_serve_both_ways(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found for the joined split, they are there for a run on one of the sets alone."""
    whole = identities(open_sets(two, "train"))
    monkeypatch.setattr(ShardDataset, "column", None)
    alone = [identities(ShardDataset(folder / "train")) for folder in two]
    np.testing.assert_array_equal(whole.clips, np.concatenate([one.clips for one in alone]))
    np.testing.assert_array_equal(whole.sentences, np.concatenate([one.sentences for one in alone]))


def test_the_sets_are_a_slice(two: tuple[Path, Path]) -> None:
    joined = open_sets(two, "test")
    groupings = find_groupings(joined, np.arange(7), np.ones(7, np.int32), None)
    (corpus,) = [one for one in groupings if one.name == "corpus"]
    assert corpus.groups == ("big", "small")
    assert corpus.codes.tolist() == [0] * 4 + [1] * 3


# --- Runs ----------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_sets_end_to_end_with_results_of_each(
    two: tuple[Path, Path], tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The test WER of each set is the one that evaluate.py finds on that set alone."""
    recipe = write_recipe(tmp_path / "recipe.yaml", two[0], max_steps=4, eval_steps=2)
    run = tmp_path / "run"
    sampled = ("--data_dir", *two, "--data_weights", 1, 2, "--sample_by", "speaker", "--sampling_temperature", 3)
    assert command("--config", recipe, *sampled, "--output_dir", run) == 0
    screen = capsys.readouterr().out

    slices = [row for row in read_table(run / "eval_slices.csv") if row["slice"] == "corpus"]
    assert [(row["step"], row["group"], row["utterances"]) for row in slices] == [
        ("2", "big", "5"), ("2", "small", "3"), ("4", "big", "5"), ("4", "small", "3"),
    ]  # fmt: skip
    results = json.loads((run / "train_results.json").read_text())
    test = {one["group"]: one for one in results["test_slices"] if one["slice"] == "corpus"}
    assert {name: one["utterances"] for name, one in test.items()} == {"big": 4, "small": 3}
    best = {one["group"]: one for one in results["best_eval_sets"]}
    for row in slices:
        if int(row["step"]) == results["best_step"]:
            assert best[row["group"]]["wer"] == float(row["wer"])
    for one in (*test.values(), *best.values()):
        assert f"    {one['group']:<30} {one['wer']:7.2%}" in screen

    table = read_table(run / "sampling.csv")
    assert [(row["corpus"], row["group"], row["clips"]) for row in table] == [
        ("big", "ann", "7"), ("big", "ben", "6"), ("small", "cem", "5"),
    ]  # fmt: skip
    assert [row["drawn_per_epoch"] for row in table] == ["3", "3", "12"]
    assert "small, cem: 5 clips" in screen
    assert {row["id"].split("/")[0] for row in read_table(run / "eval_samples.csv")} == {"big", "small"}
    for folder in two:
        assert run_command(
            evaluate.main, "evaluate.py", "--model_name_or_path", run / "model", "--data_dir", folder,
            "--output_dir", tmp_path / folder.name,
        ) == 0  # fmt: skip
        alone = json.loads((tmp_path / folder.name / "results.json").read_text())
        assert alone["wer"] == pytest.approx(test[folder.name]["wer"])
        assert alone["cer"] == pytest.approx(test[folder.name]["cer"])
    card = (run / "model" / "README.md").read_text()
    assert "Prepared data `big + small`" in card
    assert "| small | group 3 | 5 | 0.00 | 12 |" in card
    assert "cem" not in card, "no speaker is published"
    assert "preparing, small test: none" in card
    assert run_command(report.main, "report.py", run) == 0
    assert "8 clips can be heard" in (run / "report.html").read_text()


def test_promise_3_resume_is_invisible_with_sampling_and_two_sets(
    two: tuple[Path, Path], tmp_path: Path, command: Callable[..., int]
) -> None:
    """Stopped within an epoch in which clips repeat, and again from config.yaml alone; masks are on."""
    model_config = TINY_MODEL | TALKATIVE | MASKS | {"hidden_dropout": 0.2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", two[0], model_config=model_config, max_steps=7,
        save_steps=2, per_device_train_batch_size=4, data_weights=[1, 3], sample_by="speaker",
        sampling_temperature="balanced", do_predict=False,
    )  # fmt: skip
    whole, parts, again = (tmp_path / name for name in ("whole", "parts", "again"))
    begin = ("--config", recipe, "--data_dir", *two, "--output_dir")
    assert command(*begin, whole) == 0
    with stopped_at("train_step", 3):
        command(*begin, parts)
    resume = ("--config", parts / "config.yaml", "--resume_from_checkpoint", "last")
    with stopped_at("train_step", 6):
        command(*resume)
    assert command(*resume) == 0
    assert_same_run(parts, whole)
    assert tree(parts)["sampling.csv"] == tree(whole)["sampling.csv"]
    assert command("--config", whole / "config.yaml", "--output_dir", again) == 0
    assert_same_run(again, whole)
    results = [json.loads((folder / "train_results.json").read_text()) for folder in (whole, parts)]
    for name in results[0].keys() - MEASURED_RESULTS:
        assert results[0][name] == results[1][name], name


def test_a_resume_refuses_another_way_to_draw(
    two: tuple[Path, Path], tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume_anyway takes it, and sampling.csv is then of the changed run."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", two[0], save_steps=2, sample_by="corpus",
        sampling_temperature=2, do_predict=False,
    )  # fmt: skip
    run = tmp_path / "run"
    begin = ("--config", recipe, "--data_dir", *two, "--output_dir", run)
    with stopped_at("train_step", 3):
        command(*begin)
    capsys.readouterr()
    before = tree(run)
    flags = (*begin, "--resume_from_checkpoint", "last")
    for changed, named in (
        (("--sampling_temperature", "balanced"), "sampling_temperature (was 2.0, is balanced)"),
        (("--sample_by", "speaker"), "sample_by (was corpus, is speaker)"),
        (("--data_dir", *two[::-1]), "the train data"),
        (("--data_dir", two[0], "--sample_by", "speaker"), "the train data"),
    ):
        assert command(*flags, *changed) == 2
        assert named in capsys.readouterr().err
        assert tree(run) == before
    assert command(*flags, "--sampling_temperature", "balanced", "--resume_anyway") == 0
    assert [row["drawn_per_epoch"] for row in read_table(run / "sampling.csv")] == ["9", "9"]


def test_temperature_1_trains_the_very_same_weights(
    two: tuple[Path, Path], tmp_path: Path, command: Callable[..., int]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", two[0], max_steps=3, do_predict=False)
    assert command("--config", recipe, "--output_dir", tmp_path / "bare") == 0
    natural = ("--sample_by", "gender", "--sampling_temperature", 1)
    assert command("--config", recipe, "--output_dir", tmp_path / "natural", *natural) == 0
    assert_same_run(tmp_path / "natural", tmp_path / "bare")
    assert yaml.safe_load((tmp_path / "bare" / "config.yaml").read_text())["data_dir"] == str(two[0]), "plain text"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sample_by", "accents"), "--sample_by accents: did you mean accent? "),
        (("--sample_by", "text"), "has speaker, gender, accent, corpus\n"),
        (("--data_weights", "1"), "--data_weights has 1 numbers for 2 folders: give one for each"),
        (("--data_weights", "1", "-1"), "--data_weights is 1 -1, each must be above 0"),
        (("--data_weights", "1", "many"), "--data_weights is ['1', 'many'], list of a number or none is needed"),
        (("--sample_by", "gender", "--sampling_temperature", "hot"), "a number or one of balanced is needed"),
        (("--sample_by", "gender", "--sampling_temperature", "inf"), "a number or one of balanced is needed"),
        (("--sample_by", "gender", "--sampling_temperature", "nan"), "a number or one of balanced is needed"),
        (("--sample_by", "gender", "--sampling_temperature", "0.3"), "--sampling_temperature is 0.3, at least 1 is"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(
    two: tuple[Path, Path], tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "recipe.yaml", two[0])
    assert command("--config", recipe, "--data_dir", *two, *flags, "--output_dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert message in error
    assert (error.count("\n"), error.startswith("error: ")) == (1, True)
    assert not (tmp_path / "run").exists()


def test_a_missing_folder_and_one_given_twice_are_refused(
    two: tuple[Path, Path], tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", two[0])
    link = tmp_path / "link"
    link.symlink_to(two[0])
    for folders, message in (
        ((two[0], tmp_path / "absent"), f"{tmp_path}/absent/train holds no prepared data: run python prepare.py"),
        ((two[0], link), f"--data_dir names {two[0]} 2 times: name a set once"),
    ):
        assert command("--config", recipe, "--data_dir", *folders, "--output_dir", tmp_path / "run") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_preflight_checks_both_sets_and_the_sampling(two: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", two[0])
    flags = ("--data_dir", *two, "--sample_by", "corpus", "--sampling_temperature", "balanced")
    assert run_command(preflight.main, "preflight.py", "--config", recipe, *flags) == 0
    report = json.loads((two[0] / "preflight" / "preflight.json").read_text())
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert findings["training clips"]["facts"]["kept"] == 18
    assert findings["sampling"]["facts"] == {"groups": 2, "most_times_per_clip": 1.8, "unheard": 0, "unheard_clips": 0}


# --- Languages of their own ----------------------------------------------------------------------------------------


@pytest.fixture
def languages(tmp_path: Path) -> list[Path]:
    """English, where an apostrophe is a letter, and Yoruba, where it goes; 10 + 4 + 4 clips each."""
    texts = {"en": ["don't", "it's a"], "yo": ["b'ó ọ", "ṣe 'gb'"]}
    for name, of_set in texts.items():
        for number, split in enumerate(("train", "dev", "test")):
            rows = make_rows(10 if split == "train" else 4, 20 + number, ("ann",))
            rows = [(*row[:2], of_set[place % 2], row[3]) for place, row in enumerate(rows)]
            write_part(tmp_path / name / split / "part_1", rows)
    return [tmp_path / "en", tmp_path / "yo"]


def test_each_set_is_written_by_the_rules_of_its_language(languages: list[Path]) -> None:
    sets = {"en": find_language("en"), "yo": find_language("yo")}
    normalizer = TextNormalizer(",", "lower", of_sets=tuple(sets.items()))
    joined, vocabulary = open_sets(languages, "train"), Vocabulary(build_vocabulary(["don'tisabóọṣeg "]))
    expected = [
        TextNormalizer(",", "lower", language=sets[folder.name])(text)
        for folder in languages
        for text in ShardDataset(folder / "train").column("text")
    ]
    assert set(expected) == {"don't", "it's a", "bó ọ", "ṣe gb"}
    assert list(normalised_texts(joined, normalizer)) == expected
    facts = measure_texts(joined, normalizer, vocabulary, FactCache(languages[0].parent))
    assert facts.num_labels.tolist() == [len(vocabulary.encode(text)) for text in expected]
    collate = Collator(normalizer, vocabulary, True, SimpleNamespace(conv_kernel=[20, 16], conv_stride=[20, 16]), 0)
    assert collate([joined[row] for row in range(20)], np.arange(20)).texts == expected
    assert not facts.coverage.unknown
    plain = TextNormalizer(",", "upper", of_sets=tuple(sets.items()))  # The remedy is tried by the rules of each set.
    unknown = measure_texts(joined, plain, vocabulary, FactCache(languages[0].parent)).coverage
    finding = check_coverage({"train": joined}, {"train": unknown}, plain, vocabulary)[0]
    assert finding.remedy.endswith("with --case lower coverage is 100.00%")
    letters = measure_letters(joined, normalizer, FactCache(languages[0].parent))
    assert letters["'"] == 10
    assert letters["gb"] == 5


def test_one_model_of_two_languages(
    languages: list[Path], tmp_path: Path, command: Callable[..., int], capfd: pytest.CaptureFixture
) -> None:
    """Vocabulary of both, WER of each, rules of each kept; evaluate.py asks which language a set is in."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml", languages[0], language=["en", "yo"], max_steps=2, eval_steps=1, save_steps=1,
        preflight="warn",
    )  # fmt: skip
    flags = ("--config", recipe, "--data_dir", *languages, "--output_dir", tmp_path / "run")
    assert command(*flags) == 0
    screen = capfd.readouterr().out
    assert "text        case lower, vocabulary of 17, rules of en, yo" in screen
    run = tmp_path / "run"
    labels = json.loads((run / "model" / "vocab.json").read_text())
    assert set(labels) == {"<pad>", "<unk>", "|", *"don'tisabóọṣeg"}
    results = json.loads((run / "train_results.json").read_text())
    for name in ("best_eval_sets", "test_slices"):
        groups = {one["group"] for one in results[name] if one.get("slice", "corpus") == "corpus"}
        assert groups == {"en", "yo"}
    assert results["test_letters"]["'"]["occurrences"] == 4  # Those of English alone.
    assert results["rare_in_training"]["gb"] == 5
    with (run / "eval_slices.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["slice"] == "corpus"]
    assert {(row["step"], row["group"]) for row in rows} >= {("1", "en"), ("1", "yo"), ("2", "en"), ("2", "yo")}
    rules = json.loads((run / "model" / "text_rules.json").read_text())
    assert [one["code"] for one in rules["languages"]] == ["en", "yo"]

    assert command(*flags, "--resume_from_checkpoint", run / "checkpoints" / "step_000001") == 0
    again = json.loads((run / "train_results.json").read_text())
    assert [again[name] for name in ("best_eval_letters", "test_letters")] == [
        results[name] for name in ("best_eval_letters", "test_letters")
    ]
    assert command(*flags, "--language", "yo", "--resume_from_checkpoint", run / "checkpoints" / "step_000001") == 2
    capfd.readouterr()

    arguments = ["evaluate.py", "--model_name_or_path", run / "model", "--data_dir", languages[1]]
    assert run_command(evaluate.main, *arguments) == 2
    assert "was trained in en, yo: say with --language which of them this is" in capfd.readouterr().err
    assert run_command(evaluate.main, *arguments, "--language", "yo", "--output_dir", tmp_path / "results") == 0
    with (tmp_path / "results" / "utterances.csv").open() as file:
        assert {row["reference"] for row in csv.DictReader(file)} == {"bó ọ", "ṣe gb"}
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert found["text_rules"]["language"] == "yo"
    assert found["letters"]["ọ"]["in_training"] == 5


def test_as_many_languages_as_sets_or_one(languages: list[Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", languages[0], language=["en", "yo"])
    with pytest.raises(UsageError, match="--language names 2 for 1 folders: give one, or one for each"):
        parse_arguments(TrainConfig, ["--config", str(recipe), "--output_dir", "o"], "")
