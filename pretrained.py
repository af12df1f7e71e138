"""Models from files and to files: a checkpoint or a configuration becomes a CTCModel with its processor and labels.

Foreign files are data, never code: safetensors, or .bin through `weights_only=True`, and no class that they name.
"""

import contextlib
import difflib
import functools
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CTC_MAPPING,
    MODEL_FOR_PRETRAINING_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)
from transformers.utils import logging as transformers_logging

import adapters
import lora
from audio import SAMPLE_RATE_HZ
from errors import RunFailed, UsageError
from findings import some_of
from head import plan_growth, take_rows
from integrity import hash_file
from languages import find_language, nearest_letters
from model import CTCModel
from pretraining import PretrainingModel
from sharding import weights_of
from text import (
    LARGE_960H_VOCABULARY,
    TextNormalizer,
    Vocabulary,
    build_tokenizer,
    build_vocabulary,
    count_characters,
    resolve_case,
    visible,
)

if TYPE_CHECKING:
    from config import PretrainConfig, TrainConfig

HUB_TIMEOUT_SECONDS = 10
# Of a saved model, where adapters or LoRA were trained alone.
PARTS_FOLDER = "adapter"
# Characters without an output that are named on the screen.
RARE_SHOWN = 20
# Families whose pre-training is wav2vec 2.0's, and why the others' is not.
PRETRAINING_FAMILIES = ("wav2vec2", "wav2vec2-conformer")
OTHER_OBJECTIVES = {
    "hubert": "predicts clusters of an earlier model",
    "wavlm": "predicts clusters of an earlier model",
    "data2vec-audio": "predicts what a slower copy of itself hears",
    "unispeech": "learns from transcripts too, and transformers has no loss for it",
    "unispeech-sat": "learns from clusters and speakers, and transformers has no loss for it",
}
# Families that take waveforms and whose frame count follows from the convolutions alone.
FAMILIES = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "wav2vec2-conformer")
# Families that are met, and cannot be trained here: why, and what can instead.
REFUSED = {
    "wav2vec2-bert": "takes log-mel features, not waveforms; use facebook/wav2vec2-xls-r-300m or facebook/mms-1b-all",
    "whisper": "writes text token by token from log-mel features, without CTC; use facebook/wav2vec2-xls-r-300m",
    "seamless_m4t": "writes text token by token from filter banks, without CTC; use facebook/mms-1b-all",
    "seamless_m4t_v2": "writes text token by token from filter banks, without CTC; use facebook/mms-1b-all",
    "speech_to_text": "writes text token by token from filter banks, without CTC; use facebook/wav2vec2-base-960h",
    "speecht5": "writes text token by token, without CTC; use microsoft/wavlm-base-plus",
    "moonshine": "writes text token by token, without CTC; use facebook/wav2vec2-base-960h",
    "mctct": "takes log-mel features, not waveforms, and transformers 5 has dropped it; use facebook/mms-1b-all",
    "parakeet_ctc": "takes log-mel features, not waveforms; use facebook/wav2vec2-large-960h",
    "lasr_ctc": "takes log-mel features, not waveforms; use facebook/wav2vec2-large-960h",
    "granite_speech5_ctc": "takes log-mel features, not waveforms; use facebook/wav2vec2-large-960h",
    "omniasr_ctc": "has a vocabulary of word pieces and its encoder's settings in a part of their own, which is not "
    "read here; use facebook/mms-1b-all",
    # Their layers see every second frame, pooled across the end of a shorter row: a text would depend on the batch.
    "sew": "halves the frames between convolutions and layers, for which padding is not masked here; use facebook/"
    "wav2vec2-base",
    "sew-d": "halves the frames between convolutions and layers, for which padding is not masked here; use facebook/"
    "wav2vec2-base",
}
# Any other attention named by a config.json would be fetched from the Hub and run.
ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flex_attention")
# What separates a pre-training checkpoint from a fine-tuned one (field-notes, trap 34). Anything else is refused.
MISSING_ALLOWED = re.compile(r"(lm_head\.(weight|bias)|(\w+\.)?masked_spec_embed)$")
UNEXPECTED_ALLOWED = re.compile(r"((quantizer|project_q|project_hid)\..+|(\w+\.)?masked_spec_embed)$")
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)


@dataclass
class LoadedModel:
    """A model with the processor and labels that belong to it."""

    model: CTCModel
    processor: Wav2Vec2Processor
    vocabulary: Vocabulary
    notes: list[str]
    """What happened and must be said aloud: vocabulary, new head, missing and unexpected weights."""
    head_fits: bool
    """The head was trained for this very vocabulary, so the model can be scored before training."""
    write_parts: Callable[[Path], None] | None = None
    """Adapters, LoRA: writes what is trained alone into a new folder, in the small format of its own."""


