"""Every family of encoders through one `load_model`, and the small parts that can be trained alone: adapters and LoRA.

Checkpoints are small, random, and written by transformers' own classes.
"""

import fnmatch
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from architectures import Settings, no_texts
from conftest import REPOSITORY, TINY_MODEL, forget_processes, make_rows, run_command, write_part
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CTC_MAPPING,
    AutoModelForCTC,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    pipeline,
)
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2AttnAdapterLayer

import adapters
import evaluate
import lora
import preflight
import pretrained
import train
from config import TrainConfig
from data import Batch, Collator, ShardDataset
from errors import UsageError
from metrics import greedy_decode
from model import forward_with_loss, optimizer_groups, parameter_counts
from pretrained import FAMILIES, REFUSED, LoadedModel, load_model, save_model
from run import Run
from sharding import load_weights, weights_of
from text import LARGE_960H_VOCABULARY, TextNormalizer, build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is an extra")

LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
GROUP = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
# Two frames of 20 ms apart, as the tiny model's; what not every family's configuration has is in the table.
SMALL = {name: value for name, value in TINY_MODEL.items() if name != "model_type" and name not in LAYER}
SMALL |= {"num_hidden_layers": 2, "initializer_range": 0.1}


class Family(NamedTuple):
    """A row of the table: fields of the configuration, and how the checkpoint is stored."""

    fields: dict[str, Any]
    file_format: str = "safetensors"
    weight_norm: str = "parametrizations"


