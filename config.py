"""The settings of every command: frozen dataclasses, read from YAML and flags by one parser.

A docstring under a field is its help text. YAML values and flags pass through the same conversion and the same checks,
and all errors are shown at once.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import textwrap
import types
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from errors import UsageError
from languages import find_language
from levers import Adaptation, Augmentation, Course, Dropouts, PretrainingMasks, Rates, Regularisation, Selection
from text import DEFAULT_RULES

Config = TypeVar("Config")
SEED_LIMIT = 2**32
# Attention takes memory with the square of a window.
MAX_CHUNK_SECONDS = 120.0
MAX_SEGMENT_SECONDS = 120.0
DEFAULT_CHARACTERS_TO_IGNORE = DEFAULT_RULES["characters_to_ignore"]
# Of so many names the one that was meant is found at a glance.
SHORT_CHOICE = 4
# A flag that says otherwise than the YAML file under another name.
REPLACES = {"model_name_or_path": "model_config"}
OLDER_NAMES = {
    "evaluation_steps": "eval_steps",
    "batch_size": "per_device_train_batch_size",
    "fp16": "the launcher's --mixed_precision fp16",
    "bf16": "the launcher's --mixed_precision bf16",
    "mixed_precision": "the launcher: accelerate launch --mixed_precision fp16 train.py",
    "num_processes": "the launcher: accelerate launch --num_processes N train.py",
    "group_by_length": "not needed, lengths are always grouped",
}


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of prepare.py."""

    corpus: str = ""
    """Common Voice release folder, CSV/TSV/JSONL manifest, LibriSpeech folder, or `demo`."""
    data_dir: str = ""
    """Folder for the prepared shards."""
    chunk_size: int = 10_000
    """Rows of the corpus per shard part."""
    num_workers: int = -1
    """Decoding processes; -1 takes one per core."""
    train_split: Literal["train", "validated"] = "train"
    """Common Voice only: `validated` trains on validated.tsv less the sentences and speakers of dev and test."""
    audio_column_name: str | None = None
    """Manifest column that holds the audio path; found by its usual names when not given."""
    text_column_name: str | None = None
    """Manifest column that holds the transcript; found by its usual names when not given."""
    audio_root: str | None = None
    """Folder outside the corpus that absolute paths and links may lead into."""
    split_by: Literal["speaker", "utterance", "sentence"] | None = None
    """How to divide a corpus without splits: no speaker, no utterance or no sentence in two splits."""
    split_fractions: list[float] = dataclasses.field(default_factory=lambda: [0.8, 0.1, 0.1])
    """Shares of train, dev and (optional) test for --split_by."""
    test_speakers: list[str] = dataclasses.field(default_factory=list)
    """Speakers that form the test split."""
    untranscribed: bool = False
    """Prepare speech without text, for pretrain.py: also a folder of audio files, of which every one is used; texts
    that there are are left out. What the corpus calls dev and test stays so; else a share of the recordings is dev."""
    segment_seconds: float | None = None
    """With --untranscribed: longer recordings become pieces of at most so many seconds, cut where it is quiet; 20 when
    not given."""
    dev_fraction: float | None = None
    """With --untranscribed: share of the recordings that is held out, for the loss on speech that did not train; 0.02
    when not given."""
    seed: int = 42
    """Decides the random splits."""
    verify: bool = False
    """Read every byte of the prepared data and name what is damaged; with --corpus, damaged parts are made again."""

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = []
        for name in ("data_dir",) if self.verify else ("corpus", "data_dir"):
            if not getattr(self, name):
                found.append(f"--{name} is missing: name the {'corpus' if name == 'corpus' else 'output folder'}")
        if self.chunk_size < 1:
            found.append(f"--chunk_size is {self.chunk_size}, at least 1 is needed")
        if self.num_workers < 1 and self.num_workers != -1:
            found.append(f"--num_workers is {self.num_workers}, give at least 1, or -1 for one per core")
        total = math.fsum(self.split_fractions)
        if len(self.split_fractions) not in (2, 3) or min(self.split_fractions) < 0 or abs(total - 1) > 1e-6:
            found.append(f"--split_fractions {self.split_fractions} must be two or three shares that sum to 1")
        found += self._untranscribed_errors()
        if not 0 <= self.seed < SEED_LIMIT:
            found.append(f"--seed is {self.seed}, it must lie in 0 .. {SEED_LIMIT - 1}")
        return found

    def _untranscribed_errors(self) -> list[str]:
        needing = [name for name in ("segment_seconds", "dev_fraction") if getattr(self, name) is not None]
        if not self.untranscribed:
            return [f"--{name} belongs to --untranscribed" for name in needing]
        found = []
        if self.text_column_name is not None:
            found.append("--text_column_name does not go with --untranscribed, which keeps no texts: leave it out")
        if self.split_by == "sentence":
            found.append("--split_by sentence does not go with --untranscribed: use speaker or utterance")
        if self.dev_fraction is not None and (self.split_by or self.test_speakers):
            found.append("--dev_fraction does not go with --split_by and --test_speakers: use --split_fractions")
        if self.segment_seconds is not None and not 1 <= self.segment_seconds <= MAX_SEGMENT_SECONDS:
            found.append(f"--segment_seconds is {self.segment_seconds}, it must lie in 1 .. {MAX_SEGMENT_SECONDS:g}")
        if self.dev_fraction is not None and not 0 <= self.dev_fraction < 1:
            found.append(f"--dev_fraction is {self.dev_fraction}, it must lie in [0, 1)")
        return found