def load_model(config: "TrainConfig", training_texts: Callable[[], Iterable[str]]) -> LoadedModel:
    """Load a checkpoint, or build a model from `config.model_config` with random weights.

    Args:
        config: the settings of the run.
        training_texts: gives the raw training transcripts, normalised ones where each set has a language of its own;
            called only when the vocabulary is built from them.

    Raises:
        UsageError: for everything that is wrong with the checkpoint, the configuration or the vocabulary.
    """
    with _quiet_transformers():
        if config.model_name_or_path is not None:
            return _load_checkpoint(config, training_texts)
        return _build_from_config(config, training_texts)


def load_recogniser(name: str, target_lang: str | None = None) -> LoadedModel:
    """A fine-tuned model, to be scored or to write texts; of one with many languages, one of them.

    Raises:
        UsageError: there is none, it is damaged, or its head has not been trained.
    """
    from config import TrainConfig

    config = TrainConfig(model_name_or_path=name, vocabulary="model", target_lang=target_lang)
    loaded = load_model(config, lambda: [])
    if not loaded.head_fits:
        raise UsageError(f"{name} has no head for its vocabulary, it cannot write yet: fine-tune it with train.py")
    return loaded


def _load_checkpoint(config: "TrainConfig", training_texts: Callable[[], Iterable[str]]) -> LoadedModel:
    folder = find_checkpoint_folder(config.model_name_or_path, config.target_lang)
    hf_config = _read_config(folder)
    _settle(hf_config, config, folder)
    adapters_are_new = config.train_adapters and adapters.prepare(hf_config, config.adapter_attn_dim, folder)
    weights_file = _find_weights(folder)
    is_needed = config.vocabulary in ("auto", "model")
    tokenizer = _read_tokenizer(folder, hf_config.vocab_size, is_needed, config.target_lang)
    labels, notes = _choose_vocabulary(config, tokenizer, training_texts)
    same_labels = tokenizer is not None and labels == tokenizer.get_vocab()
    old_labels = None if tokenizer is None else Vocabulary.from_tokenizer(tokenizer)
    tokenizer = tokenizer if same_labels else build_tokenizer(labels)

    trained_outputs = hf_config.vocab_size
    weights = _read_weights(folder, hf_config, weights_file, config.seed, RECOGNITION, adapters_are_new)
    hf = weights.model
    if config.target_lang is not None:
        weights = _load_language(weights, folder, config.target_lang, len(old_labels))
        trained_outputs = len(old_labels)
        notes.append(f"adapters: those of {config.target_lang}")
    elif hf_config.to_dict().get("adapter_attn_dim") is not None and (reason := _lacks_adapters(folder, weights)):
        adapters.draw(hf, config.seed)
        notes.append(f"adapters: drawn anew, {reason}")
    head_fits = same_labels and weights.has_head and trained_outputs == len(labels) and config.head != "new"
    if not head_fits:
        head_fits, said = _replace_head(config, weights, old_labels, Vocabulary.from_tokenizer(tokenizer))
        notes.append(said)
    _set_vocabulary(hf.config, tokenizer, len(labels))
    notes += weights.notes()
    feature_extractor, said = _read_feature_extractor(folder, hf_config)
    return _assemble(config, hf, feature_extractor, tokenizer, notes + said, head_fits)


def _build_from_config(config: "TrainConfig", training_texts: Callable[[], Iterable[str]]) -> LoadedModel:
    hf_config = _make_config(config.model_config, _known_family)
    _settle(hf_config, config, "model_config")
    if config.target_lang is not None:
        raise UsageError("--target_lang names adapters of a checkpoint (MMS), and model_config has random weights")
    if config.train_adapters:
        adapters.prepare(hf_config, config.adapter_attn_dim, "model_config")
    labels, notes = _choose_vocabulary(config, None, training_texts)
    tokenizer = build_tokenizer(labels)
    _set_vocabulary(hf_config, tokenizer, len(labels))
    hf = _draw_model(hf_config, config.seed, RECOGNITION)
    _draw_head(hf.lm_head, hf_config, config.seed)
    notes.append(f"model: {hf_config.model_type} with random weights")
    feature_extractor, _ = _default_feature_extractor(hf_config)
    return _assemble(config, hf, feature_extractor, tokenizer, notes, head_fits=False)


def _assemble(
    config: "TrainConfig",
    hf: PreTrainedModel,
    feature_extractor: Wav2Vec2FeatureExtractor,
    tokenizer: Wav2Vec2CTCTokenizer,
    notes: list[str],
    head_fits: bool,
) -> LoadedModel:
    model = CTCModel(hf)
    if config.freeze_feature_encoder:
        model.freeze_feature_encoder()
    write_parts = None
    if config.train_adapters:
        adapters.train_alone(model)
        language = config.target_lang or adapters.UNNAMED
        write_parts = functools.partial(adapters.write, hf=hf, language=language, labels=tokenizer.get_vocab())
    if config.lora_rank is not None:
        with _seeded(config.seed):
            lora.train_alone(model, config)
        name = config.model_name_or_path
        base = None if name is None or Path(name).expanduser().is_dir() else name
        write_parts = functools.partial(lora.write, model=model, base=base)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    processor = Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)
    return LoadedModel(model, processor, Vocabulary.from_tokenizer(tokenizer), notes, head_fits, write_parts)