TABLE = {
    "wav2vec2": Family({"model_type": "wav2vec2", **GROUP}, weight_norm="weight_g"),
    "wav2vec2 bin": Family({"model_type": "wav2vec2", **GROUP}, "bin", "weight_g"),
    "xls-r": Family({"model_type": "wav2vec2", **LAYER}),
    "hubert": Family({"model_type": "hubert", **GROUP}, "bin", "weight_g"),
    "hubert large": Family({"model_type": "hubert", **LAYER}),
    "wavlm": Family({"model_type": "wavlm", **GROUP}, "bin", "weight_g"),
    "wavlm large": Family({"model_type": "wavlm", **LAYER}),
    "unispeech": Family({"model_type": "unispeech", **LAYER}, "bin", "weight_g"),
    "unispeech-sat": Family({"model_type": "unispeech-sat", **GROUP}),
    "data2vec-audio": Family({"model_type": "data2vec-audio", "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}),
    "wav2vec2-conformer": Family({"model_type": "wav2vec2-conformer", "conformer_conv_dropout": 0.0}),
    "mms": Family({"model_type": "wav2vec2", **LAYER, "adapter_attn_dim": 4}),
}


def write_checkpoint(folder: Path, family: Family, seed: int = 0) -> PreTrainedModel:
    """A fine-tuned model as it is published, with a vocabulary of English; the model that was written."""
    fields = dict(family.fields)
    hf_config = CONFIG_MAPPING[fields.pop("model_type")](**SMALL | fields, vocab_size=32, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = MODEL_FOR_CTC_MAPPING[type(hf_config)](hf_config)
    hf.save_pretrained(folder)
    build_tokenizer(LARGE_960H_VOCABULARY).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if family.weight_norm == "weight_g":
        names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for new, old in names.items():
            weights = {name.replace(new, old): value for name, value in weights.items()}
        assert any(name.endswith("weight_g") for name in weights)
    (folder / "model.safetensors").unlink()
    if family.file_format == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return hf.eval()


def batch_of(loaded: LoadedModel, data_dir: Path, rows: int = 4) -> Batch:
    dataset = ShardDataset(data_dir / "train")
    normalizer = TextNormalizer.for_vocabulary(loaded.vocabulary, "", "auto")
    do_normalize = loaded.processor.feature_extractor.do_normalize
    collate = Collator(normalizer, loaded.vocabulary, do_normalize, loaded.model.hf.config, seed=0)
    return collate([dataset[row] for row in range(rows)], np.arange(rows))


def losses_of_updates(loaded: LoadedModel, batch: Batch, updates: int, learning_rate: float) -> list[float]:
    """The loss per label before each of some updates of AdamW on one batch, and behind the last."""
    optimizer = torch.optim.AdamW(optimizer_groups(loaded.model, 0.0), lr=learning_rate)
    losses = []
    for _ in range(updates + 1):
        loaded.model.train()
        _, _, loss_B = forward_with_loss(loaded.model, batch, loaded.vocabulary.blank_id)
        loss = loss_B.sum() / batch.label_lengths_B.sum()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loaded.model.parameters(), 1.0)
        optimizer.step()
    loaded.model.eval()
    return losses


@torch.no_grad()
def logits_of(loaded: LoadedModel, batch: Batch) -> torch.Tensor:
    loaded.model.eval()
    return loaded.model(batch.input_values_BS, batch.sample_lengths_B)[0]


@torch.no_grad()
def assert_opens_as(folder: Path, loaded: LoadedModel, batch: Batch, data_dir: Path) -> None:
    """`from_pretrained` and `pipeline` make of a saved folder what our model makes of each clip alone."""
    theirs, info = AutoModelForCTC.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    # WavLM's attention rounds otherwise where a bias wants a gradient.
    theirs.eval().requires_grad_(False)
    loaded.model.requires_grad_(False)
    recognise = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    dataset = ShardDataset(data_dir / "train")
    for row, length in enumerate(batch.sample_lengths_B.tolist()):
        values_1S = batch.input_values_BS[row : row + 1, :length]
        logits_1TV, frames_B = loaded.model(values_1S, [length])
        assert torch.equal(theirs(values_1S).logits, logits_1TV)
        (text,) = greedy_decode(logits_1TV, frames_B, loaded.vocabulary)
        audio = dataset[row].audio.astype(np.float32) / 2**15
        assert recognise({"raw": audio, "sampling_rate": 16_000})["text"] == text


# --- Every family --------------------------------------------------------------------------------------------------


def test_the_table_has_every_family():
    assert {family.fields["model_type"] for family in TABLE.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", TABLE)
def test_a_family_loads_learns_saves_and_opens(name: str, prepared: Path, tmp_path: Path):
    written = write_checkpoint(tmp_path / "checkpoint", TABLE[name])
    loaded = load_model(Settings(model_name_or_path=str(tmp_path / "checkpoint")), no_texts)
    assert loaded.head_fits and len(loaded.notes) == 1
    for key, value in written.state_dict().items():
        assert torch.equal(loaded.model.hf.state_dict()[key], value), key
    batch = batch_of(loaded, prepared)
    losses = losses_of_updates(loaded, batch, updates=30, learning_rate=5e-3)
    assert losses[-1] < losses[0] / 2
    save_model(loaded, tmp_path / "saved")
    again = load_model(Settings(model_name_or_path=str(tmp_path / "saved")), no_texts)
    assert again.head_fits
    assert torch.equal(logits_of(again, batch), logits_of(loaded, batch))
    assert_opens_as(tmp_path / "saved", loaded, batch, prepared)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """A command of the program in this process, each with a fresh state of Accelerate: its status."""

    def run(module: ModuleType, *arguments: object) -> int:
        try:
            return run_command(module.main, module.__name__, *arguments)
        finally:
            forget_processes()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def flags(data_dir: Path, checkpoint: Path, run_dir: Path, **settings: object) -> list[object]:
    """Four updates, a checkpoint at the second and the fourth."""
    given = {
        "data_dir": data_dir, "model_name_or_path": checkpoint, "output_dir": run_dir, "max_steps": 4, "save_steps": 2,
        "eval_steps": 2, "logging_steps": 1, "save_total_limit": 3, "learning_rate": 1e-3, "dataloader_num_workers": 0,
    } | settings  # fmt: skip
    words = []
    for name, value in given.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return words


def assert_resumes_and_is_evaluated(
    command: Callable[..., int], data_dir: Path, checkpoint: Path, run_dir: Path, **settings: object
) -> dict[str, torch.Tensor]:
    """A run to its end, again from its middle with the same end bit for bit, and scored; its last checkpoint."""
    words = flags(data_dir, checkpoint, run_dir, **settings)
    assert command(train, *words) == 0
    whole, log = load_file(run_dir / "checkpoints/step_000004/tensors.safetensors"), measured_log(run_dir)
    model = (run_dir / "model/model.safetensors").read_bytes()
    assert command(train, *words, "--resume_from_checkpoint", "step_000002") == 0
    again = load_file(run_dir / "checkpoints/step_000004/tensors.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert measured_log(run_dir) == log
    assert (run_dir / "model/model.safetensors").read_bytes() == model
    results = ["--output_dir", run_dir.parent / "results", "--dataloader_num_workers", 0]
    assert command(evaluate, "--model_name_or_path", run_dir / "model", "--data_dir", data_dir, *results) == 0
    scored = json.loads((run_dir.parent / "results/results.json").read_text())
    assert scored["wer"] == json.loads((run_dir / "train_results.json").read_text())["test_wer"]
    return whole


def measured_log(run_dir: Path) -> list[list[str]]:
    """The columns of the log that a repetition repeats."""
    rows = [line.split(",") for line in (run_dir / "training_log.csv").read_text().splitlines()]
    names = ("step", "train_loss", "grad_norm", "learning_rate", "eval_loss", "eval_wer", "eval_cer")
    return [[row[rows[0].index(name)] for name in names] for row in rows]


# 12 s each; the others differ from these in their layers alone, which the tests above cover.
QUICK = ("wav2vec2",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TABLE if name != "wav2vec2 bin"],
)
def test_a_family_trains_resumes_bit_for_bit_and_is_evaluated(
    name: str, command: Callable[..., int], prepared: Path, tmp_path: Path
):
    """Promise 3 for every family, with its own dropout and masks."""
    write_checkpoint(tmp_path / "checkpoint", TABLE[name])
    noise = {"hidden_dropout": 0.1, "layerdrop": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2}
    settings = {"freeze_feature_encoder": False, **noise}
    tensors = assert_resumes_and_is_evaluated(command, prepared, tmp_path / "checkpoint", tmp_path / "run", **settings)
    kept = {key for key in tensors if key.startswith("model/")}
    assert len(kept) == len(load_file(tmp_path / "run/model/model.safetensors"))


# --- What a family cannot do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*REFUSED, "wav2vec3", "bert", None, 7])
def test_what_is_no_ctc_model_of_waveforms_is_refused_by_name(model_type: object, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    message = str(caught.value)
    assert f"model_type is {model_type!r}" in message and "\n" not in message
    assert REFUSED[model_type] in message if model_type in REFUSED else ", ".join(FAMILIES) in message


def test_every_refusal_names_what_to_use_instead():
    assert all("; use " in reason for reason in REFUSED.values())
    # Nothing that transformers knows as a CTC model is met without a word.
    known = {config.model_type for config in MODEL_FOR_CTC_MAPPING}
    assert known - set(FAMILIES) - set(REFUSED) == set()


# --- MMS -----------------------------------------------------------------------------------------------------------

HAUSA = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdeƙɗɓ"])}
YORUBA = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdeẹọṣg"])}
LANGUAGES = {"eng": LARGE_960H_VOCABULARY, "hau": HAUSA, "yor": YORUBA}


def write_mms(folder: Path, file_format: str = "safetensors") -> None:
    """As facebook/mms-1b-all: a nested vocabulary, English in the weights' own file, a file per language."""
    hf = write_checkpoint(folder, TABLE["mms"])
    (folder / "vocab.json").write_text(json.dumps(LANGUAGES))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_lang": "eng"}))
    for seed, language in enumerate(("hau", "yor"), 5):
        generator = torch.Generator().manual_seed(seed)
        size = len(LANGUAGES[language])
        shapes = {name: value.shape for name, value in hf._get_adapters().items()}
        shapes |= {"lm_head.weight": (size, hf.config.hidden_size), "lm_head.bias": (size,)}
        weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
        if file_format == "bin":
            torch.save(weights, folder / f"adapter.{language}.bin")
        else:
            save_file(weights, folder / f"adapter.{language}.safetensors", metadata={"format": "pt"})


@pytest.fixture
def mms(tmp_path: Path) -> Path:
    write_mms(tmp_path / "mms")
    return tmp_path / "mms"


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("language", ["hau", "yor"])
def test_a_language_of_mms_is_that_of_transformers(language: str, file_format: str, prepared: Path, tmp_path: Path):
    write_mms(tmp_path / "mms", file_format)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path / "mms"), target_lang=language), no_texts)
    assert loaded.head_fits
    assert loaded.vocabulary.token_ids == LANGUAGES[language]
    theirs = Wav2Vec2ForCTC.from_pretrained(tmp_path / "mms", target_lang=language, ignore_mismatched_sizes=True)
    batch = batch_of(loaded, prepared)
    values_1S = batch.input_values_BS[:1, : batch.sample_lengths_B[0]]
    with torch.no_grad():
        expected = theirs.eval()(values_1S).logits
        assert torch.equal(loaded.model.eval()(values_1S, [values_1S.shape[1]])[0], expected)
    save_model(loaded, tmp_path / "saved")
    assert_opens_as(tmp_path / "saved", loaded, batch, prepared)
    assert json.loads((tmp_path / "saved/vocab.json").read_text()) == LANGUAGES[language]


def test_mms_without_a_language_says_how_to_name_one(mms: Path):
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path=str(mms)), no_texts)
    assert "holds 3 languages: name one, such as --target_lang eng" in str(caught.value)
    assert "--vocabulary train" in str(caught.value)


