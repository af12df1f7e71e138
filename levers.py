"""Settings of train.py that lower the error rate or the cost without changing data or encoder; all off by default.

Each group is a part of TrainConfig: its fields are flags and YAML keys of their own.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Fields of the encoder's configuration in transformers that are flags here.
LAYER_SHARES = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
MASK_SHARES = ("mask_time_prob", "mask_feature_prob")
MASK_LENGTHS = ("mask_time_length", "mask_feature_length")
# Settings that the screen and the card name in any case.
ALWAYS_SAID = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
SPEED_RANGE = (0.5, 2.0)
# A number of samples per second that shares a divisor of 160 with 16,000 keeps the resampling kernel small.
SPEED_STEP = 0.01
GENERATED_NOISES = ("white", "pink", "babble")
SIMULATED_ROOM = "simulated"
NYQUIST_HZ = 8_000
# What can decide which model is the best, and what it is called in a sentence; lower is better for all of them.
METRICS = {
    "eval_wer": "WER",
    "eval_cer": "CER",
    "eval_loss": "loss",
    "eval_raw_wer": "WER against the texts as found",
    "eval_sentence_error_rate": "sentence error rate",
}


@dataclass(frozen=True)
class Augmentation:
    """Changes of the waveform in training, drawn for each (seed, epoch, utterance)."""

    augment_speed: list[float] = dataclasses.field(default_factory=list)
    """Factors of speed, one drawn per utterance, such as 0.9 1.0 1.1; pitch and formants move along. A clip that CTC
    could not align at the drawn factor stays as it is."""
    augment_reverb: list[str] = dataclasses.field(default_factory=list)
    """Rooms: `simulated`, or folders of impulse responses."""
    augment_reverb_probability: float = 0.5
    """Share of the utterances that are heard in a room."""
    augment_reverb_seconds: list[float] = dataclasses.field(default_factory=lambda: [0.1, 0.6])
    """Range of the reverberation time (60 dB) of simulated rooms, seconds."""
    augment_noise: list[str] = dataclasses.field(default_factory=list)
    """Noises: `white`, `pink`, `babble` (three to seven other training clips at once), or folders of recordings."""
    augment_noise_probability: float = 0.5
    """Share of the utterances that get noise."""
    augment_noise_snr_db: list[float] = dataclasses.field(default_factory=lambda: [5.0, 30.0])
    """Range of the ratio of the utterance's power to the noise's, dB, over the whole clip."""
    augment_band_hz: list[float] = dataclasses.field(default_factory=list)
    """Range of the highest frequency that is let through, Hz, such as 2500 7500; telephones and codecs cut at 3400."""
    augment_band_probability: float = 0.5
    """Share of the utterances whose band is limited."""
    augment_volume_db: float = 0.0
    """The level moves from a drawn gain within +- so many dB at the start to another at the end; a constant gain would
    be undone by the normalisation of the waveform."""
    augment_gap_seconds: float = 0.0
    """Longest stretch of silence put over the speech, one for every two seconds begun."""
    augment_gap_probability: float = 0.5
    """Share of the utterances with gaps."""

    @property
    def augments(self) -> bool:
        """Whether any waveform changes."""
        lists = (self.augment_speed, self.augment_reverb, self.augment_noise, self.augment_band_hz)
        return any(lists) or self.augment_volume_db > 0 or self.augment_gap_seconds > 0

    def augmentation_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = []
        for factor in self.augment_speed:
            if not SPEED_RANGE[0] <= factor <= SPEED_RANGE[1] or abs(factor - round(factor, 2)) > 1e-9:
                found.append(
                    f"--augment_speed {factor:g}: factors lie in {SPEED_RANGE[0]} .. {SPEED_RANGE[1]}, in steps of "
                    f"{SPEED_STEP}"
                )
        limits = {
            "augment_reverb_seconds": (0.02, 3.0),
            "augment_noise_snr_db": (-20.0, 60.0),
            "augment_band_hz": (500.0, float(NYQUIST_HZ)),
        }
        for name, (lowest, highest) in limits.items():
            value = getattr(self, name)
            if not value and name == "augment_band_hz":
                continue
            if len(value) != 2 or not lowest <= value[0] <= value[1] <= highest:
                found.append(
                    f"--{name} is {' '.join(f'{one:g}' for one in value)}, two rising numbers within {lowest:g} .. "
                    f"{highest:g} are needed"
                )
        for name in ("reverb", "noise", "band", "gap"):
            share = getattr(self, f"augment_{name}_probability")
            if not 0 < share <= 1:
                found.append(f"--augment_{name}_probability is {share:g}, it must lie in (0, 1]")
        for name in ("augment_volume_db", "augment_gap_seconds"):
            if getattr(self, name) < 0:
                found.append(f"--{name} is {getattr(self, name):g}, it cannot be negative")
        return found + self._idle_errors()

    def _idle_errors(self) -> list[str]:
        """Details of a change that is not asked for: they would do nothing, without a word."""
        default = Augmentation()
        owners = {"reverb": "reverb", "noise": "noise", "band": "band_hz", "gap": "gap_seconds"}
        details = {name: [f"augment_{name}_probability"] for name in owners}
        details["reverb"].append("augment_reverb_seconds")
        details["noise"].append("augment_noise_snr_db")
        return [
            f"--{detail} does nothing without --augment_{owner}"
            for name, owner in owners.items()
            for detail in details[name]
            if not getattr(self, f"augment_{owner}") and getattr(self, detail) != getattr(default, detail)
        ]


@dataclass(frozen=True)
class Course:
    """The course of the learning rate."""

    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "cosine_with_restarts", "cyclic", "tri_stage"] = "linear"
    """Course of the learning rate after warm-up: to zero linearly, by a half cosine, by several of them, up and down in
    triangles, held and then falling exponentially (tri_stage), or constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_ratio: float = 0.0
    """The same as a share of the run; give one of the two."""
    lr_num_cycles: int | None = None
    """Of `cosine_with_restarts` and `cyclic`: how many; 3 when not given."""
    lr_hold_ratio: float | None = None
    """Of `tri_stage`: share of the run at the peak; 0.4 when not given."""
    lr_min_ratio: float | None = None
    """Of `tri_stage` and `cyclic`: lowest rate, as a share of the peak; 0.05 when not given."""

    def course_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = []
        if not self.learning_rate > 0:
            found.append(f"--learning_rate is {self.learning_rate}, it must be above 0")
        if self.warmup_steps < 0:
            found.append(f"--warmup_steps is {self.warmup_steps}, it cannot be negative")
        if not 0 <= self.warmup_ratio < 1:
            found.append(f"--warmup_ratio is {self.warmup_ratio}, it must lie in [0, 1)")
        if self.warmup_ratio and self.warmup_steps:
            found.append(f"--warmup_ratio {self.warmup_ratio} and --warmup_steps {self.warmup_steps}: give one of them")
        return found + self._shape_errors()

    def _shape_errors(self) -> list[str]:
        """Settings of another schedule than the chosen one, or out of their range."""
        found, kind = [], self.lr_scheduler_type
        owners = {
            "lr_num_cycles": ("cosine_with_restarts", "cyclic"),
            "lr_hold_ratio": ("tri_stage",),
            "lr_min_ratio": ("tri_stage", "cyclic"),
        }
        for name, kinds in owners.items():
            if getattr(self, name) is not None and kind not in kinds:
                found.append(f"--{name} belongs to --lr_scheduler_type {' and '.join(kinds)}, not to {kind}")
        if self.lr_num_cycles is not None and self.lr_num_cycles < 1:
            found.append(f"--lr_num_cycles is {self.lr_num_cycles}, at least 1 is needed")
        for name, lowest in (("lr_hold_ratio", 0.0), ("lr_min_ratio", 1e-6)):
            value = getattr(self, name)
            if value is not None and not lowest <= value < 1:
                found.append(f"--{name} is {value:g}, it must lie in [{lowest:g}, 1)")
        return found