def find_checkpoint_folder(name: str, target_lang: str | None = None) -> Path:
    """The folder itself, or the snapshot of a Hub repository, downloaded when it is not on the disk yet.

    Args:
        name: of either.
        target_lang: of a repository with many languages, that whose adapters are needed; no other's are downloaded.

    Raises:
        UsageError: there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UsageError(
            f"--model_name_or_path {name} is a file; name the folder that holds config.json and the weights"
        )
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UsageError(f"--model_name_or_path {name}: there is no such folder")
    local = f"hf download {name} --local-dir {Path(name).name}"
    try:
        return Path(_download(name, target_lang))
    except UsageError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UsageError(
            f"--model_name_or_path {name} is no folder here, and the Hugging Face Hub cannot be reached; on a machine "
            f"that can: {local}, then --model_name_or_path {Path(name).name}"
        ) from error
    except HFValidationError as error:
        raise UsageError(
            f"--model_name_or_path {name} is neither a folder nor a name on the Hugging Face Hub"
        ) from error
    except GatedRepoError as error:
        raise UsageError(f"{name} is gated: accept its terms on huggingface.co, then run hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"--model_name_or_path {name} is no folder here, and no public model on the Hugging Face Hub "
            "(a private one needs hf auth login)"
        ) from error
    except Exception as error:  # The HTTP client, and with it the type of its errors, changes with huggingface_hub.
        raise UsageError(f"the download of {name} failed ({_one_line(error)}); try {local}") from error


def read_vocabulary(folder: Path) -> Vocabulary:
    """The labels of a fine-tuned model's folder, without its weights.

    Raises:
        UsageError: it has no tokenizer of characters.
    """
    with _quiet_transformers():
        tokenizer = _read_tokenizer(folder, _read_config(folder).vocab_size, is_needed=True, target_lang=None)
    if tokenizer is None:
        raise UsageError(f"{folder} has no tokenizer (vocab.json), it cannot write yet: fine-tune it with train.py")
    return Vocabulary.from_tokenizer(tokenizer)


def weights_checksum(folder: Path) -> str:
    """sha256 over the weight files of a model folder: which model a setting was tuned for."""
    digests = [hash_file(path) for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _download(name: str, target_lang: str | None) -> str:
    """The path of the snapshot. Without a network the one on the disk is taken, at once and without retries."""
    fetch = functools.partial(snapshot_download, name, etag_timeout=HUB_TIMEOUT_SECONDS)
    if target_lang is not None:
        # An unknown language is refused before gigabytes of weights are on their way.
        _labels_of_language(Path(fetch(allow_patterns=list(TOKENIZER_FILES))), target_lang)
        for pattern in adapters.LANGUAGE_FILES:
            folder = Path(fetch(allow_patterns=[pattern.format(target_lang)]))
            if (folder / pattern.format(target_lang)).is_file():
                break
    folder = fetch(allow_patterns=["config.json", "model*.safetensors*", *TOKENIZER_FILES, *PROCESSOR_FILES])
    if not any((Path(folder) / weights).is_file() for weights in WEIGHT_FILES):
        folder = fetch(allow_patterns=["pytorch_model*.bin*"])
    return folder


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is not a checkpoint: it has no config.json")
    fields = _read_json(path)
    family = _known_family(fields.get("model_type"), path)
    for name in ("attn_implementation", "_attn_implementation"):
        if fields.get(name) not in ATTENTIONS:
            raise UsageError(
                f"{path}: {name} names code to download ({fields[name]!r}), which is never run; take it out"
            )
    if fields.get("quantization_config") is not None:
        raise UsageError(f"{path}: the checkpoint is quantized and cannot be trained; use the original one")
    try:
        # The class of the family, never one named by the folder: no remote code.
        return CONFIG_MAPPING[family].from_pretrained(folder)
    except UNREADABLE as error:
        raise UsageError(f"{path} is not a {family} configuration: {_one_line(error)}") from error


def _known_family(family: Any, source: object) -> str:
    if family in FAMILIES:
        return family
    if family in REFUSED:
        raise UsageError(f"{source}: model_type is {family!r}, which {REFUSED[family]}")
    raise UsageError(
        f"{source}: model_type is {family!r}; a family that turns waveforms into CTC is needed: {', '.join(FAMILIES)}"
    )


def _make_config(model_config: Mapping[str, Any], known_family: Callable[[Any, object], str]) -> PretrainedConfig:
    """The configuration that `model_config` of a recipe describes, of a family that `known_family` does not refuse."""
    fields = dict(model_config)
    hf_config = CONFIG_MAPPING[known_family(fields.pop("model_type", None), "model_config")]()
    _override(hf_config, fields, "model_config")
    return hf_config


def _settle(hf_config: PretrainedConfig, config: "TrainConfig | PretrainConfig", source: object) -> None:
    """Change what the run's settings change, and check the whole."""
    _override(hf_config, (config.model_overrides or {}) | config.encoder_settings, "model_overrides")
    _check_architecture(hf_config, source)


