"""The model card says what the run found: its figures against train_results.json, its counts against the data."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import soundfile
from conftest import make_rows, training, write_part, write_recipe
from huggingface_hub import ModelCard

import card
import levers
from audio import SAMPLE_RATE_HZ
from config import TrainConfig
from data import ShardDataset
from runlog import read_log


class Finished(NamedTuple):
    """A run (its Accelerator has ended), and each card that it wrote."""

    run: SimpleNamespace
    results: dict[str, float]
    cards: list[str]
    screen: str

    @property
    def card(self) -> ModelCard:
        return ModelCard.load(self.run.folder / "model" / "README.md")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training with speakers ann and ben; dev with a letter that it has not, test with a new voice."""
    root = tmp_path_factory.mktemp("root")
    dev = make_rows(5, seed=2)
    dev[1] = (dev[1][0], dev[1][1], "AÉ ÉB", "dan")
    write_part(root / "clips" / "train" / "part_1", make_rows(13, seed=1))
    write_part(root / "clips" / "dev" / "part_1", dev)
    write_part(root / "clips" / "test" / "part_1", make_rows(4, seed=3, speakers=("ann", "cem")))
    return root


def train_and_record(root: Path, name: str, **settings: object) -> Finished:
    recipe = write_recipe(root / f"{name}.yaml", root / "clips", **settings)
    calls, cards = [], []

    def recording(*arguments: object) -> str:
        calls.append(arguments)
        cards.append(model_card(*arguments))
        return cards[-1]

    screen, model_card = io.StringIO(), card.model_card
    with pytest.MonkeyPatch.context() as patch, training() as command, contextlib.redirect_stdout(screen):
        patch.setattr(card, "model_card", recording)
        assert command("--config", recipe, "--output_dir", root / "runs" / name) == 0
    results = json.loads((root / "runs" / name / "train_results.json").read_text())
    ended = {"accelerator": SimpleNamespace(mixed_precision="no")}
    return Finished(SimpleNamespace(**vars(calls[-1][0]) | ended), results, cards, screen.getvalue())


@pytest.fixture(scope="module")
def finished(root: Path) -> Finished:
    return train_and_record(
        root, "letters", max_steps=4, eval_steps=2, max_duration_in_seconds=1.0, max_eval_samples=4, warmup_steps=1,
        characters_to_ignore="!`-",
    )  # fmt: skip


@pytest.fixture(scope="module")
def tuned(finished: Finished, root: Path) -> Finished:
    """From the model of the other run."""
    return train_and_record(
        root, "tuned", max_steps=1, model_config=None, vocabulary="auto",
        model_name_or_path=str(finished.run.folder / "model"), freeze_feature_encoder=True,
    )  # fmt: skip