@dataclass(frozen=True)
class Rates(Course):
    """The course of the learning rate, and who learns at which."""

    head_learning_rate: float | None = None
    """Peak rate of the output layer; --learning_rate when not given."""
    layer_lr_decay: float = 1.0
    """Each layer learns at this share of the rate of the one above it, the convolutions least."""
    freeze_encoder_steps: int = 0
    """Updates in which the output layer alone learns; the encoder thaws after them."""

    def rate_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = self.course_errors()
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            found.append(f"--head_learning_rate is {self.head_learning_rate}, it must be above 0")
        if self.freeze_encoder_steps < 0:
            found.append(f"--freeze_encoder_steps is {self.freeze_encoder_steps}, it cannot be negative")
        if not 0 < self.layer_lr_decay <= 1:
            found.append(f"--layer_lr_decay is {self.layer_lr_decay}, it must lie in (0, 1]")
        return found


@dataclass(frozen=True)
class Dropouts:
    """What is left out of the encoder's layers, at random."""

    hidden_dropout: float | None = None
    """Dropout of the encoder's layers; the checkpoint's when not given, as with the four that follow."""
    attention_dropout: float | None = None
    """Dropout of the attention's weights."""
    activation_dropout: float | None = None
    """Dropout inside the feed-forward blocks."""
    feat_proj_dropout: float | None = None
    """Dropout behind the projection of the convolutions' features."""
    layerdrop: float | None = None
    """Probability that a layer is skipped, drawn by each process for itself."""

    @property
    def layer_settings(self) -> dict[str, float]:
        """Fields of the encoder's configuration that are set here."""
        return {name: getattr(self, name) for name in LAYER_SHARES if getattr(self, name) is not None}

    def dropout_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        return _share_errors(self, LAYER_SHARES)