BAD_LANGUAGES = {
    "a near name": ("haw", "3 languages and not this one, the nearest are hau"),
    "a far name": ("zzz", "there are eng, hau, yor"),
    "no file": ("eng", "neither adapter.eng.safetensors nor adapter.eng.bin"),
}


@pytest.mark.parametrize("case", BAD_LANGUAGES)
def test_a_language_that_cannot_be_loaded_is_refused(case: str, mms: Path):
    language, message = BAD_LANGUAGES[case]
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path=str(mms), target_lang=language), no_texts)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_file_of_a_language_is_refused(mms: Path):
    path = mms / "adapter.hau.safetensors"
    weights = load_file(path)
    settings = Settings(model_name_or_path=str(mms), target_lang="hau")

    def refusal(content: dict[str, torch.Tensor] | bytes) -> str:
        path.unlink()  # What was loaded from it may still be mapped.
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        with pytest.raises(UsageError) as caught:
            load_model(settings, no_texts)
        return str(caught.value)

    assert "cannot be read as the weights of adapters" in refusal(b"nonsense")
    name = "wav2vec2.encoder.layers.0.adapter_layer.norm.bias"
    assert f"it differs in {name}" in refusal({key: value for key, value in weights.items() if key != name})
    assert "has the shape [7], and the model [32]" in refusal(weights | {name: torch.zeros(7)})
    assert "lm_head.bias has the shape [3], and the model [13]" in refusal(
        weights | {"lm_head.weight": torch.zeros(3, 32), "lm_head.bias": torch.zeros(3)}
    )


def test_target_lang_of_a_checkpoint_with_one_language_is_refused(tmp_path: Path):
    write_checkpoint(tmp_path, TABLE["xls-r"])
    with pytest.raises(UsageError, match="has one vocabulary for all; leave the flag out"):
        load_model(Settings(model_name_or_path=str(tmp_path), target_lang="hau"), no_texts)
    fields = {"model_type": "wav2vec2", **SMALL}
    with pytest.raises(UsageError, match="--target_lang names adapters of a checkpoint"):
        load_model(Settings(model_config=fields, target_lang="hau", vocabulary="large_960h"), no_texts)