@dataclass(frozen=True)
class RunSettings:
    """What a run reads and writes, its length, and how it is cut."""

    data_dir: str | list[str] = ""
    """Folder that prepare.py wrote, or several, to train on together; dev and test are then scored per set, too."""
    data_weights: list[float] | None = None
    """Share of each folder of data_dir in the clips of an epoch, relative to the others; as many as each has when not
    given."""
    sample_by: str | None = None
    """Column of the corpus (speaker, accents, gender, ...; with several folders also `corpus`) whose groups are drawn
    by sampling_temperature."""
    sampling_temperature: float | Literal["balanced"] = 1.0
    """T: a group of n clips has a share of an epoch in proportion to n^(1/T). 1 draws every clip once, more makes the
    groups more alike, `balanced` alike."""
    output_dir: str = ""
    """Run directory: checkpoints, log, plot and model."""
    model_name_or_path: str | None = None
    """Pre-trained model: a name on the Hugging Face hub or a folder; as a flag it replaces a YAML file's
    model_config."""
    model_config: dict[str, Any] | None = None
    """YAML only: a Hugging Face model configuration with `model_type`, to train from random weights."""
    model_overrides: dict[str, Any] | None = None
    """YAML only: fields of the checkpoint's configuration to change, such as dropouts and masking."""
    freeze_feature_encoder: bool = True
    """Keep the convolutional feature encoder as it is."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    train_fraction: float = 1.0
    """Share of the training utterances to use, drawn by the seed."""
    max_train_samples: int | None = None
    """Use at most this many training utterances."""
    max_eval_samples: int | None = None
    """Evaluate on a fixed, seeded subset of this size."""
    min_duration_in_seconds: float = 0.1
    """Shorter training clips are left out; dev and test are always scored whole."""
    max_duration_in_seconds: float = 20.0
    """Longer training clips are left out; dev and test are always scored whole."""

    per_device_train_batch_size: int = 8
    """Utterances per micro-batch; x gradient_accumulation_steps x processes = utterances per update."""
    per_device_eval_batch_size: int = 8
    """Utterances per evaluation batch; has no influence on the result."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per update."""
    max_batch_seconds: float | Literal["auto"] | None = None
    """Cut micro-batches and evaluation batches by padded seconds of audio instead of by count; the utterances per
    update stay. `auto` searches the largest number that fits into memory with a margin, and prints it."""
    memory_limit_mb: float | None = None
    """Megabytes (10^6 bytes) that each process may use, of the GPU or, without one, of the host; all that is free
    when not given."""
    dataloader_num_workers: int = -1
    """Processes per rank that load and pad ahead of the loop; -1 chooses (1 without a GPU, else up to 4, by the cores);
    0 loads in the training process (for pdb)."""

    num_train_epochs: float = 3.0
    """Passes over the training utterances."""
    max_steps: int = -1
    """Updates in all; overrides num_train_epochs when positive."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    seed: int = 42
    """Decides order, subset, masks, dropout and new weights."""

    logging_steps: int = 50
    """Steps between rows of the log."""
    eval_steps: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    save_steps: int = 500
    """Steps between checkpoints; the last step is always saved."""
    save_total_limit: int = 2
    """Checkpoints kept; the best model is kept apart, in model/."""
    resume_from_checkpoint: str | None = None
    """`last` for the newest intact one, `auto` for the same or a fresh start where there is none, or a checkpoint
    folder of this run."""
    resume_anyway: bool = False
    """Resume although settings or data have changed that decide the meaning of the run; they are named and recorded."""
    max_hours: float | None = None
    """Save a checkpoint and stop, with status 143, after so many hours, as at SIGTERM, SIGUSR1 and Ctrl-C."""
    ddp_timeout: int = 1800
    """Seconds after which the processes of a run give up waiting for one that does not answer."""
    preflight: Literal["refuse", "warn"] = "refuse"
    """What a check before step 1 that refuses does: `refuse` stops the run, `warn` is shown and goes on."""
    max_bad_updates: int = 10
    """Stop after this many updates in a row whose loss or gradient is not finite; each is left out and listed in
    bad_batches.csv."""
    report_to: list[Literal["tensorboard", "wandb"]] = dataclasses.field(default_factory=list)
    """Trackers to write to besides training_log.csv."""

    @property
    def data_dirs(self) -> list[Path]:
        """The folders of `data_dir`."""
        return [Path(one) for one in ([self.data_dir] if isinstance(self.data_dir, str) else self.data_dir)]

    @property
    def data_named(self) -> str:
        """The same for a screen."""
        return " + ".join(map(str, self.data_dirs))

    @property
    def needed_folders(self) -> dict[str, str]:
        """Folders that must be named, with what they are."""
        return {"data_dir": "the folder that prepare.py wrote", "output_dir": "the run directory"}

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = _missing(self, self.needed_folders)
        found += _sampling_errors(self)
        if (self.model_name_or_path is None) == (self.model_config is None):
            found.append("give either --model_name_or_path or, in the YAML file, model_config")
        if self.model_config is not None and "model_type" not in self.model_config:
            found.append("model_config needs the key model_type (wav2vec2, hubert, wavlm)")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "max_bad_updates",
            "ddp_timeout",
        ):
            if getattr(self, name) < 1:
                found.append(f"--{name} is {getattr(self, name)}, at least 1 is needed")
        if self.min_duration_in_seconds < 0:
            found.append(f"--min_duration_in_seconds is {self.min_duration_in_seconds}, it cannot be negative")
        found += _worker_errors("dataloader_num_workers", self.dataloader_num_workers)
        for name in ("max_grad_norm", "num_train_epochs", "max_duration_in_seconds"):
            if not getattr(self, name) > 0:
                found.append(f"--{name} is {getattr(self, name)}, it must be above 0")
        for name in ("max_train_samples", "max_eval_samples", "max_batch_seconds", "memory_limit_mb", "max_hours"):
            value = getattr(self, name)
            if value not in (None, "auto") and not value > 0:
                found.append(f"--{name} is {value}, it must be above 0")
        if not 0 < self.train_fraction <= 1:
            found.append(f"--train_fraction is {self.train_fraction}, it must lie in (0, 1]")
        if self.max_steps < 1 and self.max_steps != -1:
            found.append(f"--max_steps is {self.max_steps}, give at least 1, or -1 to count epochs")
        if self.min_duration_in_seconds > self.max_duration_in_seconds:
            found.append(
                f"--min_duration_in_seconds {self.min_duration_in_seconds} is above "
                f"--max_duration_in_seconds {self.max_duration_in_seconds}"
            )
        if not 0 <= self.seed < SEED_LIMIT:
            found.append(f"--seed is {self.seed}, it must lie in 0 .. {SEED_LIMIT - 1}")
        return found


@dataclass(frozen=True)
class TextSettings:
    """What of the texts is learned, which utterances are, and which are scored."""

    target_lang: str | None = None
    """Language of a checkpoint that holds many (MMS), such as hau: its adapters, its output layer, its vocabulary."""
    vocabulary: str = "auto"
    """`model`: the checkpoint's; `train`: built from the training text; `large_960h`: the 32 tokens of
    facebook/wav2vec2-large-960h; a vocab.json; `auto`: the checkpoint's where it has one, else `train`."""
    vocabulary_min_count: int = 1
    """Characters seen less often in the training text get no output of their own; they are learned and scored as the
    unknown token."""
    head: Literal["auto", "grow", "new"] = "auto"
    """For another vocabulary than the checkpoint's: `grow` keeps the rows of shared letters and begins new letters as
    their nearest; `new` draws all; `auto` grows a trained head that has a tokenizer."""
    language: str | list[str] | None = None
    """Code of the language whose rules for apostrophes, case and digraphs to follow (ha, yo, en; languages.yaml), or
    one for each folder of data_dir."""
    characters_to_ignore: str = DEFAULT_CHARACTERS_TO_IGNORE
    """Characters removed from transcripts, written without separators."""
    case: Literal["auto", "upper", "lower", "keep"] = "auto"
    """Case of the transcripts; `auto` takes the vocabulary's, and lower case for a vocabulary built from text."""
    train_rest: bool = False
    """Use the utterances that --train_fraction leaves out: two runs on disjoint parts, each of which can judge what it
    has not heard (evaluate.py --rank_train --other_half)."""
    eval_split: Literal["dev", "train"] = "dev"
    """Evaluate on `dev`; `train` scores the utterances that train, to see whether a model can learn them by heart."""
    prune_suspects: bool = False
    """Leave out training clips whose labels per second lie outside the corpus' own range (suspects.csv)."""
    prune_list: str | None = None
    """Leave out the training clips of a file: train_ranking.csv of evaluate.py --rank_train (those that it suggests),
    any table with a column `id`, or a text with an id per line."""
    prune_fraction: float | None = None
    """Leave out this share of a train_ranking.csv, the worst, instead of those that it suggests."""
    do_predict: bool = True
    """Score the test split with the best model at the end (and before training, where the head fits)."""
    demo_corpus: bool = False
    """Make and prepare the built-in corpus of spoken digits in data_dir when it is not there."""

    @property
    def languages(self) -> list[str]:
        """The codes of `language`: none, one for all data, or one for each folder."""
        return [] if self.language is None else [self.language] if isinstance(self.language, str) else self.language

    def text_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = _alphabet_errors(self)
        if self.train_rest and (self.train_fraction == 1 or self.max_train_samples is not None):
            found.append("--train_rest needs a --train_fraction below 1, and no --max_train_samples")
        if self.prune_fraction is not None and not (self.prune_list and 0 < self.prune_fraction < 1):
            found.append(f"--prune_fraction is {self.prune_fraction}, it must lie in (0, 1) and needs --prune_list")
        return found