@dataclass(frozen=True)
class PretrainingMasks:
    """Which share of the frames is to be predicted; the names are those of transformers' configuration.

    A setting of the pre-training alone: the checkpoint's own masks, which fine-tuning takes over, stay as they are.
    """

    mask_time_prob: float = 0.65
    """Share of the frames that spans would cover if they did not overlap; 0.65 masks about half of them, as published
    (https://arxiv.org/abs/2006.11477, section 4.2: p = 0.065 as the start of a span of 10)."""
    mask_time_length: int = 10
    """Frames of a span."""
    mask_time_min_masks: int = 2
    """Spans at least, as in fairseq; transformers' script has 0 here, by which a short clip may have nothing to
    predict."""
    mask_feature_prob: float = 0.0
    """The same over features, which are set to zero; they are not predicted."""
    mask_feature_length: int = 10
    """Features of a span."""

    def mask_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = _share_errors(self, MASK_SHARES) + _length_errors(self)
        if self.mask_time_min_masks == 0:
            found.append("--mask_time_min_masks is 0, and a short clip may have nothing to predict: 1 is needed")
        if self.mask_time_prob == 0:
            found.append("--mask_time_prob is 0, and nothing would be left to predict: 0.65 is usual")
        return found


@dataclass(frozen=True)
class Regularisation(Dropouts):
    """What keeps the model from learning its training clips by heart."""

    weight_decay: float = 0.01
    """Decoupled weight decay; none on biases and norms."""
    label_smoothing: float = 0.0
    """Weight of the divergence of every frame's distribution from the uniform one; the CTC loss gets the rest."""
    consistency_weight: float = 0.0
    """CR-CTC: weight of the divergence between two differently masked views of an utterance; 0.2 in its paper, with
    more masking than usual. An update takes nearly twice the time."""
    final_dropout: float | None = None
    """Dropout before the output layer; the checkpoint's when not given, as with the settings that follow."""
    apply_spec_augment: bool | None = None
    """Whether masks are drawn at all."""
    mask_time_prob: float | None = None
    """Share of the frames that SpecAugment masks, where spans do not overlap."""
    mask_time_length: int | None = None
    """Length of a span, frames."""
    mask_time_min_masks: int | None = None
    """Spans at least, in an utterance that is long enough."""
    mask_feature_prob: float | None = None
    """Share of the features that SpecAugment masks."""
    mask_feature_length: int | None = None
    """Length of a span, features."""

    @property
    def encoder_settings(self) -> dict[str, float]:
        """Fields of the encoder's configuration that are set here."""
        own = ("final_dropout", *MASK_SHARES, *MASK_LENGTHS, "apply_spec_augment", "mask_time_min_masks")
        given = {name: getattr(self, name) for name in own if getattr(self, name) is not None}
        return self.layer_settings | given

    def regularisation_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found = []
        for name in ("weight_decay", "consistency_weight"):
            if getattr(self, name) < 0:
                found.append(f"--{name} is {getattr(self, name)}, it cannot be negative")
        found += _share_errors(self, ("label_smoothing", "final_dropout", *MASK_SHARES)) + self.dropout_errors()
        found += _length_errors(self)
        return found


def _share_errors(settings: object, names: tuple[str, ...]) -> list[str]:
    values = {name: getattr(settings, name) for name in names}
    return [
        f"--{name} is {value:g}, it must lie in [0, 1)"
        for name, value in values.items()
        if value is not None and not 0 <= value < 1
    ]


def _length_errors(settings: object) -> list[str]:
    """Of masks."""
    found = []
    for name in MASK_LENGTHS:
        value = getattr(settings, name)
        if value is not None and value < 1:
            found.append(f"--{name} is {value}, at least 1 is needed")
    if settings.mask_time_min_masks is not None and settings.mask_time_min_masks < 0:
        found.append(f"--mask_time_min_masks is {settings.mask_time_min_masks}, it cannot be negative")
    return found


