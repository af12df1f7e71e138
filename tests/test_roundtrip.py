"""A saved model is opened as a user opens it; each check is made to fail by the damage that it is for."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from architectures import (
    GROUP,
    LARGE_960H,
    LAYER,
    XLS_R_300M,
    Architecture,
    Settings,
    no_texts,
    shrink,
    tiny,
    write_published_like_checkpoint,
)
from conftest import REPOSITORY, check_in_this_process, training, write_recipe
from safetensors.torch import load_file, save_file

import roundtrip
import run as run_module
import train
from data import Collator, Utterance
from errors import RunFailed
from metrics import ErrorCounts
from pretrained import LoadedModel, load_model, save_model
from roundtrip import check_opening, check_written, clean_environment, describe, write_probe
from scoring import Evaluation
from text import TextNormalizer

# WavLM's own call of torch's attention; model.py silences it outside of pytest, which resets the filters.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

FAMILIES = [
    pytest.param({"model_type": "wav2vec2", **GROUP}, id="wav2vec2-group"),
    pytest.param({"model_type": "wav2vec2", **LAYER}, id="wav2vec2-layer"),
    pytest.param({"model_type": "hubert", **GROUP}, id="hubert-group"),
    pytest.param({"model_type": "hubert", **LAYER}, id="hubert-layer"),
    pytest.param({"model_type": "wavlm", **LAYER}, id="wavlm"),
    pytest.param({"model_type": "unispeech", **GROUP}, id="unispeech"),
    pytest.param({"model_type": "unispeech-sat", **LAYER}, id="unispeech-sat"),
    pytest.param(
        {"model_type": "data2vec-audio", "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}, id="data2vec"
    ),
    pytest.param(
        {"model_type": "wav2vec2-conformer", "feat_extract_norm": "group", "conformer_conv_dropout": 0.0},
        id="conformer",
    ),
]  # fmt: skip
# Large random weights: texts that are not empty, and no label near a tie with another.
LOUD = {"initializer_range": 0.5}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads wait for each other on a busy machine, a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_clips() -> list[Utterance]:
    """Noise with an offset, which normalisation takes away."""
    rng = np.random.default_rng(0)
    lengths = (1_200, 2_500, 4_000)
    return [Utterance(str(n), (rng.normal(2_000, 3_000, n)).astype(np.int16), "A") for n in lengths]


def save(loaded: LoadedModel, root: Path) -> tuple[Path, Path]:
    """The folder and the probe of a model, as a run writes them."""
    do_normalize = loaded.processor.feature_extractor.do_normalize
    collate = Collator(TextNormalizer(), loaded.vocabulary, do_normalize, loaded.model.hf.config, seed=0)
    save_model(loaded, root / "model")
    write_probe(root / "probe.safetensors", loaded, collate, make_clips())
    return root / "model", root / "probe.safetensors"


@pytest.mark.parametrize("fields", FAMILIES)
def test_every_family_opens_as_it_was_saved(fields: dict[str, Any], tmp_path: Path) -> None:
    loaded = tiny(fields | LOUD)
    folder, probe = save(loaded, tmp_path)
    check_written(folder, loaded.model.hf.state_dict())
    assert check_in_this_process(folder, probe) == []
    written = load_file(probe)
    assert [len(written[f"audio.{clip}"]) for clip in range(3)] == [1_200, 2_500, 4_000]
    assert all(written[f"logits.{clip}"].argmax(-1).unique().numel() > 3 for clip in range(3)), "texts without letters"


def test_labels_of_a_training_text_open_as_they_were_saved(tmp_path: Path) -> None:
    """No `<s>` and `</s>`, letters beyond ASCII, an apostrophe, and a waveform that is not normalised."""
    vocabulary = tmp_path / "vocab.json"
    tokens = ["<pad>", "<unk>", "|", "'", *"aeioụẹñ"]
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    loaded = tiny({"model_type": "wav2vec2", **LAYER, **LOUD}, vocabulary=str(vocabulary))
    loaded.processor.feature_extractor.do_normalize = False
    assert check_in_this_process(*save(loaded, tmp_path)) == []


@pytest.mark.parametrize("weight_norm", ["weight_g", "parametrizations"])
@pytest.mark.parametrize("architecture", [LARGE_960H, XLS_R_300M], ids=["english", "xlsr"])
def test_what_came_from_a_published_checkpoint_opens(
    architecture: Architecture, weight_norm: str, tmp_path: Path
) -> None:
    """Older checkpoints name two tensors as torch did before version 2; what is saved has the names in memory."""
    write_published_like_checkpoint(tmp_path / "published", shrink(architecture), "safetensors", weight_norm)
    settings = Settings(model_name_or_path=str(tmp_path / "published"), vocabulary="large_960h")
    loaded = load_model(settings, no_texts)
    folder, probe = save(loaded, tmp_path)
    check_written(folder, loaded.model.hf.state_dict())
    assert check_in_this_process(folder, probe) == []
    assert load_file(folder / "model.safetensors").keys() == loaded.model.hf.state_dict().keys()


# --- Damage --------------------------------------------------------------------------------------------------------


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename_key(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"head.weight": tensors.pop("lm_head.weight")}))


def add_output(folder: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {f"lm_head.{name}": torch.cat([tensors[f"lm_head.{name}"]] * 2) for name in ("weight", "bias")}

    change_weights(folder, widen)


def swap_letters(folder: Path) -> None:
    change_json(folder / "vocab.json", lambda labels: labels.update({letter: labels[other] for letter, other in SWAP}))


SWAP = list(zip("ETAONIHS", "TAONIHSE", strict=True))


def remove_token(folder: Path) -> None:
    change_json(folder / "vocab.json", lambda labels: labels.pop("Z"))


def add_token(folder: Path) -> None:
    change_json(folder / "vocab.json", lambda labels: labels.update({"Ä": len(labels)}))


def add_special_token(folder: Path) -> None:
    """Trap 19: a token that the class adds behind the others, and the head knows nothing of."""
    change_json(folder / "tokenizer_config.json", lambda settings: settings.update(bos_token="<bos>"))


def zero_row(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["lm_head.weight"][7].zero_())


def break_number(folder: Path) -> None:
    name = "wav2vec2.encoder.layers.0.attention.q_proj.weight"
    change_weights(folder, lambda tensors: tensors[name][3, 3].fill_(float("nan")))


def nudge_number(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["lm_head.bias"][5].add_(2e-4))


def round_weights(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({k: v.half().float() for k, v in tensors.items()}))


def stop_normalising(folder: Path) -> None:
    change_json(folder / "preprocessor_config.json", lambda settings: settings.update(do_normalize=False))
    settings = {"do_normalize": False}
    change_json(folder / "processor_config.json", lambda both: both["feature_extractor"].update(settings))


def stop_normalising_for_version_4(folder: Path) -> None:
    change_json(folder / "preprocessor_config.json", lambda settings: settings.update(do_normalize=False))


def tear_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5_000)


DAMAGES = {
    rename_key: ({"keys", "logits"}, "keys: missing lm_head.weight, unexpected head.weight (none of these)"),
    add_output: ({"keys", "opening"}, "keys: misshapen lm_head.bias, lm_head.weight (none of these)"),
    swap_letters: ({"text"}, "text: the pipeline writes "),
    remove_token: ({"tokenizer", "outputs"}, "31 tokens, 32 outputs of the head, vocab_size 32 (all equal)"),
    add_token: ({"tokenizer", "outputs"}, "outputs: tokens without an output: Ä"),
    add_special_token: ({"tokenizer", "outputs"}, "outputs: tokens without an output: <bos>"),
    zero_row: ({"head", "logits"}, "head: only zeros in rows 7 (no such row)"),
    break_number: ({"weights", "logits"}, "not finite: wav2vec2.encoder.layers.0.attention.q_proj.weight (all finite)"),
    nudge_number: ({"logits"}, "logits: different by 0.0002 (at most 0.0001)"),
    round_weights: ({"logits"}, "logits: different by "),
    stop_normalising: ({"input", "logits", "text"}, "input: different by "),
    stop_normalising_for_version_4: (
        {"processor"},
        "processor: preprocessor_config.json and processor_config.json differ in do_normalize (equal)",
    ),
    tear_weights: ({"opening"}, "opening: SafetensorError"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save(tiny({"model_type": "wav2vec2", **LAYER, **LOUD}), tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_named(damage: Callable[[Path], None], sound: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound[0], tmp_path / "model"))
    damage(folder)
    checks, said = DAMAGES[damage]
    failures = check_in_this_process(folder, sound[1])
    # A text may or may not turn with the logits.
    assert {failure.check for failure in failures} - ({"text"} - checks) == checks
    assert said in describe(folder, failures)


def test_a_tie_that_rounding_turns_is_no_difference(tmp_path: Path) -> None:
    """Two labels with one logit in every frame: which of them wins means nothing, and both are the model's text."""
    loaded = tiny({"model_type": "wav2vec2", **LAYER, **LOUD})
    head = loaded.model.hf.lm_head
    with torch.no_grad():
        head.weight[9] = head.weight[8]
        head.bias[8], head.bias[9] = 50, 50 - 2e-5
    folder, probe = save(loaded, tmp_path)
    change_weights(folder, lambda tensors: tensors["lm_head.bias"][9].add_(4e-5))
    ours = [load_file(probe)[f"logits.{clip}"].argmax(-1).unique().tolist() for clip in range(3)]
    assert ours == [[8]] * 3
    assert check_in_this_process(folder, probe) == []


