"""pretrained.py: checkpoints of every kind become models, and what is wrong with one is said in a line."""

import fnmatch
import functools
import json
import pathlib
import pickle
import shutil
import struct
import warnings
from typing import Any

import pytest
import torch
from architectures import (
    GROUP,
    LARGE_960H,
    XLS_R_300M,
    Settings,
    no_texts,
    pad,
    plain_transformers,
    shrink,
    tiny,
    waves,
    write_published_like_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CTC_MAPPING, Wav2Vec2ForCTC, pipeline

import pretrained
from errors import UsageError
from metrics import greedy_decode
from model import parameter_counts
from pretrained import LoadedModel, load_model, save_model
from text import LARGE_960H_VOCABULARY

# WavLM's own call of torch's attention; model.py silences it outside of pytest, which resets the filters.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


def texts() -> list[str]:
    return ["Ƙofar gida,", "ɗan uwa. Ƴa"]


# --- Saving and loading --------------------------------------------------------------------------------------------


def test_saved_model_is_transformers_own(tmp_path):
    loaded = tiny({"model_type": "wav2vec2", **GROUP})
    with torch.no_grad():  # A sharp head, so that the text is not all blanks.
        loaded.model.hf.lm_head.weight.mul_(50)
    save_model(loaded, tmp_path / "ours")
    plain_transformers(loaded.model).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    names = [name.removeprefix("hf.") for name, _ in loaded.model.named_parameters()]
    assert names == [name for name, _ in plain_transformers(loaded.model).named_parameters()]

    wave = waves([16000])[0]
    logits, frames = loaded.model.eval()(wave[None], [16000])
    again = load_model(Settings(model_name_or_path=str(tmp_path / "ours")), no_texts)
    assert again.head_fits
    assert torch.equal(again.model.eval()(wave[None], [16000])[0], logits)
    assert torch.equal(Wav2Vec2ForCTC.from_pretrained(tmp_path / "ours").eval()(wave[None]).logits, logits)

    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = {"vocab_size": 32, "pad_token_id": 0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
    assert {name: config[name] for name in expected} == expected
    recogniser = pipeline("automatic-speech-recognition", model=str(tmp_path / "ours"), device="cpu")
    assert len(recogniser.tokenizer) == config["vocab_size"]
    normalised = loaded.processor.feature_extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_values
    logits, frames = loaded.model(normalised, [16000])
    text = greedy_decode(logits, frames, loaded.vocabulary)[0]
    assert len(text) > 20
    assert recogniser({"raw": wave.numpy(), "sampling_rate": 16000})["text"] == text


@pytest.mark.parametrize("weight_norm", ["weight_g", "parametrizations"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_published_large_960h(tmp_path, file_format, weight_norm):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), file_format, weight_norm)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert loaded.head_fits
    assert loaded.notes == [
        "vocabulary: 32 tokens of the checkpoint's tokenizer",
        "weights: wav2vec2.masked_spec_embed drawn anew, not in the checkpoint",
    ]
    assert loaded.vocabulary.token_ids == LARGE_960H_VOCABULARY
    assert loaded.processor.feature_extractor.do_normalize
    assert weights_of(loaded).keys() >= file_weights(tmp_path).keys()
    assert all(torch.equal(weights_of(loaded)[key], value) for key, value in file_weights(tmp_path).items())


@pytest.mark.parametrize("weight_norm", ["weight_g", "parametrizations"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_published_xls_r(tmp_path, file_format, weight_norm):
    write_published_like_checkpoint(tmp_path, shrink(XLS_R_300M), file_format, weight_norm)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), texts)
    assert not loaded.head_fits
    assert loaded.vocabulary.token_ids == {
        token: index for index, token in enumerate(["<pad>", "<unk>", "|", *"adfginoruwƙƴɗ"])
    }
    assert loaded.notes == [
        "vocabulary: 16 tokens built from the training text, for the checkpoint has no tokenizer",
        "head: new, 16 outputs; there was none",
        "weights: wav2vec2.masked_spec_embed drawn anew, not in the checkpoint",
        "weights: 7 of the checkpoint not used (project_hid, project_q, quantizer)",
    ]
    assert loaded.model.hf.lm_head.out_features == len(loaded.processor.tokenizer) == 16
    assert loaded.processor.feature_extractor.return_attention_mask
    unused = ("quantizer", "project_")
    kept = {key: value for key, value in file_weights(tmp_path).items() if not key.startswith(unused)}
    assert all(torch.equal(weights_of(loaded)[key], value) for key, value in kept.items())


def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return loaded.model.hf.state_dict()


def file_weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    tensors = load_file(path) if path.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {functools.reduce(lambda k, old: k.replace(old, new[old]), new, key): v for key, v in tensors.items()}


def test_new_head_depends_on_the_seed_alone(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(XLS_R_300M), "safetensors")

    def drawn(seed: int, global_seed: int) -> list[torch.Tensor]:
        torch.manual_seed(global_seed)
        loaded = load_model(Settings(model_name_or_path=str(tmp_path), seed=seed), texts)
        return [loaded.model.hf.lm_head.weight, loaded.model.hf.wav2vec2.masked_spec_embed]

    torch.manual_seed(5)
    expected_next = torch.rand(1)
    first, again, other = drawn(1, 5), drawn(1, 6), drawn(2, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.rand(1), expected_next)  # Loading left the global generator where it was.
    assert abs(first[0].std().item() - 0.02) < 0.004


def test_random_weights_depend_on_the_seed_alone():
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        return weights_of(tiny({"model_type": "wav2vec2"}, seed=seed))

    first = drawn(1)
    torch.rand(3)
    assert all(torch.equal(value, drawn(1)[key]) for key, value in first.items())
    assert not torch.equal(first["lm_head.weight"], drawn(2)["lm_head.weight"])


@pytest.mark.parametrize("vocabulary", ["train", "path"])
def test_head_is_replaced_when_the_vocabulary_differs(tmp_path, vocabulary):
    write_published_like_checkpoint(tmp_path / "model", shrink(LARGE_960H), "safetensors")
    if vocabulary == "path":  # The same size, other letters.
        swapped = {{"A": "B", "B": "A"}.get(token, token): index for token, index in LARGE_960H_VOCABULARY.items()}
        (tmp_path / "mine.json").write_text(json.dumps(swapped))
        vocabulary = str(tmp_path / "mine.json")
    settings = Settings(model_name_or_path=str(tmp_path / "model"), vocabulary=vocabulary, head="new")
    loaded = load_model(settings, texts)
    size = len(loaded.vocabulary)
    assert not loaded.head_fits
    assert f"head: new, {size} outputs; --head new leaves the checkpoint's 32 out" in loaded.notes
    assert loaded.model.hf.lm_head.out_features == loaded.model.hf.config.vocab_size == size
    assert not torch.equal(loaded.model.hf.lm_head.weight[:5], file_weights(tmp_path / "model")["lm_head.weight"][:5])


def test_rare_characters_stay_unknown_and_are_named(tmp_path):
    """`<unk>` is what is learned and written for them, as often as the note says that they are there."""
    write_published_like_checkpoint(tmp_path / "model", shrink(LARGE_960H), "safetensors")
    settings = {"model_name_or_path": str(tmp_path / "model"), "vocabulary": "train"}
    rare = ["aab bx|", "ab qq\u0301"]
    loaded = load_model(Settings(**settings, vocabulary_min_count=3), lambda: rare)
    assert loaded.vocabulary.token_ids == {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}
    assert loaded.notes[1] == (
        "unknown: x 1, U+0301 1, q 2, seen fewer than 3 times: learned as <unk>, written as <unk>, counted as errors"
    )
    assert loaded.vocabulary.encode("ax").tolist() == [3, 1]
    assert loaded.vocabulary.decode_labels([3, 1]) == "a<unk>"
    all_kept = load_model(Settings(**settings), lambda: rare)
    assert not any(note.startswith("unknown") for note in all_kept.notes)
    with pytest.raises(UsageError, match=r"no character at least 9 times: .* --vocabulary_min_count"):
        load_model(Settings(**settings, vocabulary_min_count=9), lambda: rare)


def test_checkpoint_of_another_blank(tmp_path):
    """Many community models have [PAD] last, and a tokenizer class that adds `<s>` and `</s>` (trap 19)."""
    labels = {"|": 0, "a": 1, "b": 2, "[UNK]": 3, "[PAD]": 4}
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"lm_head.weight": torch.rand(5, 32), "lm_head.bias": torch.rand(5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    files = {
        "config.json": shrink(LARGE_960H).config | {"vocab_size": 5, "pad_token_id": 0},
        "vocab.json": labels,
        "special_tokens_map.json": special,
        "tokenizer_config.json": special | {"tokenizer_class": "Wav2Vec2CTCTokenizer"},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert loaded.head_fits
    assert loaded.vocabulary.token_ids == labels
    assert loaded.vocabulary.blank_id == loaded.model.hf.config.pad_token_id == 4
    assert torch.equal(loaded.model.hf.lm_head.weight, tensors["lm_head.weight"])


def test_tokens_added_beside_the_vocabulary_file(tmp_path):
    """The layout of transformers 4's fine-tuning scripts: `<s>` and `</s>` in a file of their own, and in the head."""
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    labels = {token: index for token, index in LARGE_960H_VOCABULARY.items() if token not in ("<s>", "</s>")}
    labels = {token: index for index, token in enumerate(labels)}
    (tmp_path / "vocab.json").write_text(json.dumps(labels))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 30, "</s>": 31}))
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert loaded.head_fits
    assert loaded.vocabulary.token_ids == labels | {"<s>": 30, "</s>": 31}


def test_nested_vocabulary(tmp_path):
    """MMS: one vocabulary per language in one file."""
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    (tmp_path / "vocab.json").write_text(json.dumps({"hau": {"<pad>": 0}, "eng": LARGE_960H_VOCABULARY}))
    edit(tmp_path, "tokenizer_config.json", target_lang="eng")
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert loaded.head_fits
    assert loaded.vocabulary.token_ids == LARGE_960H_VOCABULARY
    save_model(loaded, tmp_path / "saved")
    assert load_model(Settings(model_name_or_path=str(tmp_path / "saved")), no_texts).head_fits


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm"])
def test_encoder_published_without_a_head_class(tmp_path, family):
    """hubert-base-ls960 and wavlm-base hold the bare encoder, whose keys lack the family's prefix."""
    bare = tiny({"model_type": family, **GROUP}).model.hf.base_model
    save_file(bare.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    bare.config.save_pretrained(tmp_path)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), texts)
    assert all(
        torch.equal(loaded.model.hf.base_model.state_dict()[key], value) for key, value in bare.state_dict().items()
    )
    assert loaded.notes[1:] == [
        "head: new, 16 outputs; there was none",
        "feature extractor: the checkpoint has none; waveforms get zero mean and unit variance",
    ]