def _check_architecture(hf_config: PretrainedConfig, source: object) -> None:
    # transformers derives it from conv_dim when a configuration is made, not when a field is changed.
    hf_config.num_feat_extract_layers = len(hf_config.conv_dim)
    if getattr(hf_config, "add_adapter", False):
        raise UsageError(
            f"{source}: add_adapter shortens the frames behind the encoder and is not supported; set it to false"
        )
    if not len(hf_config.conv_dim) == len(hf_config.conv_kernel) == len(hf_config.conv_stride):
        raise UsageError(f"{source}: conv_dim, conv_kernel and conv_stride must have the same length")


def _override(hf_config: PretrainedConfig, fields: Mapping[str, Any], source: str) -> None:
    # Data2Vec-audio's model reads the first, and its configuration lacks it.
    known = {"apply_spec_augment"} | (hf_config.to_dict().keys() - {"model_type", "vocab_size", "pad_token_id"})
    problems = []
    for name, value in fields.items():
        if name in ("vocab_size", "pad_token_id"):
            problems.append(f"{name} follows from the vocabulary, take it out")
        elif name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            problems.append(f"unknown field {name}" + (f", nearest is {nearest[0]}" if nearest else ""))
        else:
            try:
                setattr(hf_config, name, value)
            except UNREADABLE as error:
                problems.append(f"{name}: {_one_line(error)}")
    if problems:
        raise UsageError(f"{source}: " + "; ".join(problems))


def _choose_vocabulary(
    config: "TrainConfig", tokenizer: Wav2Vec2CTCTokenizer | None, training_texts: Callable[[], Iterable[str]]
) -> tuple[dict[str, int], list[str]]:
    """The labels as token to id, and what is to be said about them."""
    choice = config.vocabulary
    if choice == "model" and tokenizer is None:
        raise UsageError("--vocabulary model: the checkpoint has no tokenizer (vocab.json); use --vocabulary train")
    if choice == "large_960h":
        return dict(LARGE_960H_VOCABULARY), ["vocabulary: the 32 tokens of facebook/wav2vec2-large-960h"]
    if choice == "model" or (choice == "auto" and tokenizer is not None):
        if config.vocabulary_min_count > 1:
            raise UsageError(
                f"--vocabulary_min_count {config.vocabulary_min_count} does nothing with the checkpoint's own "
                "vocabulary: give --vocabulary train, or leave it out"
            )
        labels = tokenizer.get_vocab()
        return labels, [f"vocabulary: {len(labels)} tokens of the checkpoint's tokenizer"]
    if choice not in ("auto", "train"):
        labels = _read_vocabulary(Path(choice).expanduser())
        return labels, [f"vocabulary: {len(labels)} tokens of {choice}"]
    normalizer = text_rules(config)
    # Where each set has its language, only the set knows the rules, and the texts come as they are to be.
    are_raw = len(config.languages) < 2
    counts = count_characters(normalizer(text) if are_raw else text for text in training_texts())
    labels = build_vocabulary(counts, config.vocabulary_min_count)
    because = ", for the checkpoint has no tokenizer" if choice == "auto" and config.model_name_or_path else ""
    notes = [f"vocabulary: {len(labels)} tokens built from the training text{because}"]
    rare = sorted((count, character) for character, count in counts.items() if count < config.vocabulary_min_count)
    if rare := [f"{visible(character)} {count}" for count, character in rare if character not in " |"]:
        notes.append(
            f"unknown: {some_of(rare, RARE_SHOWN)}, seen fewer than {config.vocabulary_min_count} times: learned as "
            "<unk>, written as <unk>, counted as errors"
        )
    return labels, notes


def text_rules(config: "TrainConfig") -> TextNormalizer:
    """The rules for texts that a vocabulary is built from, before there is one."""
    case = "lower" if config.case == "auto" else resolve_case(config.case, {})
    language = find_language(config.languages[0]) if len(config.languages) == 1 else None
    return TextNormalizer(config.characters_to_ignore, case, language=language)