def test_what_was_written_is_compared_byte_for_byte(sound: tuple[Path, Path], tmp_path: Path) -> None:
    """The cheap check: a weight that no probe hears, and a tokenizer of another size."""
    loaded = tiny({"model_type": "wav2vec2", **LAYER, **LOUD})
    folder = Path(shutil.copytree(sound[0], tmp_path / "model"))
    check_written(folder, loaded.model.hf.state_dict())
    change_weights(folder, lambda tensors: tensors["wav2vec2.masked_spec_embed"][0].add_(1e-6))
    assert check_in_this_process(folder, sound[1]) == []
    with pytest.raises(RunFailed, match=r"model\.safetensors does not read back as it was written: check the disk"):
        check_written(folder, loaded.model.hf.state_dict())
    shutil.copy(sound[0] / "model.safetensors", folder)
    add_token(folder)
    with pytest.raises(RunFailed, match="its tokenizer has 33 tokens and the head 32 outputs"):
        check_written(folder, loaded.model.hf.state_dict())


# --- The clean process ---------------------------------------------------------------------------------------------


def test_the_environment_of_a_rank_stays_outside() -> None:
    of_rank = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host",
        "MASTER_PORT": "1", "ACCELERATE_MIXED_PRECISION": "fp16", "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0",
        "ROLE_RANK": "1",
    }  # fmt: skip
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    own = {"PATH": "/bin", "HF_HOME": "/cache", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert clean_environment(of_rank | own) == own | offline


@pytest.mark.usefixtures("clean_process")
def test_a_clean_process_names_what_failed(
    sound: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real one, started by a rank of two; what passes is seen by test_train.py."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    folder = Path(shutil.copytree(sound[0], tmp_path / "model"))
    remove_token(folder)
    zero_row(folder)
    failures = roundtrip.check_in_clean_process(folder, sound[1])
    assert {failure.check for failure in failures} - {"text"} == {"tokenizer", "outputs", "head", "logits"}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -9 $$", r"it was ended by SIGKILL, as the kernel does when memory runs out: make \d+\.\d MB free"),
        ("kill -6 $$", "it was ended by SIGABRT"),
        ("echo trace >&2; echo 'ImportError: no torch' >&2; exit 1", r"status 1 \(ImportError: no torch\)"),
        ("exit 7", r"status 7 \(no message\)"),
        ("sleep 60", "it was not done within 0.5 s"),
        (None, r"it does not start \(No such file or directory\)"),
    ],
    ids=["killed", "aborted", "trace", "status", "hangs", "missing"],
)
@pytest.mark.usefixtures("clean_process")
def test_a_process_that_cannot_tell_is_a_failure(
    script: str | None, said: str, sound: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(roundtrip, "SECONDS_FOR_CHECK", 0.5 if script == "sleep 60" else 60)
    with pytest.raises(RunFailed, match=f"is not verified, for the clean process that opens it failed: .*{said}"):
        check_opening(*sound)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_a_clean_process_hears_no_stop_signal_and_ends_with_its_run(sound: tuple[Path, Path]) -> None:
    folder, probe = map(str, sound)
    code = f"import pathlib, roundtrip; print(roundtrip.check_in_clean_process(pathlib.Path({folder!r}), {probe!r}))"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        child = wait_for_child(run)
        child.terminate()
        assert run.communicate(timeout=120)[0] == "[]\n"
    finally:
        run.kill()
    run = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    child = wait_for_child(run)
    run.kill()
    run.wait()
    child.wait(timeout=20)


def wait_for_child(run: subprocess.Popen) -> psutil.Process:
    """The clean process of this one, once it no longer hears signals."""
    while True:
        for child in psutil.Process(run.pid).children():
            status = Path(f"/proc/{child.pid}/status").read_text()
            ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
            if ignored & 1 << (signal.SIGTERM - 1):
                return child
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(timeout=0.1)


# --- In a run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command() -> Iterator[Callable[..., int]]:
    with training() as start:
        yield start


@pytest.fixture
def recipe(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run that saves its model at steps 1 and 2 of 3."""
    original = train.evaluate

    def evaluate(run: train.Run, dataset: object, rows: np.ndarray, description: str) -> Evaluation:
        evaluation = original(run, dataset, rows, description)
        wrong_words = ErrorCounts(substitutions={1: 9, 2: 5, 3: 7}[run.state.step], hits=1)
        return dataclasses.replace(evaluation, score=dataclasses.replace(evaluation.score, words=wrong_words))

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(run_module.runlog, "draw_training_curve", lambda *_: None)  # half a second each
    return write_recipe(tmp_path / "recipe.yaml", prepared, max_steps=3, eval_steps=1, save_steps=1, do_predict=False)


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The weights of each save, as they were before any damage."""
    seen = []

    def save_and_remember(loaded: LoadedModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        save_model(loaded, folder, weights)
        seen.append((folder / "model.safetensors").read_bytes())

    monkeypatch.setattr(run_module, "save_model", save_and_remember)
    return seen


@pytest.mark.parametrize(
    ("number", "damage", "said"),
    [
        (1, stop_normalising, "model.new does not open as the model that was saved: input: different by "),
        (2, nudge_number, "model.safetensors does not read back as it was written: check the disk"),
    ],
    ids=["first", "second"],
)
def test_a_bad_save_ends_the_run_and_replaces_nothing(
    number: int, damage: Callable[[Path], None], said: str, recipe: Path, tmp_path: Path, saves: list[bytes],
    command: Callable[..., int], capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    arguments = ("--config", recipe, "--output_dir", run_dir, "--resume_from_checkpoint", "auto")
    with pytest.MonkeyPatch.context() as patch:
        remembering = run_module.save_model

        def save_and_damage(loaded: LoadedModel, folder: Path, weights: dict[str, torch.Tensor]) -> None:
            remembering(loaded, folder, weights)
            if len(saves) == number:
                damage(folder)

        patch.setattr(run_module, "save_model", save_and_damage)
        assert command(*arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert said in line
    assert line.endswith(f"it is kept as {run_dir / 'model.rejected'}, and model/ is as it was")
    assert (run_dir / "model.rejected" / "model.safetensors").is_file()
    assert not (run_dir / "model.new").exists()
    assert not (run_dir / "train_results.json").exists()
    if number == 1:
        assert not (run_dir / "model").exists()
    else:
        assert (run_dir / "model" / "model.safetensors").read_bytes() == saves[0] != saves[1]
    # Without a checkpoint `auto` begins again, in the folder that holds what was rejected.
    assert command(*arguments) == 0
    assert (run_dir / "model" / "model.safetensors").read_bytes() == saves[-1]
    assert not (run_dir / roundtrip.PROBE_FILE).exists()


def test_the_first_model_and_the_last_are_opened(
    recipe: Path, tmp_path: Path, saves: list[bytes], command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, check = [], roundtrip.check_in_clean_process

    def record(folder: Path, probe: Path) -> list[roundtrip.Failure]:
        opened.append((folder.name, (folder / "model.safetensors").read_bytes()))
        return check(folder, probe)

    monkeypatch.setattr(roundtrip, "check_in_clean_process", record)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 0
    assert opened == [("model.new", saves[0]), ("model", saves[1])]
    # What has been opened is not opened again.
    opened.clear()
    assert command("--config", recipe, "--output_dir", tmp_path / "short", "--max_steps", 1) == 0
    assert [name for name, _ in opened] == ["model.new"]


def test_a_signal_during_the_check_stops_the_run_behind_it(
    recipe: Path, tmp_path: Path, saves: list[bytes], command: Callable[..., int]
) -> None:
    def is_signalled(folder: Path, probe: Path) -> list[roundtrip.Failure]:
        os.kill(os.getpid(), signal.SIGTERM)
        return check_in_this_process(folder, probe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roundtrip, "check_in_clean_process", is_signalled)
        assert command("--config", recipe, "--output_dir", tmp_path / "run") == 143
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == saves[0]
    assert command("--config", recipe, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", "last") == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == saves[-1]
    assert len(saves) == 2


def test_a_final_model_that_does_not_open_is_no_finished_run(
    recipe: Path, tmp_path: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    original = train.finish

    def damage_and_finish(run: train.Run) -> None:
        add_special_token(run.folder / "model")
        original(run)

    monkeypatch.setattr(train, "finish", damage_and_finish)
    assert command("--config", recipe, "--output_dir", tmp_path / "run") == 1
    assert "outputs: tokens without an output: <bos>" in capsys.readouterr().err
    assert not (tmp_path / "run" / "train_results.json").exists()
    assert (tmp_path / "run" / roundtrip.PROBE_FILE).is_file()