@dataclass(frozen=True)
class Adaptation:
    """Small parts that are trained alone, in an encoder that stays as it is: adapters.py and lora.py."""

    train_adapters: bool = False
    """Train attention adapters (as MMS has them), their norms and the output layer, and nothing else; an encoder of
    wav2vec2, XLS-R or MMS that has none gets them."""
    adapter_attn_dim: int | None = None
    """Width of new adapters; 16 when not given."""
    lora_rank: int | None = None
    """Train low-rank additions (LoRA) of this rank, and the output layer, and nothing else; needs the package peft."""
    lora_alpha: int | None = None
    """The additions count lora_alpha / lora_rank times; twice the rank when not given."""
    lora_dropout: float = 0.0
    """Dropout before the additions."""
    lora_target_modules: list[str] = dataclasses.field(default_factory=list)
    """Matrices that get an addition; when not given q_proj and v_proj, for wav2vec2-conformer linear_q and linear_v,
    for WavLM intermediate_dense and output_dense."""

    @property
    def trains_parts(self) -> bool:
        """Whether the encoder's own weights stay as they are."""
        return self.train_adapters or self.lora_rank is not None

    def adaptation_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found, default = [], Adaptation()
        if self.train_adapters and self.lora_rank is not None:
            found.append("--train_adapters and --lora_rank are two ways to the same end: give one of them")
        owners = {"adapter_attn_dim": "train_adapters"}
        owners |= dict.fromkeys(("lora_alpha", "lora_dropout", "lora_target_modules"), "lora_rank")
        for name, owner in owners.items():
            is_idle = getattr(self, owner) in (None, False)
            if is_idle and getattr(self, name) != getattr(default, name):
                found.append(f"--{name} does nothing without --{owner}")
        for name in ("adapter_attn_dim", "lora_rank", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name} is {value}, at least 1 is needed")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"--lora_dropout is {self.lora_dropout:g}, it must lie in [0, 1)")
        return found


@dataclass(frozen=True)
class Selection:
    """Which weights of the run become the final model, and when there will be no better ones."""

    metric_for_best_model: Literal["eval_wer", "eval_cer", "eval_loss", "eval_raw_wer", "eval_sentence_error_rate"] = (
        "eval_wer"
    )
    """Column of the log, lower is better, that decides what is kept in model/, averaged, and when to stop early."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations in a row without a gain; never in the warm-up or on a normal plateau at WER 1.0;
    not at all when not given."""
    early_stopping_threshold: float = 0.0
    """The metric has to fall by more than this below that of the last gain, to be a gain (0.001 is 0.1 % of WER)."""
    ema_decay: float | None = None
    """Score an exponential moving average of the weights, with this decay (0.999), beside them at each evaluation, and
    keep the better of the two; none when not given."""
    average_best: int | None = None
    """Score the mean of the weights of the best so many evaluations at the end, and keep it if it is better on dev than
    the best of them; not when not given."""

    def selection_errors(self) -> list[str]:
        """Every setting that is out of its range, with the limit."""
        found, patience, threshold = [], self.early_stopping_patience, self.early_stopping_threshold
        if patience is not None and patience < 1:
            found.append(
                f"--early_stopping_patience is {patience}, at least 1 is needed; leave it out to train to the end"
            )
        if threshold < 0:
            found.append(f"--early_stopping_threshold is {threshold}, it cannot be negative")
        if threshold > 0 and patience is None:
            found.append(f"--early_stopping_threshold {threshold} does nothing without --early_stopping_patience")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            found.append(f"--ema_decay is {self.ema_decay}, it must lie between 0 and 1, such as 0.999")
        if self.average_best is not None and self.average_best < 2:
            found.append(f"--average_best is {self.average_best}, at least 2 are needed for a mean")
        return found


FINE_TUNING = (Augmentation, Regularisation, Rates, Adaptation, Selection)
PRETRAINING = (Dropouts, PretrainingMasks, Course)


def describe(config: object, parts: tuple[type, ...] = FINE_TUNING) -> str:
    """The settings of these groups that differ from their defaults, as `name value`; for the screen and the card."""
    said = []
    for part in parts:
        default = part()
        for field in dataclasses.fields(part):
            value = getattr(config, field.name)
            if value != getattr(default, field.name) and field.name not in ALWAYS_SAID:
                values = value if isinstance(value, list) else [value]
                # Of a folder of recordings the last name alone: a path may tell more than its owner wants to publish.
                values = [Path(one).name if isinstance(one, str) else str(one) for one in values]
                said.append(f"{field.name} {' '.join(values)}")
    return ", ".join(said)


# What the encoder's configuration does not say already.
IDENTITY = (
    *(field.name for part in (Augmentation, Rates, Adaptation, Selection) for field in dataclasses.fields(part)),
    *("weight_decay", "label_smoothing", "consistency_weight"),
)