@dataclass(frozen=True)
class TrainConfig(Augmentation, Regularisation, Rates, Adaptation, Selection, TextSettings, RunSettings):
    """Settings of train.py. Every interval counts optimizer steps; precision and processes belong to the launcher."""

    command: ClassVar[str] = "train.py"

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        levers = self.rate_errors() + self.regularisation_errors() + self.augmentation_errors()
        levers += self.selection_errors() + self.adaptation_errors()
        if self.trains_parts and not self.freeze_feature_encoder:
            part = "train_adapters" if self.train_adapters else "lora_rank"
            levers.append(f"--freeze_feature_encoder false contradicts --{part}, which trains nothing of the encoder")
        return super().errors() + self.text_errors() + levers


@dataclass(frozen=True)
class PretrainConfig(PretrainingMasks, Dropouts, Course, RunSettings):
    """Settings of pretrain.py. Every interval counts optimizer steps; precision and processes belong to the launcher.

    Of what a recogniser alone has, the loop finds here that it is not asked for.
    """

    command: ClassVar[str] = "pretrain.py"
    eval_split: ClassVar[str] = "dev"
    train_rest: ClassVar[bool] = False
    do_predict: ClassVar[bool] = False
    demo_corpus: ClassVar[bool] = False
    metric_for_best_model: ClassVar[str] = "eval_loss"
    early_stopping_patience: ClassVar[None] = None
    ema_decay: ClassVar[None] = None
    average_best: ClassVar[None] = None

    freeze_feature_encoder: bool = False
    """Keep the convolutional feature encoder as it is; the codes are then of sounds as the checkpoint hears them."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; published runs from random weights have 5e-4 with thousands of utterances per
    update."""
    weight_decay: float = 0.01
    """Decoupled weight decay; none on biases and norms."""
    num_negatives: int | None = None
    """Frames that a masked frame is told apart from; the checkpoint's (100) when not given, as with the two that
    follow."""
    contrastive_logits_temperature: float | None = None
    """Of the similarities of prediction and codes (0.1)."""
    diversity_loss_weight: float | None = None
    """Of the share of codes that is not in use (0.1)."""
    max_gumbel_temperature: float = 2.0
    """Of the choice of a code, at the first update."""
    min_gumbel_temperature: float = 0.5
    """The lowest that it falls to."""
    gumbel_temperature_decay: float = 0.999995
    """What it is multiplied by at each update."""

    @property
    def encoder_settings(self) -> dict[str, float]:
        """Fields of the model's configuration that are set here."""
        names = ("num_negatives", "contrastive_logits_temperature", "diversity_loss_weight")
        return self.layer_settings | {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def masks(self) -> PretrainingMasks:
        """What is to be predicted."""
        return PretrainingMasks(**{one.name: getattr(self, one.name) for one in dataclasses.fields(PretrainingMasks)})

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = super().errors() + self.course_errors() + self.dropout_errors() + self.mask_errors()
        for name in ("weight_decay", "diversity_loss_weight"):
            value = getattr(self, name)
            if value is not None and value < 0:
                found.append(f"--{name} is {value}, it cannot be negative")
        if self.num_negatives is not None and self.num_negatives < 1:
            found.append(f"--num_negatives is {self.num_negatives}, at least 1 is needed")
        if self.contrastive_logits_temperature is not None and not self.contrastive_logits_temperature > 0:
            found.append(
                f"--contrastive_logits_temperature is {self.contrastive_logits_temperature}, it must be above 0"
            )
        if not 0 < self.min_gumbel_temperature <= self.max_gumbel_temperature:
            found.append(
                f"--min_gumbel_temperature is {self.min_gumbel_temperature}, it must lie in (0, "
                f"{self.max_gumbel_temperature}], up to --max_gumbel_temperature"
            )
        if not 0 < self.gumbel_temperature_decay <= 1:
            found.append(f"--gumbel_temperature_decay is {self.gumbel_temperature_decay}, it must lie in (0, 1]")
        return found


@dataclass(frozen=True)
class PreflightConfig(TrainConfig):
    """Settings of preflight.py: those of the run that it checks, and its own."""

    strict: bool = False
    """Refuse on warnings too."""

    @property
    def needed_folders(self) -> dict[str, str]:
        """The report goes to DATA_DIR/preflight where no run directory is named."""
        return {"data_dir": "the folder that prepare.py wrote"}


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of evaluate.py."""

    model_name_or_path: str = ""
    """Fine-tuned model: RUN/model, another folder, or a name on the Hugging Face hub."""
    data_dir: str = ""
    """Folder that prepare.py wrote."""
    split: Literal["test", "dev", "train"] = "test"
    """Split to score, whole."""
    output_dir: str | None = None
    """Folder for results.json and utterances.csv; evaluation_SPLIT beside the model when not given, or here for a model
    of the hub."""
    target_lang: str | None = None
    """Language of a model that holds many (MMS), such as hau: its adapters, its output layer, its vocabulary."""
    slices: list[str] = dataclasses.field(default_factory=list)
    """Columns of the corpus to break the rates down by, and `duration`, `speech_rate`, `snr`, `sentence_in_train`,
    `speaker_in_train`; all that divide the set when not given."""
    compare: str | None = None
    """Results of another model on the same split (a folder that evaluate.py wrote), or another model, which is then
    scored too."""
    rank_train: bool = False
    """Score all training clips instead of a split, and list them in train_ranking.csv, the most suspect first, for
    train.py --prune_list."""
    other_half: str | None = None
    """Of --rank_train: a model that was trained on the clips that the first was not (train.py --train_fraction 0.5, and
    the same with --train_rest); each clip is judged by the one that has not heard it."""
    lm: str | None = None
    """Language model (a folder that decoding.py build-lm wrote): its beam search beside the greedy texts."""
    lm_weight: float | None = None
    """Weight of the language model; what decoding.py tune found when not given."""
    word_score: float | None = None
    """Added for each word, or each frame of a space for a character model; what tune found when not given."""
    beam_size: int | None = None
    """Hypotheses kept at each frame; those of tune, or 50, when not given."""
    beam_workers: int = -1
    """Decoding processes of each process; -1 takes its share of the cores, 0 decodes in the process itself."""
    unknown: Literal["count", "drop_character", "drop_utterance"] = "count"
    """Letters that the vocabulary lacks: `count` as errors, `drop_character` from the references, or `drop_utterance`
    to score only the others."""
    characters_to_ignore: str | None = None
    """Characters removed from references; those of the model's training when not given."""
    case: Literal["auto", "upper", "lower", "keep"] | None = None
    """Case of the references; that of the model's training when not given."""
    language: str | None = None
    """Code of the language whose rules the references follow; that of the model's training when not given."""
    max_eval_samples: int | None = None
    """Score a fixed, stratified subset of this size."""
    per_device_eval_batch_size: int = 8
    """Utterances per batch; has no influence on the result."""
    max_batch_seconds: float | None = None
    """Cut batches by padded seconds of audio instead of by count."""
    memory_limit_mb: float | None = None
    """Megabytes (10^6 bytes) that each process may use; all that is free when not given."""
    dataloader_num_workers: int = -1
    """Processes per rank that load and pad ahead; -1 chooses; 0 loads in the process itself."""
    ddp_timeout: int = 1800
    """Seconds after which the processes give up waiting for one that does not answer."""
    seed: int = 42
    """Decides the subset."""

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        needed = {"model_name_or_path": "a fine-tuned model", "data_dir": "the folder that prepare.py wrote"}
        found = _missing(self, needed)
        for name in ("per_device_eval_batch_size", "ddp_timeout"):
            if getattr(self, name) < 1:
                found.append(f"--{name} is {getattr(self, name)}, at least 1 is needed")
        for name in ("max_eval_samples", "max_batch_seconds", "memory_limit_mb"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                found.append(f"--{name} is {getattr(self, name)}, it must be above 0")
        for name in ("dataloader_num_workers", "beam_workers"):
            found += _worker_errors(name, getattr(self, name))
        found += _beam_errors(self)
        foreign = ("slices", "compare", "lm", "max_eval_samples")
        names = [name for name in foreign if getattr(self, name)] + ["unknown"] * (self.unknown != "count")
        if self.rank_train and names:
            found.append(f"--{names[0]} does not go with --rank_train, which scores every training clip: leave it out")
        if self.other_half is not None and not self.rank_train:
            found.append("--other_half belongs to --rank_train")
        if not 0 <= self.seed < SEED_LIMIT:
            found.append(f"--seed is {self.seed}, it must lie in 0 .. {SEED_LIMIT - 1}")
        return found


@dataclass(frozen=True)
class TranscribeConfig:
    """Settings of transcribe.py."""

    positional: ClassVar[str] = "audio"

    audio: list[str] = dataclasses.field(default_factory=list)
    """Files, folders, patterns (`'clips/*.mp3'`), or - for stdin."""
    model_name_or_path: str = ""
    """Fine-tuned model: RUN/model, another folder, or a name on the Hugging Face hub."""
    target_lang: str | None = None
    """Language of a model that holds many (MMS), such as hau: its adapters, its output layer, its vocabulary."""
    format: Literal["txt", "json", "srt", "vtt", "ctm", "all"] = "txt"
    """`json` and `ctm` have the time and confidence of every word, `srt` and `vtt` are subtitles; `all` needs
    --output_dir."""
    output_dir: str | None = None
    """Folder for a transcript per file, named as the file; on stdout when not given."""
    chunk_length_s: float = 30.0
    """Length of the windows that a longer recording is read in, seconds."""
    stride_length_s: float = 4.0
    """What a window hears of its neighbours on each side, seconds."""
    per_device_eval_batch_size: int = 8
    """Windows or short files per batch at most; has no influence on the result."""
    max_batch_seconds: float = 30.0
    """Padded seconds of audio per batch; a GPU takes more, and is faster with it."""
    lm: str | None = None
    """Language model (a folder that decoding.py build-lm wrote): beam search instead of greedy decoding."""
    lm_weight: float | None = None
    """Weight of the language model; what `decoding.py tune` found when not given."""
    word_score: float | None = None
    """Reward of a word; what `decoding.py tune` found when not given."""
    beam_size: int | None = None
    """Hypotheses kept at each frame; what `decoding.py tune` used when not given."""
    memory_limit_mb: float | None = None
    """Megabytes (10^6 bytes) that the process may use; all that is free when not given."""

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        needed = {"model_name_or_path": "a fine-tuned model", "audio": "files, folders, or - for stdin"}
        found = _missing(self, needed)
        if self.per_device_eval_batch_size < 1:
            found.append(f"--per_device_eval_batch_size is {self.per_device_eval_batch_size}, at least 1 is needed")
        for name in ("max_batch_seconds", "memory_limit_mb", "stride_length_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                found.append(f"--{name} is {getattr(self, name)}, it must be above 0")
        if not 4 * self.stride_length_s <= self.chunk_length_s <= MAX_CHUNK_SECONDS:
            found.append(
                f"--chunk_length_s is {self.chunk_length_s:g}, it must lie between four times --stride_length_s "
                f"({self.stride_length_s:g}) and {MAX_CHUNK_SECONDS:g}"
            )
        found += _beam_errors(self)
        return found


@dataclass(frozen=True)
class LearningCurveConfig:
    """Settings of learning_curve.py."""

    positional: ClassVar[str] = "runs"

    runs: list[str] = dataclasses.field(default_factory=list)
    """Run directories of train.py, finished, which differ in their hours of training audio."""
    metric: Literal["auto", "test_wer", "eval_wer"] = "auto"
    """Of the test set or of the dev set; `auto` takes the test set where all runs have scored it."""
    times_hours: float = 2.0
    """Predict the error rate at so many times the hours of the largest run."""
    output: str = "learning_curve.png"
    """Plot to write."""
    seed: int = 42
    """Decides the bootstrap's draws."""

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = []
        if not self.runs:
            found.append("name the run directories: python learning_curve.py RUN RUN RUN")
        if not self.times_hours > 1:
            found.append(f"--times_hours is {self.times_hours:g}, it must be above 1")
        if not self.output.endswith((".png", ".svg", ".pdf")):
            found.append(f"--output is {self.output}, it must end with .png, .svg or .pdf")
        if not 0 <= self.seed < SEED_LIMIT:
            found.append(f"--seed is {self.seed}, it must lie in 0 .. {SEED_LIMIT - 1}")
        return found


@dataclass(frozen=True)
class ReportConfig:
    """Settings of report.py."""

    positional: ClassVar[str] = "folder"

    folder: str = ""
    """Run directory of train.py, or results folder of evaluate.py."""
    output: str | None = None
    """HTML file to write; report.html in the folder when not given."""
    data_dir: str | None = None
    """Folder that prepare.py wrote, for the clips; the one that the run or the results name when not given."""
    audio: bool = True
    """Embed the clips of the utterances that are shown first; --no_audio leaves them out, since voices are personal
    data."""
    seed: int = 42
    """Decides which utterances are drawn at random."""

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = []
        if not self.folder:
            found.append("name a run directory of train.py or a results folder of evaluate.py: python report.py FOLDER")
        if not 0 <= self.seed < SEED_LIMIT:
            found.append(f"--seed is {self.seed}, it must lie in 0 .. {SEED_LIMIT - 1}")
        return found


@dataclass(frozen=True)
class BuildLMConfig:
    """Make a language model of texts: python decoding.py build-lm --text FILE... --data_dir DATA --out FOLDER."""

    text: list[str] = dataclasses.field(default_factory=list)
    """Files: a CSV, TSV or JSONL table with a text column, or one sentence per line."""
    data_dir: str = ""
    """Folder that prepare.py wrote; the sentences of its dev and test splits are kept out of the model."""
    out: str = ""
    """Folder for the language model; an older one there is replaced."""
    unit: Literal["word", "character"] = "word"
    """`word`: decoding writes words of the texts only; `character`: it spells freely, for little text."""
    order: int | None = None
    """Longest n-gram, 2 to 6; 4 words or 6 characters when not given."""
    add_training_words: bool = False
    """Let decoding write the words of the training split too; the texts' own model knows them as unknown words."""
    model_name_or_path: str | None = None
    """Recogniser whose text rules to follow (RUN/model, or a name on the Hugging Face hub)."""
    characters_to_ignore: str | None = None
    """Characters removed from the texts; those of the recogniser's training, or train.py's, when not given."""
    case: Literal["auto", "upper", "lower", "keep"] | None = None
    """Case of the texts; that of the recogniser's training when not given, lower case without one."""
    language: str | None = None
    """Code of the language whose rules the texts follow; that of the recogniser's training when not given."""
    text_column_name: str | None = None
    """Column of the tables that holds the text; found by its usual names when not given."""

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        needed = {"text": "the files", "data_dir": "the folder that prepare.py wrote"}
        found = _missing(self, needed | {"out": "a folder for the language model"})
        if self.order is not None and not 2 <= self.order <= 6:
            found.append(f"--order is {self.order}, KenLM takes 2 to 6")
        return found


@dataclass(frozen=True)
class TuneConfig:
    """Find a language model's weights: python decoding.py tune --model_name_or_path M --data_dir DATA --lm FOLDER."""

    model_name_or_path: str = ""
    """Fine-tuned recogniser: RUN/model, another folder, or a name on the Hugging Face hub."""
    data_dir: str = ""
    """Folder that prepare.py wrote."""
    lm: str = ""
    """Folder that build-lm wrote; the weights go into its tuning.json."""
    language: str | None = None
    """Code of the language whose rules the references follow; that of the recogniser's training when not given."""
    split: Literal["dev", "train"] = "dev"
    """Split to tune on; never the one that the result is judged by."""
    max_eval_samples: int = 500
    """Use at most this many utterances, a fixed, stratified subset."""
    beam_size: int = 50
    """Hypotheses kept at each frame."""
    beam_workers: int = -1
    """Decoding processes; -1 takes one per core, 0 decodes in the process itself."""
    per_device_eval_batch_size: int = 8
    """Utterances per batch of the recogniser; has no influence on the result."""
    seed: int = 42
    """Decides the subset."""

    def errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        needed = {
            "model_name_or_path": "a fine-tuned model",
            "data_dir": "the folder that prepare.py wrote",
            "lm": "the folder that build-lm wrote",
        }
        found = _missing(self, needed)
        for name in ("max_eval_samples", "beam_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                found.append(f"--{name} is {getattr(self, name)}, at least 1 is needed")
        found += _worker_errors("beam_workers", self.beam_workers)
        if not 0 <= self.seed < SEED_LIMIT:
            found.append(f"--seed is {self.seed}, it must lie in 0 .. {SEED_LIMIT - 1}")
        return found


def _missing(config: object, needed: Mapping[str, str]) -> list[str]:
    """Settings without a value, by what they name."""
    return [f"--{name} is missing: name {meaning}" for name, meaning in needed.items() if not getattr(config, name)]


def _worker_errors(name: str, count: int) -> list[str]:
    """What is wrong with a number of processes that may choose itself."""
    return [] if count >= -1 else [f"--{name} is {count}, give at least 0, or -1 to have it chosen"]


def _sampling_errors(config: TrainConfig) -> list[str]:
    """What is wrong with the sets of a run and with how they are drawn from."""
    found, folders, weights = [], config.data_dirs, config.data_weights
    times = Counter(folder.resolve() for folder in folders)
    found += [
        f"--data_dir names {folder} {count} times: name a set once, --data_weights makes it count more"
        for folder, count in times.items()
        if count > 1
    ]
    if weights is not None and len(weights) != len(folders):
        found.append(f"--data_weights has {len(weights)} numbers for {len(folders)} folders: give one for each")
    if weights is not None and len(folders) == 1:
        found.append("--data_weights belongs to several folders: name them with --data_dir, or leave it out")
    if weights is not None and not all(weight > 0 for weight in weights):
        listed = " ".join(f"{weight:g}" for weight in weights)
        found.append(f"--data_weights is {listed}, each must be above 0: leave out the folder that is not to train")
    if weights is not None and config.sample_by == "corpus":
        found.append("--data_weights and --sample_by corpus both divide an epoch among the sets: give one of them")
    if config.sampling_temperature != "balanced" and not config.sampling_temperature >= 1:
        found.append(
            f"--sampling_temperature is {config.sampling_temperature:g}, at least 1 is needed (1 draws as the data is, "
            "balanced draws all groups alike)"
        )
    if config.sampling_temperature != 1 and config.sample_by is None:
        found.append("--sampling_temperature belongs to --sample_by: name the column whose groups it levels")
    if config.demo_corpus and len(folders) > 1:
        found.append(f"demo_corpus makes one folder, --data_dir names {len(folders)}: prepare the demo on its own")
    return found


def _alphabet_errors(config: TrainConfig) -> list[str]:
    """What is wrong with the vocabulary, the head and the language of a run."""
    found = [error for code in dict.fromkeys(config.languages) for error in _language_errors(code)]
    if len(config.languages) not in (0, 1, len(config.data_dirs)):
        found.append(
            f"--language names {len(config.languages)} for {len(config.data_dirs)} folders: give one, or one for each"
        )
    if config.vocabulary_min_count < 1:
        found.append(f"--vocabulary_min_count is {config.vocabulary_min_count}, at least 1 is needed")
    if config.vocabulary_min_count > 1 and config.vocabulary not in ("auto", "train"):
        found.append("--vocabulary_min_count belongs to a vocabulary built from the text: give --vocabulary train")
    if config.head == "grow" and config.model_name_or_path is None:
        found.append("--head grow needs a trained head: name its model with --model_name_or_path")
    return found


def _language_errors(code: str) -> list[str]:
    """A language that languages.yaml does not have."""
    try:
        find_language(code)
    except UsageError as error:
        return [str(error)]
    return []


def _beam_errors(config: EvaluateConfig | TranscribeConfig) -> list[str]:
    """What is wrong with the settings of a beam search."""
    found = [
        f"--{name} belongs to a language model: name its folder with --lm"
        for name in ("lm_weight", "word_score", "beam_size")
        if getattr(config, name) is not None and config.lm is None
    ]
    if config.lm_weight is not None and config.lm_weight < 0:
        found.append(f"--lm_weight is {config.lm_weight}, it cannot be negative")
    if config.beam_size is not None and config.beam_size < 1:
        found.append(f"--beam_size is {config.beam_size}, at least 1 is needed")
    return found


def parse_arguments(config_class: type[Config], arguments: list[str], description: str) -> Config:
    """The settings of one command: defaults, then the YAML file of `--config`, then flags.

    Raises:
        UsageError: with every unknown name, value of the wrong type and value out of range in one message.
    """
    parser = _build_parser(config_class, description)
    given, unknown = parser.parse_known_args(arguments)
    flags = {name: value for name, value in vars(given).items() if value is not None}
    config_path = flags.pop("config", None)
    known = [field.name for field in dataclasses.fields(config_class)]
    unknown = _take_words(config_class, flags, unknown)
    errors = [_unknown_name(argument, known) for argument in unknown if argument.startswith("-")]
    if not errors and unknown:
        errors = [f"{unknown[0]!r} belongs to no flag"]
    values, yaml_errors = _read_yaml(config_path, known) if config_path else ({}, [])
    for name, replaced in REPLACES.items():
        if name in flags:
            values.pop(replaced, None)
    config, value_errors = _build_config(config_class, {**values, **flags})
    errors += yaml_errors + list(value_errors.values())
    if values or not yaml_errors:  # An unreadable file leaves out what it would have given.
        errors += [error for error in config.errors() if not error.startswith(tuple(f"--{n} " for n in value_errors))]
    if errors:
        raise UsageError("; ".join(errors))
    return config


def write_config(config: Any, header: str) -> str:
    """`config.yaml` as text: every setting, with `header` (what the launcher decided) as comments above."""
    comments = "".join(f"# {line}\n" for line in header.splitlines())
    return comments + yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def field_docstrings(config_class: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, as one line."""
    found = {}
    for one in reversed([base for base in config_class.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body
        for field, docstring in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(docstring.value).split())
    return found


def _build_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file that sets defaults; flags override it.")
    docstrings = field_docstrings(config_class)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if typing.get_origin(_without_none(kind)) is dict:
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        text = f"{docstrings[field.name]} [{_type_name(kind)}, default: {default}]".replace("%", "%%")
        options: dict[str, Any] = {"help": text, "metavar": "X", "default": None}
        if _is_list(kind):
            options["nargs"] = "*"
        elif kind is bool:
            options |= {"nargs": "?", "const": "true"}
            parser.add_argument(
                f"--no_{field.name}", dest=field.name, action="store_const", const="false", help=argparse.SUPPRESS
            )
        is_positional = field.name == getattr(config_class, "positional", None)
        if is_positional:
            options |= {"metavar": field.name} | ({} if _is_list(kind) else {"nargs": "?"})
        parser.add_argument(field.name if is_positional else f"--{field.name}", **options)
    # argparse's own complaints (a flag without its value) become one line like every other error.
    parser.error = _raise_usage_error
    return parser


def _take_words(config_class: type, flags: dict[str, Any], unknown: list[str]) -> list[str]:
    """Words between flags, which argparse knows no place for, are the positional field's; the others stay."""
    name = getattr(config_class, "positional", None)
    words = [argument for argument in unknown if not argument.startswith("-") or argument == "-"]
    if name is None or not words:
        return unknown
    if _is_list(typing.get_type_hints(config_class)[name]):
        flags[name] = [*flags.get(name, []), *words]
        return [argument for argument in unknown if argument not in words]
    if name not in flags:
        flags[name] = words[0]
        unknown.remove(words[0])
    return unknown


def _raise_usage_error(message: str) -> typing.NoReturn:
    raise UsageError(f"{message}; --help lists every flag")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as YAML 1.2 says and as everyone expects of `layer_norm_eps: 1e-5`."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _read_yaml(path: str, known: list[str]) -> tuple[dict[str, Any], list[str]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader) or {}
    except OSError as error:
        return {}, [f"--config {path} cannot be read: {error.strerror}"]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return {}, [f"--config {path} is not valid YAML: {' '.join(str(error).split())}"]
    if not isinstance(values, dict):
        return {}, [f"--config {path} must hold `name: value` lines, found a {type(values).__name__}"]
    errors = [f"{path}: {_unknown_name(str(name), known)}" for name in values if name not in known]
    times = Counter(key.value for key, _ in tree.value) if tree is not None else Counter()
    errors += [f"{path}: {name} is given {count} times" for name, count in times.items() if count > 1]
    return {name: value for name, value in values.items() if name in known}, errors


def _unknown_name(name: str, known: list[str]) -> str:
    stripped = name.lstrip("-").split("=")[0].replace("-", "_")
    if stripped in OLDER_NAMES:
        return f"unknown setting {name}: that is {OLDER_NAMES[stripped]}"
    if stripped in known:
        is_dashed = "-" in name.lstrip("-").split("=")[0]
        return f"{name} is written {stripped}" if is_dashed else f"{name} is a mapping: set it in the YAML file"
    nearest = difflib.get_close_matches(stripped, known, n=1, cutoff=0.0)[0]
    return f"unknown setting {name}: the nearest known one is {nearest}"


def _build_config(config_class: type[Config], values: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """The settings, with the default for each value that is refused, and the errors by name."""
    hints = typing.get_type_hints(config_class)
    converted, errors = {}, {}
    for name, value in values.items():
        try:
            converted[name] = _convert(value, hints[name])
        except (ValueError, TypeError, OverflowError):  # Text, a date and infinity where a whole number belongs.
            errors[name] = f"--{name} is {value!r}, {_type_name(hints[name])} is needed{_nearest(value, hints[name])}"
    return config_class(**converted), errors


def _nearest(value: Any, kind: Any) -> str:
    """Of a long choice among names, the one that was perhaps meant."""
    names = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if len(names) <= SHORT_CHOICE or not isinstance(value, str):
        return ""
    return f", the nearest is {difflib.get_close_matches(value, names, n=1, cutoff=0.0)[0]}"


def _convert(value: Any, kind: Any) -> Any:
    """A value from YAML or from a flag (always text) as `kind`; ValueError when it is not one."""
    if _is_union(kind):
        return _convert_to_any(value, typing.get_args(kind))
    if value is None:
        raise ValueError
    if _is_list(kind):
        items = value if isinstance(value, list) else [value]
        return [_convert(item, typing.get_args(kind)[0]) for item in items]
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError
        return value
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError
        return value
    return _convert_scalar(value, kind)


def _convert_to_any(value: Any, kinds: tuple[Any, ...]) -> Any:
    """The first of `kinds` that takes the value."""
    if types.NoneType in kinds and (value is None or value in ("none", "null")):
        return None
    if str in kinds and isinstance(value, list) and len(value) == 1:
        (value,) = value  # One word where several may stand.
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType)
    for kind in kinds[:-1]:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return _convert(value, kind)
    return _convert(value, kinds[-1])


def _convert_scalar(value: Any, kind: type) -> Any:
    if isinstance(value, (dict, list)) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    if kind is bool:
        if str(value).lower() not in ("true", "false"):
            raise ValueError
        return str(value).lower() == "true"
    if kind is int:
        # YAML reads 1e3 as text and 10_000 as a number; both spellings are allowed on both ways.
        number = float(value)
        if number != int(number):
            raise ValueError
        return int(number)
    if kind is float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    return str(value)


def _is_union(kind: Any) -> bool:
    # `Literal[...] | None` is a typing.Union, `int | None` a types.UnionType.
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _without_none(kind: Any) -> Any:
    """The first kind that is not None."""
    if _is_union(kind):
        return next(member for member in typing.get_args(kind) if member is not types.NoneType)
    return kind


def _is_list(kind: Any) -> bool:
    members = typing.get_args(kind) if _is_union(kind) else (kind,)
    return any(typing.get_origin(member) is list for member in members)


def _type_name(kind: Any) -> str:
    if _is_union(kind):
        return " or ".join(map(_type_name, typing.get_args(kind)))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if _is_list(kind):
        return f"list of {_type_name(typing.get_args(kind)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    return names.get(kind, "a mapping (YAML only)")