def table(text: str, first_column: str) -> list[list[str]]:
    """The cells below this heading."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    start = next(index for index, cells in enumerate(lines) if cells[0] == first_column)
    rows = lines[start + 2 :]
    return rows[: next((index for index, cells in enumerate(rows) if len(cells) != len(lines[start])), len(rows))]


def test_the_hub_reads_the_figures_of_the_results(finished: Finished) -> None:
    data, results = finished.card.data, finished.results
    assert (data.library_name, data.pipeline_tag) == ("transformers", "automatic-speech-recognition")
    assert data.tags == ["automatic-speech-recognition", "ctc", "wav2vec2"]
    assert "base_model" not in data.to_dict()
    assert "language" not in data.to_dict()
    assert data.model_name == "letters"
    found = {(one.dataset_name, one.dataset_split, one.metric_type): one.metric_value for one in data.eval_results}
    assert found == {
        ("clips", "dev", "wer"): results["best_eval_wer"],
        ("clips", "dev", "cer"): results["best_eval_cer"],
        ("clips", "test", "wer"): results["test_wer"],
        ("clips", "test", "cer"): results["test_cer"],
    }


def cells(results: dict[str, float], name: str) -> list[str]:
    """A figure and its interval as the card writes them."""
    low, high = (results.get(f"{name}_{end}") for end in ("low", "high"))
    interval = "-" if low is None else f"{100 * low:.2f} to {100 * high:.2f} %"
    return [f"{100 * results[name]:.2f} %", interval]


def test_figures_are_those_of_the_results(finished: Finished) -> None:
    results = finished.results
    rows = table(finished.card.text, "figure")
    # The next table has as many columns.
    assert rows[: [row[0] for row in rows].index("split")] == [
        ["dev WER", *cells(results, "best_eval_wer"), "-"],
        ["dev CER", *cells(results, "best_eval_cer"), "-"],
        ["test WER", *cells(results, "test_wer"), "-"],
        ["test CER", *cells(results, "test_cer"), "-"],
        ["test WER, voices heard in training", *cells(results, "test_wer_seen_speakers"), "-"],
        ["test WER, voices not heard in training", *cells(results, "test_wer_unseen_speakers"), "-"],
        ["test WER against the texts as found", *cells(results, "test_raw_wer"), "-"],
    ]
    assert "-" not in (*cells(results, "best_eval_wer"), *cells(results, "test_wer"), *cells(results, "test_cer"))
    assert "4 of 5 dev utterances and all 4 test utterances" in finished.card.text
    best = read_log(finished.run.folder / "training_log.csv").set_index("step").loc[results["best_step"]]
    assert results["best_eval_cer"] == pytest.approx(best["eval_cer"])


def test_a_fine_tuned_model_stands_beside_what_it_came_from(tuned: Finished, root: Path) -> None:
    rows = {row[0]: [row[1], row[3]] for row in table(tuned.card.text, "figure")}
    results = tuned.results
    assert rows["dev WER"] == [f"{100 * results[name]:.2f} %" for name in ("best_eval_wer", "eval_wer_before")]
    assert rows["test CER"] == [f"{100 * results[name]:.2f} %" for name in ("test_cer", "test_cer_before")]
    # A folder's path means nothing elsewhere, and would be no name on the Hub.
    assert "fine-tuned from the folder model." in tuned.card.text
    assert "base model: the folder model, feature encoder frozen" in tuned.card.text
    assert "base_model" not in tuned.card.data.to_dict()
    assert str(root) not in tuned.card.content


def test_a_base_model_of_the_hub_is_named_to_it(finished: Finished) -> None:
    hub = SimpleNamespace(**vars(finished.run))
    hub.config = dataclasses.replace(finished.run.config, model_name_or_path="facebook/wav2vec2-base")
    found = ModelCard(card.model_card(hub, finished.results, {}))
    assert found.data.base_model == "facebook/wav2vec2-base"
    assert "fine-tuned from facebook/wav2vec2-base. " in found.text


def test_intervals_have_a_column_where_there_are_any(finished: Finished, tmp_path: Path) -> None:
    card.write_card(tmp_path, finished.run, finished.results, {"test_wer": (0.123, 0.4567), "test_cer": (0.1, 0.2)})
    rows = {row[0]: row[2] for row in table((tmp_path / "README.md").read_text(), "figure")}
    assert rows["test WER"] == "12.30 to 45.67 %"
    assert rows["test CER"] == "10.00 to 20.00 %"
    assert rows["dev WER"] == "-"


def test_data_is_counted(finished: Finished, root: Path) -> None:
    text, sets = finished.card.text, {split: ShardDataset(root / "clips" / split) for split in ("train", "dev", "test")}
    assert table(text, "split") == [
        [split, str(len(one)), f"{one.seconds / 3600:.2f}", f"`{one.fingerprint}`"] for split, one in sets.items()
    ]
    kept = sets["train"].num_samples[sets["train"].num_samples <= SAMPLE_RATE_HZ]
    assert f"Trained on {len(kept)} utterances" in text
    assert f"- training: too_long {13 - len(kept)}" in text
    assert f"clips of {kept.min() / SAMPLE_RATE_HZ:.1f} to {kept.max() / SAMPLE_RATE_HZ:.1f} s" in text


def test_what_preparing_left_out_is_counted(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"splits": {"train": {"dropped": {"no_text": 3, "unreadable": 2}}, "dev": {"dropped": {}}, "test": {}}}
    monkeypatch.setattr(card, "read_sealed", lambda _: facts)
    text = card.model_card(finished.run, finished.results, {})
    assert "- preparing, train: no_text 3, unreadable 2\n- preparing, dev: none\n- preparing, test: none\n" in text


def test_text_rules_and_settings_are_the_run_s(finished: Finished) -> None:
    text = finished.card.text
    assert "- case: lower\n" in text
    assert "- characters removed: `` !`- ``\n" in text
    assert "- vocabulary: 8 outputs, 5 characters: `` abcde ``\n" in text
    assert "- base model: none, random weights\n" in text
    assert "- updates: 4 of 8 utterances, 2.0 epochs\n" in text
    assert "- learning rate: 0.001, linear, 1 warm-up updates; weight decay 0.01\n" in text
    assert "- precision: no (" in text
    assert "- seed: 42\n" in text


def test_limits_are_counted(finished: Finished) -> None:
    text = finished.card.text
    known = {text_ for _, _, text_, _ in make_rows(13, seed=1)}
    shared = [text_ for _, _, text_, _ in make_rows(4, seed=3) if text_ in known]
    assert not shared
    assert "No test utterance has a sentence that is also in the training split." in text
    assert "2 test utterances (50 %) have a speaker who is also in the training split." in text
    assert "4 dev utterances (80 %) have a speaker who is also in the training split." in text
    assert "No dev utterance has the very audio (which is not trained on) of a clip of the training split." in text
    share = 2 / sum(len(utterance.replace(" ", "")) for utterance in dev_texts())
    assert f"cannot write {100 * share:.2g} % of the characters of the dev texts, among them `` é `` 2." in text
    assert "of the test texts" not in text
    assert "The data does not name its language." in text
    assert "ann" not in re.findall(r"\w+", text)


def dev_texts() -> list[str]:
    texts = [text for _, _, text, _ in make_rows(5, seed=2)]
    return [texts[0], "AÉ ÉB", *texts[2:]]


def test_a_language_is_named_where_the_data_does(finished: Finished) -> None:
    columns = SimpleNamespace(column_names=["id", "locale"], column=lambda name: iter(["ha", "ha", ""]))
    run = SimpleNamespace(**vars(finished.run))
    run.train_set = columns
    assert card._languages(run) == ["ha"]


def test_the_card_of_a_run_that_goes_on_promises_nothing(finished: Finished) -> None:
    first, last = finished.cards[0], finished.cards[-1]
    assert "those after update 2 of 4" in first
    assert "; the run was at update 2 when this was written." in first
    assert "The test set is not scored yet." in first
    assert "test WER" not in first
    assert "when this was written" not in last
    assert "scored yet" not in last
    assert (finished.run.folder / "model" / "README.md").read_text() == last


def test_a_resume_with_other_settings_is_said(finished: Finished) -> None:
    run = SimpleNamespace(**vars(finished.run))
    changed = [{"step": 3, "changed": ["learning_rate (was 0.1, is 0.2)", "the train data"]}]
    run.state = dataclasses.replace(run.state, resumed_anyway=changed)
    said = "At update 3 the run went on although this had changed: learning_rate (was 0.1, is 0.2), the train data."
    assert said in card.model_card(run, finished.results, {})
    assert "the run went on" not in finished.card.text


def test_evaluating_on_training_clips_is_said(root: Path, finished: Finished) -> None:
    run = SimpleNamespace(**vars(finished.run))
    run.eval_set, run.test_set, run.sets = run.train_set, None, {"train": run.train_set}
    text = card.model_card(run, {"best_eval_wer": 0.5}, {})
    assert "The train figures are of utterances that it was trained on" in text
    assert [row[0] for row in table(text, "figure")] == ["train WER"]
    assert "No test set has been scored." in text


# --- Use -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip(finished: Finished, root: Path) -> tuple[Path, str]:
    """A dev clip as a file, and the text that the run's own decoder found in it."""
    samples = read_samples(finished.run.folder / "eval_samples.csv", finished.results["best_step"])
    dev = ShardDataset(root / "clips" / "dev")
    utterance = next(dev[row] for row in range(len(dev)) if samples.get(dev[row].id))
    soundfile.write(root / "clip.wav", utterance.audio, SAMPLE_RATE_HZ)
    return root / "clip.wav", samples[utterance.id]