def test_only_the_files_of_one_language_are_downloaded(mms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = tmp_path / "disk"
    disk.mkdir()

    def download(name: str, allow_patterns: list[str], **_: Any) -> str:
        for path in mms.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, disk)
        return str(disk)

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    with pytest.raises(UsageError, match="the nearest are hau"):
        load_model(Settings(model_name_or_path="facebook/mms-1b-all", target_lang="haw"), no_texts)
    assert not list(disk.glob("*.safetensors"))  # refused before any weights
    assert load_model(Settings(model_name_or_path="facebook/mms-1b-all", target_lang="hau"), no_texts).head_fits
    assert sorted(path.name for path in disk.glob("*.safetensors")) == ["adapter.hau.safetensors", "model.safetensors"]


def test_a_language_that_mms_lacks_gets_new_adapters(mms: Path):
    """And a relative's adapters stay where --target_lang names it."""
    texts = ["abba abe", "dada"]
    new, again, other = (
        load_model(Settings(model_name_or_path=str(mms), vocabulary="train", seed=seed), lambda: texts)
        for seed in (7, 7, 8)
    )
    assert not new.head_fits
    assert any("adapters: drawn anew, those of the checkpoint belong to its 3 languages" in note for note in new.notes)
    english, theirs = load_file(mms / "model.safetensors"), load_file(mms / "adapter.hau.safetensors")
    for name, value in adapters.weights_of(new.model.hf).items():
        assert torch.equal(value, dict(again.model.hf.named_parameters())[name])
        if name.endswith(("linear_1.weight", "linear_2.weight")):
            assert not torch.equal(value, english[name])
            assert not torch.equal(value, dict(other.model.hf.named_parameters())[name])
            assert float(value.detach().std()) == pytest.approx(0.1, rel=0.3)  # the configuration's initializer_range
    relative = load_model(Settings(model_name_or_path=str(mms), vocabulary="train", target_lang="hau"), lambda: texts)
    assert not relative.head_fits
    own = relative.model.hf.state_dict()
    assert all(torch.equal(own[name], value) for name, value in theirs.items() if adapters.is_of_adapter(name))


def test_transformers_does_not_draw_adapters_anew(mms: Path):
    """Why adapters.draw exists; when this fails, `init_adapter_layers` has been mended."""
    hf = Wav2Vec2ForCTC.from_pretrained(mms)
    before = {name: value.clone() for name, value in hf._get_adapters().items() if adapters.is_of_adapter(name)}
    hf.init_adapter_layers()
    assert all(torch.equal(hf._get_adapters()[name], value) for name, value in before.items())


# --- Adapters alone ------------------------------------------------------------------------------------------------


def test_adapters_are_those_of_transformers_and_nothing_else_learns(mms: Path, prepared: Path):
    settings = Settings(model_name_or_path=str(mms), target_lang="hau", train_adapters=True)
    loaded = load_model(settings, no_texts)
    hf = loaded.model.hf
    trained = {name for name, value in hf.named_parameters() if value.requires_grad}
    assert trained == set(hf._get_adapters())
    before = {name: value.clone() for name, value in hf.state_dict().items()}
    losses = losses_of_updates(loaded, batch_of(loaded, prepared), updates=30, learning_rate=1e-2)
    assert losses[-1] < losses[0] / 2
    assert {name for name, value in hf.state_dict().items() if not torch.equal(value, before[name])} == trained


@pytest.mark.parametrize("dim", [None, 8])
def test_an_encoder_without_adapters_gets_them(dim: int | None, prepared: Path, tmp_path: Path):
    write_checkpoint(tmp_path / "xls-r", TABLE["xls-r"])
    settings = {"model_name_or_path": str(tmp_path / "xls-r"), "train_adapters": True, "adapter_attn_dim": dim}
    loaded, again = (load_model(Settings(**settings), no_texts) for _ in range(2))
    assert loaded.head_fits
    assert "adapters: drawn anew, the checkpoint has none" in loaded.notes
    layers = [module for module in loaded.model.modules() if isinstance(module, Wav2Vec2AttnAdapterLayer)]
    assert [layer.linear_1.out_features for layer in layers] == [dim or adapters.DEFAULT_DIM] * 2
    batch = batch_of(loaded, prepared)
    assert torch.equal(logits_of(loaded, batch), logits_of(again, batch))
    losses_of_updates(loaded, batch, updates=2, learning_rate=1e-2)
    save_model(loaded, tmp_path / "saved")
    assert_opens_as(tmp_path / "saved", loaded, batch, prepared)
    back = load_model(Settings(model_name_or_path=str(tmp_path / "saved")), no_texts)
    assert torch.equal(logits_of(back, batch), logits_of(loaded, batch))