def test_half_precision_files_become_fp32(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    tensors = {key: value.half() for key, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_overrides_reach_the_model(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    overrides = {"attention_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0}
    loaded = load_model(Settings(model_name_or_path=str(tmp_path), model_overrides=overrides), no_texts)
    assert loaded.model.hf.wav2vec2.encoder.layers[0].attention.dropout == 0.0
    assert not loaded.model.masks_time
    assert not any("masked_spec_embed" in name for name, _ in loaded.model.named_parameters())


def test_mask_embedding_of_a_checkpoint_may_go_unused(tmp_path):
    save_model(tiny({"model_type": "wav2vec2", "mask_time_prob": 0.1}), tmp_path)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path), model_overrides={"mask_time_prob": 0}), no_texts)
    assert "weights: 1 of the checkpoint not used (wav2vec2)" in loaded.notes


def test_nothing_of_transformers_reaches_the_screen(tmp_path, capfd):
    write_published_like_checkpoint(tmp_path, shrink(XLS_R_300M), "bin")
    verbosity = pretrained.transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(load_model(Settings(model_name_or_path=str(tmp_path)), texts), tmp_path / "saved")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert pretrained.transformers_logging.get_verbosity() == verbosity
    assert pretrained.transformers_logging.is_progress_bar_enabled()


# --- Bad input -----------------------------------------------------------------------------------------------------


def edit(folder: pathlib.Path, name: str, **fields: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def tensors(folder: pathlib.Path, change: Any) -> None:
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "wav2vec2.encoder.layers.0.layer_norm.weight"
BAD_CHECKPOINTS = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{nope"), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "a mapping is needed"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not JSON"),
    "config of wrong types": (lambda f: edit(f, "config.json", hidden_size="wide"), "is not a wav2vec2 configuration"),
    "unequal convolutions": (lambda f: edit(f, "config.json", conv_stride=[5, 2]), "conv"),
    "unknown family": (lambda f: edit(f, "config.json", model_type="nonsense"), "model_type is 'nonsense'"),
    "no family": (lambda f: (f / "config.json").write_text("{}"), "model_type is None"),
    "Whisper": (lambda f: edit(f, "config.json", model_type="whisper"), "model_type is 'whisper'"),
    "Wav2Vec2-BERT": (lambda f: edit(f, "config.json", model_type="wav2vec2-bert"), "model_type is 'wav2vec2-bert'"),
    "adapter": (lambda f: edit(f, "config.json", add_adapter=True), "add_adapter"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "cut weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "cannot be read as weights",
    ),
    "weights of zeros": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**62)),
        "cannot be read as weights",
    ),
    "a key missing": (lambda f: tensors(f, lambda t: t.pop(NORM)), f"missing: {NORM}"),
    "a key too many": (
        lambda f: tensors(f, lambda t: t.update({"classifier.weight": torch.ones(2)})),
        "unexpected: classifier.weight",
    ),
    "another shape": (lambda f: tensors(f, lambda t: t.update({NORM: torch.ones(5)})), f"shape of {NORM}"),
    "vocabulary not a mapping": (lambda f: (f / "vocab.json").write_text("[1]"), "vocab.json holds a list"),
    "vocabulary with a gap": (lambda f: edit(f, "vocab.json", Z=40), "31 is missing"),
    "a tokenizer of phonemes": (
        lambda f: edit(f, "tokenizer_config.json", tokenizer_class="Wav2Vec2PhonemeCTCTokenizer"),
        "Wav2Vec2PhonemeCTCTokenizer",
    ),
    "attention from the Hub": (
        lambda f: edit(f, "config.json", attn_implementation="somebody/kernel"),
        "names code to download ('somebody/kernel')",
    ),
    "quantized": (lambda f: edit(f, "config.json", quantization_config={"quant_method": "gptq"}), "is quantized"),
    "another rate": (lambda f: edit(f, "preprocessor_config.json", sampling_rate=8000), "hears 8000 Hz"),
    "features, not waveforms": (
        lambda f: (f / "preprocessor_config.json").write_text("{"),
        "feature extractor cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint_is_refused_in_one_line(tmp_path, case):
    spoil, message = BAD_CHECKPOINTS[case]
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    spoil(tmp_path)
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path=str(tmp_path)), texts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_VOCABULARIES = [
    ("[1, 2]", "holds a list, a mapping is needed"),
    ("not json", "is not JSON"),
    ('{"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 3}', "'a' and 'b' share the id 3"),
    ('{"<pad>": 0, "<unk>": 1, "|": 2, "a": 4}', "3 is missing"),
    ('{"<pad>": 0, "<unk>": 1, "|": 2, "a": "3"}', "the id of 'a' is '3'"),
    ('{"<pad>": 0, "<unk>": 1, "|": 2, "a": true}', "the id of 'a' is True"),
    ('{"<unk>": 0, "|": 1, "a": 2}', "<pad>"),
]