def read_samples(path: Path, step: int) -> dict[str, str]:
    with path.open(newline="") as file:
        return {row["id"]: row["prediction"] for row in csv.DictReader(file) if int(row["step"]) == step}


def test_the_code_of_the_card_gives_our_text(
    finished: Finished, clip: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", finished.card.text, re.DOTALL)
    monkeypatch.chdir(finished.run.folder / "model")
    exec(code.replace("CLIP.wav", str(clip[0])), {})
    assert capsys.readouterr().out == f"{clip[1]}\n"


def test_the_command_that_a_run_ends_with_gives_our_text(
    finished: Finished, clip: tuple[Path, str], capsys: pytest.CaptureFixture
) -> None:
    """As a shell divides it; test_train.py runs the demo's as it stands."""
    (line,) = re.findall(r"use it: (.*)", finished.screen)
    python, option, code = shlex.split(line)
    assert (python, option) == ("python", "-c")
    exec(code.replace("CLIP.wav", str(clip[0])), {})
    assert capsys.readouterr().out == f"{clip[1]}\n"


def test_the_levers_that_are_on_are_named() -> None:
    """And those alone: a card says what was done to the data, not what could have been."""
    plain = TrainConfig(learning_rate=1e-3, warmup_steps=5, weight_decay=0.1)
    assert levers.describe(plain) == ""
    turned = dataclasses.replace(
        plain, augment_speed=[0.9, 1.1], consistency_weight=0.2, mask_time_prob=0.1, lr_scheduler_type="cyclic"
    )
    noisy = dataclasses.replace(plain, augment_noise=["white", "/home/me/secret/noises/"])
    assert levers.describe(noisy) == "augment_noise white noises", "no path is published"
    assert levers.describe(turned) == "augment_speed 0.9 1.1, consistency_weight 0.2, mask_time_prob 0.1"