@pytest.mark.parametrize("language", ["hau", None])
def test_the_small_file_of_adapters_is_that_of_a_language(language: str | None, prepared: Path, tmp_path: Path):
    """Put beside the other languages of MMS, transformers opens it."""
    write_mms(tmp_path / "mms")
    settings = {"target_lang": language} if language else {"vocabulary": "train"}
    settings |= {"model_name_or_path": str(tmp_path / "mms"), "train_adapters": True}
    loaded = load_model(Settings(**settings), lambda: ["abc dea"])
    batch = batch_of(loaded, prepared)
    losses_of_updates(loaded, batch, updates=2, learning_rate=1e-2)
    save_model(loaded, tmp_path / "saved")
    name = language or "new"
    shutil.copy(tmp_path / f"saved/adapter/adapter.{name}.safetensors", tmp_path / "mms")
    labels = json.loads((tmp_path / "saved/adapter/vocab.json").read_text())
    assert labels == {name: loaded.vocabulary.token_ids}
    theirs = Wav2Vec2ForCTC.from_pretrained(tmp_path / "mms", target_lang=name, ignore_mismatched_sizes=True).eval()
    values_1S = batch.input_values_BS[:1, : batch.sample_lengths_B[0]]
    with torch.no_grad():
        assert torch.equal(theirs(values_1S).logits, loaded.model(values_1S, [values_1S.shape[1]])[0])
    (tmp_path / "mms/vocab.json").write_text(json.dumps(LANGUAGES | labels))
    again = load_model(Settings(model_name_or_path=str(tmp_path / "mms"), target_lang=name), no_texts)
    assert torch.equal(logits_of(again, batch), logits_of(loaded, batch))


def test_nothing_below_the_first_adapter_builds_a_graph(mms: Path, prepared: Path):
    """And frozen matrices keep no inputs for gradients of their own."""
    loaded = load_model(Settings(model_name_or_path=str(mms), target_lang="hau", train_adapters=True), no_texts)
    grown = {}
    for name, module in loaded.model.hf.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, outputs, name=name: grown.update(
                {name: any(one.requires_grad for one in outputs if isinstance(one, torch.Tensor))}
                if isinstance(outputs, tuple)
                else {name: getattr(outputs, "requires_grad", None)}
            )
        )
    loaded.model.train()
    batch = batch_of(loaded, prepared)
    loaded.model(batch.input_values_BS, batch.sample_lengths_B)
    for name in ("feature_extractor", "feature_projection", "encoder.pos_conv_embed", "encoder.layers.0.attention"):
        assert grown[f"wav2vec2.{name}"] is False, name
    assert grown["wav2vec2.encoder.layers.0"] is True


CANNOT_HAVE_ADAPTERS = [name for name in TABLE if name not in ("xls-r", "mms")]


@pytest.mark.parametrize("name", CANNOT_HAVE_ADAPTERS)
def test_a_family_without_adapters_is_refused_by_name(name: str, tmp_path: Path):
    write_checkpoint(tmp_path, TABLE[name])
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path=str(tmp_path), train_adapters=True), no_texts)
    said = "no layer norm before its blocks" if name.startswith("wav2vec2") and "conf" not in name else (
        f"is a {TABLE[name].fields['model_type']}, which has no adapters"
    )  # fmt: skip
    assert said in str(caught.value) and "use --lora_rank 8" in str(caught.value)


def test_another_width_than_the_checkpoints_is_refused(mms: Path):
    settings = Settings(model_name_or_path=str(mms), target_lang="hau", train_adapters=True, adapter_attn_dim=8)
    with pytest.raises(UsageError, match=r"--adapter_attn_dim 8: the adapters of .* are 4 wide"):
        load_model(settings, no_texts)


# --- LoRA ----------------------------------------------------------------------------------------------------------