@pytest.mark.parametrize(("content", "message"), BAD_VOCABULARIES)
def test_bad_vocabulary_file_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message.replace("|", r"\|")):
        tiny({"model_type": "wav2vec2"}, vocabulary=str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name_or_path": "/no/such/folder"}, "there is no such folder"),
        ({"model_name_or_path": "./model"}, "there is no such folder"),
        ({"model_name_or_path": __file__}, "is a file"),
        ({"model_name_or_path": "two words/x"}, "neither a folder nor a name"),
        ({"model_config": {"model_type": "whisper"}}, "model_type is 'whisper'"),
        (
            {"model_config": {"model_type": "wav2vec2", "hiden_size": 3}},
            "unknown field hiden_size, nearest is hidden_size",
        ),
        ({"model_config": {"model_type": "wav2vec2", "vocab_size": 3}}, "vocab_size follows from the vocabulary"),
        ({"model_config": {"model_type": "wav2vec2", "hidden_size": 30, "num_attention_heads": 4}}, "does not make a"),
        ({"model_config": {"model_type": "wav2vec2", "hidden_size": "wide"}}, "hidden_size"),
        ({"model_config": {"model_type": "wav2vec2", "conv_dim": [4]}}, "same length"),
        ({"model_config": {"model_type": "wav2vec2"}, "vocabulary": "model"}, "no tokenizer"),
        ({"model_config": {"model_type": "wav2vec2"}, "vocabulary": "/no/vocab.json"}, "there is no such file"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(UsageError) as caught:
        load_model(Settings(**settings), texts)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreachable_hub_names_the_download_command(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError) as caught:
        load_model(Settings(model_name_or_path="somebody/not-here"), no_texts)
    assert "hf download somebody/not-here --local-dir not-here" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_download_is_told_in_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionResetError("reset\nby peer")

    monkeypatch.setattr(pretrained, "snapshot_download", fail)
    with pytest.raises(UsageError, match=r"the download of somebody/x failed .*reset by peer.* hf download somebody/x"):
        load_model(Settings(model_name_or_path="somebody/x"), no_texts)


@pytest.mark.parametrize(("file_format", "downloads"), [("safetensors", 1), ("bin", 2)])
def test_bin_is_downloaded_only_where_there_is_no_safetensors(tmp_path, monkeypatch, file_format, downloads):
    write_published_like_checkpoint(tmp_path / "hub", shrink(LARGE_960H), file_format)
    (tmp_path / "disk").mkdir()
    asked = []

    def download(name: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        for path in (tmp_path / "hub").iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path / "disk")
        return str(tmp_path / "disk")

    monkeypatch.setattr(pretrained, "snapshot_download", download)
    assert load_model(Settings(model_name_or_path="facebook/wav2vec2-large-960h"), no_texts).head_fits
    assert [any("bin" in pattern for pattern in patterns) for patterns in asked] == [False, True][:downloads]


def test_poisoned_pickle_is_not_executed(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "bin")
    trap = tmp_path / "executed"

    class Poison:
        def __reduce__(self):
            return (pathlib.Path.touch, (trap,))

    for write in (
        lambda path: torch.save({"x": Poison()}, path),
        lambda path: path.write_bytes(pickle.dumps(Poison())),
    ):
        write(tmp_path / "pytorch_model.bin")
        with pytest.raises(UsageError, match="cannot be read as weights"):
            load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert not trap.exists()


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    write_published_like_checkpoint(tmp_path, shrink(LARGE_960H), "safetensors")
    trap = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(trap)!r}).touch()")
    remote = {
        "AutoConfig": "evil.C",
        "AutoModelForCTC": "evil.M",
        "AutoTokenizer": "evil.T",
        "AutoFeatureExtractor": "evil.F",
    }
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        edit(tmp_path, name, auto_map=remote)
    load_model(Settings(model_name_or_path=str(tmp_path)), no_texts)
    assert not trap.exists()


def test_every_family_is_one_of_transformers():
    assert all(CONFIG_MAPPING[family] in MODEL_FOR_CTC_MAPPING for family in pretrained.FAMILIES)


@pytest.mark.xdist_group("large")
@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("architecture", [LARGE_960H, XLS_R_300M], ids=lambda a: a.name)
def test_real_architectures(tmp_path, architecture, file_format):
    write_published_like_checkpoint(tmp_path, architecture, file_format)
    loaded = load_model(Settings(model_name_or_path=str(tmp_path), freeze_feature_encoder=True), texts)
    assert loaded.head_fits != architecture.is_pretrained_only
    trained, frozen = parameter_counts(loaded.model)
    assert 310e6 < trained + frozen < 320e6
    ours, rows = loaded.model.eval(), waves([16000, 9000])
    with torch.no_grad():
        together, frames = ours(pad(rows), [16000, 9000])
        alone, _ = ours(rows[1][None], [9000])
        theirs = plain_transformers(ours)(rows[1][None]).logits
    assert torch.equal(alone, theirs)
    torch.testing.assert_close(together[1, : frames[1]], alone[0], atol=1e-4, rtol=0)