def _read_vocabulary(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise UsageError(f"--vocabulary {path}: there is no such file (auto, model, train and large_960h need none)")
    labels = _read_json(path)
    _check_labels(labels, path)
    return labels


def _check_labels(labels: dict[str, Any], path: Path) -> None:
    """A vocabulary gives each token an id of its own, 0 up to its size."""
    wrong = [token for token, index in labels.items() if type(index) is not int]
    if wrong:
        raise UsageError(f"{path}: the id of {wrong[0]!r} is {labels[wrong[0]]!r}, not a whole number")
    owners: dict[int, str] = {}
    for token, index in labels.items():
        if index in owners:
            raise UsageError(f"{path}: {owners[index]!r} and {token!r} share the id {index}")
        owners[index] = token
    gaps = [index for index in range(len(labels)) if index not in owners]
    if gaps:
        raise UsageError(f"{path}: {len(labels)} tokens need the ids 0 to {len(labels) - 1}, and {gaps[0]} is missing")


def _read_tokenizer(
    folder: Path, head_size: int, is_needed: bool, target_lang: str | None
) -> Wav2Vec2CTCTokenizer | None:
    """The checkpoint's tokenizer; None where it has none, or an unreadable one that is not needed."""
    if target_lang is not None:
        return build_tokenizer(_labels_of_language(folder, target_lang))
    if not (folder / "vocab.json").is_file():
        return None
    if (languages := _nested_languages(folder)) is not None:
        if not is_needed:
            return None
        raise UsageError(
            f"{folder} holds {len(languages)} languages: name one, such as --target_lang {_some(languages, 1)}; for a "
            "language that it lacks, --vocabulary train trains new adapters and a new output layer"
        )
    try:
        tokenizer = _open_tokenizer(folder)
    except UsageError:
        if is_needed:
            raise
        return None
    if len(tokenizer.encoder) == head_size < len(tokenizer.get_vocab()):
        # Trap 19: `<s>` and `</s>` were added by the class, and the head knows nothing of them.
        return build_tokenizer(dict(tokenizer.encoder))
    return tokenizer


def _open_tokenizer(folder: Path) -> Wav2Vec2CTCTokenizer:
    _read_json(folder / "vocab.json")
    settings = _read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    kind = settings.get("tokenizer_class") or "Wav2Vec2CTCTokenizer"
    if kind not in ("Wav2Vec2CTCTokenizer", "Wav2Vec2Tokenizer"):
        raise UsageError(f"{folder}: its tokenizer is a {kind}, which is none of characters; use --vocabulary train")
    try:
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        raise UsageError(f"{folder}: its tokenizer cannot be read: {_one_line(error)}") from error
    _check_labels(tokenizer.get_vocab(), folder / "vocab.json")
    return tokenizer


def _nested_languages(folder: Path) -> dict[str, dict[str, int]] | None:
    """The vocabularies of an MMS checkpoint by language, where nothing in it says which one is meant."""
    try:
        languages = adapters.languages_of(_read_json(folder / "vocab.json"))
    except UsageError:  # told with the tokenizer
        return None
    if languages is None or _read_config(folder).to_dict().get("adapter_attn_dim") is None:
        return None
    return languages


def _labels_of_language(folder: Path, language: str) -> dict[str, int]:
    if not (folder / "vocab.json").is_file():
        raise UsageError(f"--target_lang {language}: {folder} has no vocab.json; leave the flag out")
    labels = adapters.labels_of_language(_read_json(folder / "vocab.json"), language, folder / "vocab.json")
    _check_labels(labels, folder / "vocab.json")
    return labels


def _set_vocabulary(hf_config: PretrainedConfig, tokenizer: Wav2Vec2CTCTokenizer, size: int) -> None:
    assert len(tokenizer) == size, f"tokenizer of {len(tokenizer)} tokens for a head of {size} outputs"
    hf_config.vocab_size = size
    hf_config.pad_token_id = tokenizer.pad_token_id  # transformers takes it for the blank
    labels = tokenizer.get_vocab()
    hf_config.bos_token_id, hf_config.eos_token_id = labels.get("<s>"), labels.get("</s>")
    # For whoever trains on with transformers: "sum" makes the gradient grow with the batch (trap 18).
    hf_config.ctc_loss_reduction, hf_config.ctc_zero_infinity = "mean", True


@dataclass(frozen=True)
class _Weights:
    """A model read from files, with the keys that did not match."""

    model: PreTrainedModel
    missing: set[str]
    unexpected: set[str]
    misshapen: set[str]

    @property
    def has_head(self) -> bool:
        return "lm_head.weight" not in self.missing | self.misshapen

    def notes(self) -> list[str]:
        notes = []
        drawn = {key for key in self.missing if not key.startswith("lm_head.") and not adapters.is_of_adapter(key)}
        if drawn:
            notes.append(f"weights: {_some(drawn)} drawn anew, not in the checkpoint")
        if self.unexpected:
            groups = _some({key.split(".")[0] for key in self.unexpected})
            notes.append(f"weights: {len(self.unexpected)} of the checkpoint not used ({groups})")
        return notes


def _find_weights(folder: Path) -> str:
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise UsageError(f"{folder} holds no weights: one of {', '.join(WEIGHT_FILES)} is needed")
    return found[0]


@dataclass(frozen=True)
class _Purpose:
    """Which class of transformers a checkpoint is read into, and which of the keys need not match."""

    classes: Mapping[type, type[PreTrainedModel]]
    missing: re.Pattern[str]
    unexpected: re.Pattern[str]
    around: Callable[[PretrainedConfig], contextlib.AbstractContextManager]


RECOGNITION = _Purpose(
    MODEL_FOR_CTC_MAPPING, MISSING_ALLOWED, UNEXPECTED_ALLOWED, lambda _: contextlib.nullcontext()
)  # fmt: skip
PRETRAINING = _Purpose(
    MODEL_FOR_PRETRAINING_MAPPING,
    re.compile(r"((quantizer|project_q|project_hid)\..+|(\w+\.)?masked_spec_embed)$"),
    re.compile(r"lm_head\.(weight|bias)$"),
    lambda hf_config: _with_mask_embedding(hf_config),
)


def _draw_model(hf_config: PretrainedConfig, seed: int, purpose: _Purpose) -> PreTrainedModel:
    """A model with random weights."""
    try:
        with _seeded(seed), purpose.around(hf_config):
            return purpose.classes[type(hf_config)](hf_config)
    except UNREADABLE as error:
        raise UsageError(f"model_config does not make a {hf_config.model_type} model: {_one_line(error)}") from error


def _read_weights(
    folder: Path,
    hf_config: PretrainedConfig,
    weights: str,
    seed: int,
    purpose: _Purpose,
    adapters_are_new: bool = False,
) -> _Weights:
    """Read safetensors, or .bin without running code; refuse keys that are not on the allow-list."""
    try:
        with _seeded(seed), purpose.around(hf_config):
            hf, info = purpose.classes[type(hf_config)].from_pretrained(
                folder,
                config=hf_config,
                # Master weights are fp32 whatever the file holds; autocast does the rest.
                dtype=torch.float32,
                use_safetensors="safetensors" in weights,
                weights_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UNREADABLE as error:
        raise UsageError(f"{folder / weights} cannot be read as weights: {_one_line(error)}") from error
    misshapen = {key for key, *_ in info["mismatched_keys"]}
    if wrong := {key for key in misshapen if not key.startswith("lm_head.")}:
        raise UsageError(f"{folder}: weights and config.json disagree on the shape of {_some(wrong)}")
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    lacking = {key for key in missing if not purpose.missing.match(key)}
    if adapters_are_new or "lm_head.weight" in missing:
        lacking = {key for key in lacking if not adapters.is_of_adapter(key)}
    foreign = {key for key in unexpected if not purpose.unexpected.match(key)}
    if lacking or foreign:
        parts = [f"missing: {_some(lacking)}"] if lacking else []
        parts += [f"unexpected: {_some(foreign)}"] if foreign else []
        raise UsageError(f"{folder / weights} does not hold a {hf_config.model_type} model; " + "; ".join(parts))
    return _Weights(hf, missing, unexpected, misshapen)


def _replace_head(
    config: "TrainConfig", weights: _Weights, old_labels: Vocabulary | None, labels: Vocabulary
) -> tuple[bool, str]:
    """Give a model read from files a head for `labels`: grown from its own where that can be read, else drawn.

    Returns:
        Whether the head has been trained for these labels, and what is to be said.

    Raises:
        UsageError: --head grow, and there is no trained head with a tokenizer to grow from.
    """
    hf = weights.model
    old = hf.lm_head
    hf.lm_head = nn.utils.skip_init(nn.Linear, old.in_features, len(labels))
    # All of it is drawn, so that a row without a source is that of a new head.
    _draw_head(hf.lm_head, hf.config, config.seed)
    is_readable = old_labels is not None and max(old_labels.token_ids.values()) < old.out_features
    if weights.has_head and is_readable and config.head != "new":
        growth = plan_growth(old_labels, labels, nearest_letters())
        take_rows(hf.lm_head, old, growth.sources)
        return growth.is_same and old.out_features == len(labels), growth.describe()
    why = f"the checkpoint's {old.out_features} belong to another vocabulary" if weights.has_head else "there was none"
    if config.head == "grow":
        lacks = "a tokenizer that names its outputs" if weights.has_head else "a trained head"
        raise UsageError(
            f"--head grow: {config.model_name_or_path} has no head to grow from, it lacks {lacks}; use auto"
        )
    if weights.has_head and config.head == "new":
        why = f"--head new leaves the checkpoint's {old.out_features} out"
    return False, f"head: new, {len(labels)} outputs; {why}"


def _load_language(weights: _Weights, folder: Path, language: str, size: int) -> _Weights:
    """Put the adapters of a language and its head in place, which has `size` outputs; the weights have a head then."""
    hf = weights.model
    if hf.config.to_dict().get("adapter_attn_dim") is None:
        raise UsageError(f"--target_lang {language}: {folder} has no attention adapters; leave the flag out")
    names = [name.format(language) for name in adapters.LANGUAGE_FILES]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(
            f"--target_lang {language}: {folder} has a vocabulary for it, but neither {' nor '.join(names)}"
        )
    try:
        is_safe = found.suffix == ".safetensors"
        read = load_file(found) if is_safe else torch.load(found, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UsageError(f"{found} cannot be read as the weights of adapters: {_one_line(error)}") from error
    hf.lm_head = nn.utils.skip_init(nn.Linear, hf.lm_head.in_features, size)
    adapters.load_language(hf, read, found)
    head = {"lm_head.weight", "lm_head.bias"}
    return replace(weights, missing=weights.missing - head, misshapen=weights.misshapen - head)


def _lacks_adapters(folder: Path, weights: _Weights) -> str | None:
    """Why a checkpoint has no adapters for this vocabulary; None where it has."""
    if any(adapters.is_of_adapter(key) for key in weights.missing):
        return "the checkpoint has none"
    if (folder / "vocab.json").is_file() and (languages := _nested_languages(folder)) is not None:
        return f"those of the checkpoint belong to its {len(languages)} languages (--target_lang begins with one)"
    return None


def _draw_head(head: nn.Linear, hf_config: PretrainedConfig, seed: int) -> None:
    """Draw as transformers would, but from a generator of its own: the same head whatever else was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, hf_config.initializer_range, generator=generator)
        head.bias.zero_()


def _read_feature_extractor(folder: Path, hf_config: PretrainedConfig) -> tuple[Wav2Vec2FeatureExtractor, list[str]]:
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return _default_feature_extractor(hf_config)
    try:
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    except UNREADABLE as error:
        raise UsageError(f"{folder}: its feature extractor cannot be read: {_one_line(error)}") from error
    if extractor.sampling_rate != SAMPLE_RATE_HZ:
        raise UsageError(f"{folder} hears {extractor.sampling_rate} Hz; prepared data is {SAMPLE_RATE_HZ} Hz")
    return extractor, []


def _default_feature_extractor(hf_config: PretrainedConfig) -> tuple[Wav2Vec2FeatureExtractor, list[str]]:
    masked = getattr(hf_config, "feat_extract_norm", "layer") == "layer"
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE_HZ, do_normalize=True, return_attention_mask=masked)
    return extractor, ["feature extractor: the checkpoint has none; waveforms get zero mean and unit variance"]


# --- Pre-training --------------------------------------------------------------------------------------------------


@dataclass
class LoadedPretraining:
    """A model to pre-train with the feature extractor that belongs to it."""

    model: PretrainingModel
    feature_extractor: Wav2Vec2FeatureExtractor
    notes: list[str]
    """What happened and must be said aloud: weights that were drawn anew, a head that was dropped."""


def load_pretraining_model(config: "PretrainConfig") -> LoadedPretraining:
    """Load a checkpoint to pre-train further, or build a model from `config.model_config` with random weights.

    The masks of the checkpoint's configuration are not touched: they are those of the fine-tuning to come.

    Args:
        config: of its settings model_name_or_path, model_config, model_overrides, encoder_settings,
            freeze_feature_encoder, gradient_checkpointing and seed.

    Raises:
        UsageError: for everything that is wrong with the checkpoint or the configuration, and for a family without
            such a model.
    """
    with _quiet_transformers():
        if config.model_name_or_path is not None:
            return _load_pretraining_checkpoint(config)
        hf_config = _make_config(config.model_config, _pretraining_family)
        _prepare_pretraining_config(hf_config, config, "model_config")
        hf = _draw_model(hf_config, config.seed, PRETRAINING)
        notes = [f"model: {hf_config.model_type} with random weights"]
        return _assemble_pretraining(config, hf, _default_feature_extractor(hf_config)[0], notes)


def _load_pretraining_checkpoint(config: "PretrainConfig") -> LoadedPretraining:
    folder = find_checkpoint_folder(config.model_name_or_path)
    hf_config = _read_config(folder)
    _pretraining_family(hf_config.model_type, folder / "config.json")
    _prepare_pretraining_config(hf_config, config, folder)
    weights = _read_weights(folder, hf_config, _find_weights(folder), config.seed, PRETRAINING)
    weights.model.config.mask_time_prob = hf_config.mask_time_prob  # of a copy that transformers made meanwhile
    feature_extractor, said = _read_feature_extractor(folder, hf_config)
    return _assemble_pretraining(config, weights.model, feature_extractor, weights.notes() + said)


def _pretraining_family(family: Any, source: object) -> str:
    if family in PRETRAINING_FAMILIES:
        return family
    reason = OTHER_OBJECTIVES.get(family, "has no such model in transformers")
    raise UsageError(
        f"{source}: model_type is {family!r}, which {reason}; pre-training continues {', '.join(PRETRAINING_FAMILIES)}"
    )


def _prepare_pretraining_config(hf_config: PretrainedConfig, config: "PretrainConfig", source: object) -> None:
    _settle(hf_config, config, source)
    if hf_config.num_negatives < 1 or hf_config.contrastive_logits_temperature <= 0:
        raise UsageError(
            f"{source}: num_negatives is {hf_config.num_negatives} and contrastive_logits_temperature "
            f"{hf_config.contrastive_logits_temperature}; at least 1, and above 0, are needed"
        )


@contextlib.contextmanager
def _with_mask_embedding(hf_config: PretrainedConfig) -> Iterator[None]:
    """Models made inside have an embedding of masked frames, even where fine-tuning shall mask nothing."""
    own = hf_config.mask_time_prob
    hf_config.mask_time_prob = max(own, 1e-6)
    try:
        yield
    finally:
        hf_config.mask_time_prob = own


def _assemble_pretraining(
    config: "PretrainConfig", hf: PreTrainedModel, feature_extractor: Wav2Vec2FeatureExtractor, notes: list[str]
) -> LoadedPretraining:
    model = PretrainingModel(hf)
    if config.freeze_feature_encoder:
        model.freeze_feature_encoder()
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return LoadedPretraining(model, feature_extractor, notes)


def save_pretraining_model(
    loaded: LoadedPretraining, folder: Path | str, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write weights and feature extractor in Hugging Face format, to fine-tune with train.py --vocabulary train.

    Args:
        loaded: the model and what belongs to it.
        folder: to write.
        weights: as for `save_model`.
    """
    with _quiet_transformers():
        own = None if weights is None else dict(weights)
        loaded.model.hf.save_pretrained(folder, state_dict=own, save_original_format=False)
        loaded.feature_extractor.save_pretrained(folder)


def check_pretraining_folder(folder: Path, loaded: LoadedPretraining) -> None:
    """Open a saved folder by transformers' own class, as users do, and compare it with the model in memory.

    Raises:
        RunFailed: a key is missing, is one too many, or another weight than in memory.
    """
    hf = loaded.model.hf
    with _quiet_transformers():
        opened, info = type(hf).from_pretrained(folder, output_loading_info=True)
    # Of a configuration that masks nothing in fine-tuning transformers makes no embedding of masked frames.
    spare = {key for key in info["unexpected_keys"] if key.endswith("masked_spec_embed")}
    wrong = {key for kind in ("missing_keys", "unexpected_keys") for key in info[kind]} - spare
    wrong |= {key for key, *_ in info["mismatched_keys"]}
    own = hf.state_dict()
    wrong |= {key for key, value in opened.state_dict().items() if not torch.equal(value, own[key].cpu())}
    if wrong:
        raise RunFailed(f"{folder} does not open as it was saved: {_some(wrong)}")


# --- Saving --------------------------------------------------------------------------------------------------------


def save_model(loaded: LoadedModel, folder: Path | str, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write weights and processor in Hugging Face format, as `pipeline("automatic-speech-recognition")` opens it.

    Args:
        loaded: the model, its processor and what belongs to them.
        folder: to write.
        weights: its own by name, made whole where the model is divided among processes; None for those in memory.
    """
    assert len(loaded.processor.tokenizer) == loaded.model.hf.config.vocab_size
    with _quiet_transformers():
        own = dict(weights_of(loaded.model) if weights is None else weights)  # transformers takes things out of it
        # By default the names are those of the checkpoint that it came from, such as weight_g (before torch 2).
        loaded.model.hf.save_pretrained(folder, state_dict=own, save_original_format=False)
        loaded.processor.save_pretrained(folder)
        # transformers 4 looks for the feature extractor in a file of its own.
        loaded.processor.feature_extractor.save_pretrained(folder)
        if loaded.write_parts is not None:
            # In a folder of its own: beside config.json peft's file would send transformers for the base model.
            loaded.write_parts(Path(folder) / PARTS_FOLDER)


# --- Small things --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws on the CPU come from `seed`, and the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its load report, advice and bars stay off the screen: what matters of them is in our notes. Errors still rise."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|torch|huggingface_hub)\b")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, a mapping is needed")
    return content


def _some(names: Iterable[str], limit: int = 5) -> str:
    return some_of(sorted(names), limit)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