@needs_peft
@pytest.mark.parametrize("name", [name for name in TABLE if name != "wav2vec2 bin"])
def test_lora_learns_alone_and_its_merged_model_opens(name: str, prepared: Path, tmp_path: Path):
    """What the run scores is, bit for bit, what transformers makes of the saved folder."""
    written = write_checkpoint(tmp_path / "checkpoint", TABLE[name])
    settings = Settings(model_name_or_path=str(tmp_path / "checkpoint"), lora_rank=4, freeze_feature_encoder=True)
    loaded = load_model(settings, no_texts)
    batch = batch_of(loaded, prepared)
    untouched = load_model(Settings(model_name_or_path=str(tmp_path / "checkpoint")), no_texts)
    untouched.model.requires_grad_(False)
    assert torch.equal(logits_of(loaded, batch), logits_of(untouched, batch))  # B is zero at first
    frozen = {key: value.clone() for key, value in loaded.model.named_parameters() if not value.requires_grad}
    losses = losses_of_updates(loaded, batch, updates=30, learning_rate=1e-2)
    assert losses[-1] < losses[0] / 2
    trained = {key: value for key, value in loaded.model.named_parameters() if value.requires_grad}
    assert all("lora_" in key or key.startswith("hf.lm_head.") for key in trained)
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained.values())
    assert all(torch.equal(dict(loaded.model.named_parameters())[key], value) for key, value in frozen.items())
    save_model(loaded, tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == written.state_dict().keys()
    targets = lora.TARGETS_OF_FAMILY.get(written.config.model_type, lora.DEFAULT_TARGETS)
    changed = {key for key, value in saved.items() if not torch.equal(value, written.state_dict()[key])}
    assert {key.split(".")[-2] for key in changed} == {*targets, "lm_head"}
    assert not (tmp_path / "saved/adapter_config.json").exists()  # With it transformers would look for a base model.
    assert_opens_as(tmp_path / "saved", loaded, batch, prepared)


@needs_peft
def test_the_merged_matrix_is_the_formula(prepared: Path, tmp_path: Path):
    write_checkpoint(tmp_path, TABLE["xls-r"])
    settings = Settings(model_name_or_path=str(tmp_path), lora_rank=4, lora_alpha=12, lora_target_modules=["k_proj"])
    loaded = load_model(settings, no_texts)
    state = loaded.model.hf.state_dict()
    base = "wav2vec2.encoder.layers.1.attention.k_proj"
    with torch.no_grad():
        state[f"{base}.lora_B.default.weight"].normal_()
    w, a, b = (state[f"{base}.{part}.weight"].double() for part in ("base_layer", "lora_A.default", "lora_B.default"))
    merged = weights_of(loaded.model)[f"{base}.weight"]
    torch.testing.assert_close(merged.double(), w + 12 / 4 * b @ a, rtol=1e-6, atol=1e-6)
    # In training the addition goes its own way, to the same result but for rounding.
    batch = batch_of(loaded, prepared)
    in_evaluation = logits_of(loaded, batch)
    with torch.no_grad():
        in_training = loaded.model.train()(batch.input_values_BS, batch.sample_lengths_B)[0]
    torch.testing.assert_close(in_training, in_evaluation, rtol=1e-4, atol=1e-4)
    # And a merged model goes back into the divided one.
    load_weights(loaded.model, {name: value.clone() for name, value in weights_of(loaded.model).items()})
    assert torch.equal(logits_of(loaded, batch), in_evaluation)
    assert torch.equal(weights_of(loaded.model)[f"{base}.weight"], merged)


@needs_peft
def test_lora_depends_on_the_seed_alone(tmp_path: Path):
    write_checkpoint(tmp_path, TABLE["xls-r"])
    torch.manual_seed(1)
    first, second, other = (
        load_model(Settings(model_name_or_path=str(tmp_path), lora_rank=4, seed=seed), no_texts).model.state_dict()
        for seed in (7, 7, 8)
    )
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items() if ".lora_A." in name)


@needs_peft
@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("xls-r", ["q_prj"], "this wav2vec2 encoder has no such matrix; the nearest is q_proj"),
        ("xls-r", ["lm_head"], "has no such matrix"),
        ("wav2vec2-conformer", ["q_proj"], "this wav2vec2-conformer encoder has no such matrix"),
        ("wavlm", ["v_proj"], "the attention of wavlm reads this matrix past its layer"),
    ],
)
def test_a_matrix_that_cannot_have_an_addition_is_refused(name: str, targets: list[str], message: str, tmp_path: Path):
    write_checkpoint(tmp_path, TABLE[name])
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path=str(tmp_path), lora_rank=4, lora_target_modules=targets), no_texts)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_peft_is_told_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint(tmp_path, TABLE["xls-r"])
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"--lora_rank needs the package peft.*pip install 'peft>="):
        load_model(Settings(model_name_or_path=str(tmp_path), lora_rank=4), no_texts)


@needs_peft
def test_the_small_file_of_lora_is_pefts_own(prepared: Path, tmp_path: Path):
    from peft import PeftModel

    write_checkpoint(tmp_path / "base", TABLE["xls-r"])
    loaded = load_model(Settings(model_name_or_path=str(tmp_path / "base"), lora_rank=4), no_texts)
    save_model(loaded, tmp_path / "untrained")
    assert not (tmp_path / "untrained/adapter").exists()  # There is nothing in it yet.
    batch = batch_of(loaded, prepared)
    losses_of_updates(loaded, batch, updates=3, learning_rate=1e-2)
    save_model(loaded, tmp_path / "saved")
    theirs = PeftModel.from_pretrained(AutoModelForCTC.from_pretrained(tmp_path / "base"), tmp_path / "saved/adapter")
    values_1S = batch.input_values_BS[:1, : batch.sample_lengths_B[0]]
    with torch.no_grad():
        expected = loaded.model(values_1S, [values_1S.shape[1]])[0]
        torch.testing.assert_close(theirs.eval()(values_1S).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(theirs.merge_and_unload().eval()(values_1S).logits, expected)
    assert str(tmp_path) not in (tmp_path / "saved/adapter/adapter_config.json").read_text()


# --- Settings ------------------------------------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"train_adapters": True, "lora_rank": 4}, "--train_adapters and --lora_rank are two ways to the same end"),
    ({"lora_alpha": 16}, "--lora_alpha does nothing without --lora_rank"),
    ({"lora_target_modules": ["q_proj"]}, "--lora_target_modules does nothing without --lora_rank"),
    ({"adapter_attn_dim": 8}, "--adapter_attn_dim does nothing without --train_adapters"),
    ({"lora_rank": 0}, "--lora_rank is 0, at least 1 is needed"),
    ({"lora_rank": 4, "lora_dropout": 1.0}, "--lora_dropout is 1, it must lie in [0, 1)"),
    ({"lora_rank": 4, "freeze_feature_encoder": False}, "--freeze_feature_encoder false contradicts --lora_rank"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], message: str):
    config = TrainConfig(data_dir="d", output_dir="o", model_name_or_path="m", **settings)
    (error,) = config.errors()
    assert message in error


# --- Runs and checkpoints ------------------------------------------------------------------------------------------

PARTS = {
    # Resumed where the head still learns alone.
    "adapters": {"train_adapters": True, "freeze_encoder_steps": 3},
    "lora": {"lora_rank": 4, "lora_dropout": 0.2, "ema_decay": 0.9, "average_best": 2},
}


@pytest.mark.parametrize("part", [pytest.param("adapters"), pytest.param("lora", marks=needs_peft)])
def test_a_run_of_parts_resumes_bit_for_bit_from_a_checkpoint_of_parts(
    part: str, command: Callable[..., int], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Promise 3, with dropout and masks; the checkpoint holds what is trained and names the rest."""
    write_checkpoint(tmp_path / "checkpoint", TABLE["xls-r"])
    noise = {"hidden_dropout": 0.1, "layerdrop": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2}
    settings = PARTS[part] | noise
    needed, original = [], preflight.disk_bytes
    monkeypatch.setattr(preflight, "disk_bytes", lambda run: needed.append(original(run)) or needed[-1])
    tensors = assert_resumes_and_is_evaluated(command, prepared, tmp_path / "checkpoint", tmp_path / "run", **settings)
    kept = [name for name in tensors if name.startswith("model/")]
    assert kept and all(any(word in name for word in (".adapter_layer.", ".lora_", "lm_head.")) for name in kept)
    moments = {name.removeprefix("optimizer.exp_avg.hf.") for name in tensors if name.startswith("optimizer.exp_avg.")}
    assert moments == {name.removeprefix("model/") for name in kept}
    state = json.loads((tmp_path / "run/checkpoints/step_000004/state.json").read_text())
    assert len(state["run"]["identity"]["the frozen weights of model_name_or_path"]) == 64
    held = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("tensors.safetensors"))
    model = (tmp_path / "run/model/model.safetensors").stat().st_size
    assert held < model  # two checkpoints
    if part == "adapters":  # model/ while it is replaced, and what is small
        assert held + model < needed[0] < 4 * model


@needs_peft
def test_a_run_of_parts_is_not_resumed_on_another_base(
    command: Callable[..., int], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    write_checkpoint(tmp_path / "checkpoint", TABLE["xls-r"])
    words = flags(prepared, tmp_path / "checkpoint", tmp_path / "run", lora_rank=4)
    assert command(train, *words) == 0
    shutil.rmtree(tmp_path / "checkpoint")
    write_checkpoint(tmp_path / "checkpoint", TABLE["xls-r"], seed=1)
    capsys.readouterr()
    for anyway in ([], ["--resume_anyway"]):
        assert command(train, *words, "--resume_from_checkpoint", "step_000002", *anyway) == 2
        error = capsys.readouterr().err
        assert "belongs to another run, different in the frozen weights of model_name_or_path" in error
    # The same weights in another format and under another name are the same base.
    shutil.rmtree(tmp_path / "checkpoint")
    write_checkpoint(tmp_path / "moved", TABLE["xls-r"]._replace(file_format="bin", weight_norm="weight_g"))
    words[words.index("--model_name_or_path") + 1] = tmp_path / "moved"
    assert command(train, *words, "--resume_from_checkpoint", "step_000002") == 0


@needs_peft
def test_lora_on_random_weights_keeps_everything(command: Callable[..., int], prepared: Path, tmp_path: Path):
    """There is no model to read the rest from."""
    recipe = {"model_config": TINY_MODEL, "vocabulary": "train", "lora_rank": 2, "lora_target_modules": ["v_proj"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = flags(prepared, Path("none"), tmp_path / "run")
    del words[words.index("--model_name_or_path") :][:2]
    words = [word for word in words if word not in ("--model_name_or_path", Path("none"))]
    assert command(train, "--config", tmp_path / "recipe.yaml", *words) == 0
    tensors = load_file(tmp_path / "run/checkpoints/step_000004/tensors.safetensors")
    kept = {name.removeprefix("model/") for name in tensors if name.startswith("model/")}
    assert "wav2vec2.encoder.layers.0.attention.v_proj.base_layer.weight" in kept
    assert command(train, "--config", tmp_path / "recipe.yaml", *words, "--resume_from_checkpoint", "step_000002") == 0
    again = load_file(tmp_path / "run/checkpoints/step_000004/tensors.safetensors")
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


@needs_peft
def test_gradient_checkpointing_changes_no_gradient_of_lora(prepared: Path, tmp_path: Path):
    write_checkpoint(tmp_path, TABLE["xls-r"])
    found = []
    for recomputes in (False, True):
        settings = Settings(model_name_or_path=str(tmp_path), lora_rank=4, gradient_checkpointing=recomputes)
        loaded = load_model(settings, no_texts)
        losses_of_updates(loaded, batch_of(loaded, prepared), updates=3, learning_rate=1e-2)
        found.append({name: value.grad for name, value in loaded.model.named_parameters() if value.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_fsdp_with_parts_is_refused(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_checkpoint(tmp_path / "checkpoint", TABLE["xls-r"])
    accelerator = train.start_processes([], str(tmp_path / "run"))
    monkeypatch.setattr("assembly.asks_for_sharding", lambda: True)
    config = TrainConfig(
        data_dir=str(prepared), output_dir=str(tmp_path / "run"), model_name_or_path=str(tmp_path / "checkpoint"),
        train_adapters=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="train without FSDP"):
        Run(config, accelerator)
    forget_processes()


# --- Recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hausa_mms_adapter", "hubert_english"])
def test_a_recipe_runs_on_a_small_checkpoint_of_its_family(
    name: str, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """As it is written, but for the model, the data and the length."""
    for split, seed in (("train", 1), ("dev", 2), ("test", 3)):
        rows = [(one, samples, text.lower(), who) for one, samples, text, who in make_rows(6, seed)]
        rows = [(one, np.tile(samples, 3), text, who) for one, samples, text, who in rows]
        write_part(tmp_path / "data" / split / "part_1", rows)
    if name == "hausa_mms_adapter":
        write_mms(tmp_path / "checkpoint")
    else:
        write_checkpoint(tmp_path / "checkpoint", TABLE["hubert large"])
        for path in ("vocab.json", "tokenizer_config.json"):  # pre-trained only
            (tmp_path / "checkpoint" / path).unlink()
        weights = load_file(tmp_path / "checkpoint/model.safetensors")
        del weights["lm_head.weight"], weights["lm_head.bias"]
        (tmp_path / "checkpoint/model.safetensors").unlink()
        save_file(weights, tmp_path / "checkpoint/model.safetensors", metadata={"format": "pt"})
    words = flags(tmp_path / "data", tmp_path / "checkpoint", tmp_path / "run", max_steps=2, preflight="warn")
    words = ["--config", REPOSITORY / "configs" / f"{name}.yaml", *words]
    assert command(train, *words) == 0
    shown = capsys.readouterr().out
    assert ("adapters: those of hau" in shown) == (name == "hausa_mms_adapter")
    loaded = load_model(Settings(model_name_or_path=str(tmp_path / "run/model")), no_texts)
    assert loaded.head_fits
    assert loaded.vocabulary.token_ids == (HAUSA if name == "hausa_mms_adapter" else LARGE_960H_VOCABULARY)


@pytest.mark.parametrize("name", ["english_large_plus", "multilingual"])
def test_a_recipe_runs_on_a_small_model_that_writes_english(
    name: str, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """As it is written, but for the model, the data and the length: the moving average and both languages are there."""
    for part in ("one", "two"):
        for split, seed in (("train", 1), ("dev", 2), ("test", 3)):
            rows = [(f"{part}{one}", np.tile(samples, 3), text, who) for one, samples, text, who in make_rows(6, seed)]
            write_part(tmp_path / part / split / "part_1", rows)
    write_checkpoint(tmp_path / "checkpoint", TABLE["wav2vec2"])
    words = flags(tmp_path / "one", tmp_path / "checkpoint", tmp_path / "run", max_steps=2, preflight="warn")
    if name == "multilingual":
        words += ["--data_dir", tmp_path / "one", tmp_path / "two"]
    assert command(train, "--config", REPOSITORY / "configs" / f"{name}.yaml", *words) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "run/train_results.json").read_text())
    if name == "multilingual":
        assert [one["group"] for one in results["best_eval_sets"]] == ["one", "two"]
        assert "rows kept" in shown
    else:
        assert results["best_weights"] in ("trained", "ema")
        assert "augment_speed 0.9 1.0 1.1" in shown


def test_a_published_mms_model_is_evaluated_as_it_is(command: Callable[..., int], mms: Path, tmp_path: Path):
    write_part(tmp_path / "data/test/part_1", make_rows(4, seed=3))
    words = ["--model_name_or_path", mms, "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "results"]
    words += ["--dataloader_num_workers", 0]
    assert command(evaluate, *words) == 2
    assert command(evaluate, *words, "--target_lang", "hau") == 0
    assert json.loads((tmp_path / "results/results.json").read_text())["target_lang"] == "hau"


def test_parameters_trained_are_said(mms: Path):
    """The screen's line: adapters of two layers of width 4, and a head of 13 outputs."""
    loaded = load_model(Settings(model_name_or_path=str(mms), target_lang="hau", train_adapters=True), no_texts)
    hidden, dim = 32, 4
    per_layer = 2 * hidden + (hidden * dim + dim) + (dim * hidden + hidden)
    assert parameter_counts(loaded.model)[0] == 2 * per_layer + 13 * hidden + 13


@pytest.mark.slow
def test_the_benchmark_of_low_resource_measures_what_it_says():
    command = [sys.executable, "benchmarks/low_resource.py", "--architecture", "small", "--seconds", "1"]
    command += ["--ways", "encoder", "adapters"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, *rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["encoder", "adapters"]
    encoder, adapters_alone = ([float(word.strip("%").replace(",", "")) for word in row[1:]] for row in rows)
    assert adapters_alone[1] < 20 < encoder[1]  # percent of the weights
    assert adapters_alone[4] < encoder[4] / 2  # checkpoint
