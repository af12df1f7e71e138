"""Settings from YAML and flags: conversion, precedence, and every message for what cannot be."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import PrepareConfig, PretrainConfig, TrainConfig, field_docstrings, parse_arguments, write_config
from errors import UsageError
from levers import METRICS

REPOSITORY = Path(__file__).parent.parent
PREPARE = ["--corpus", "c", "--data_dir", "d"]
TRAIN = ["--data_dir", "d", "--output_dir", "o", "--model_name_or_path", "m"]


def train(*arguments: str) -> TrainConfig:
    return parse_arguments(TrainConfig, [*TRAIN, *arguments], "")


def refusal(config_class: type, arguments: list[str]) -> str:
    with pytest.raises(UsageError) as refused:
        parse_arguments(config_class, arguments, "")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def write_yaml(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return str(folder / "run.yaml")


# ---------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ([], "per_device_train_batch_size", 8),
        (["--learning_rate", "2e-5"], "learning_rate", 2e-5),
        (["--learning_rate=2e-5"], "learning_rate", 2e-5),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--max_train_samples", "10_000"], "max_train_samples", 10_000),
        (["--max_train_samples", "none"], "max_train_samples", None),
        (["--freeze_feature_encoder", "false"], "freeze_feature_encoder", False),
        (["--no_freeze_feature_encoder"], "freeze_feature_encoder", False),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "True"], "gradient_checkpointing", True),
        (["--case", "upper"], "case", "upper"),
        (["--characters_to_ignore", ""], "characters_to_ignore", ""),
        (["--characters_to_ignore=-;"], "characters_to_ignore", "-;"),
        (["--report_to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--report_to"], "report_to", []),
        (["--max_batch_seconds", "60"], "max_batch_seconds", 60.0),
        (["--data_dir", "2024"], "data_dir", "2024"),
        (["--max_steps", "-1"], "max_steps", -1),
    ],
)
def test_flags(arguments: list[str], name: str, value: object) -> None:
    found = getattr(train(*arguments), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 2e-5", "learning_rate", 2e-5),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 1_000", "max_steps", 1000),
        ("max_train_samples: null", "max_train_samples", None),
        ("gradient_checkpointing: yes", "gradient_checkpointing", True),
        ("report_to: tensorboard", "report_to", ["tensorboard"]),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        # As PyYAML reads it, 1e-5 would be text and fail far away, inside transformers.
        ("model_overrides: {layer_norm_eps: 1e-5}", "model_overrides", {"layer_norm_eps": 1e-5}),
        ("model_overrides: {conv_dim: [1, 2], name: '1e-5'}", "model_overrides", {"conv_dim": [1, 2], "name": "1e-5"}),
        ("characters_to_ignore: ',?.!-;:\"'", "characters_to_ignore", ',?.!-;:"'),
        ("characters_to_ignore: “”ꞌ", "characters_to_ignore", "“”ꞌ"),
        ("", "seed", 42),
        ("# nothing but a comment", "seed", 42),
    ],
)
def test_yaml(text: str, name: str, value: object, tmp_path: Path) -> None:
    assert getattr(train("--config", write_yaml(tmp_path, text)), name) == value


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "seed: 1\nwarmup_steps: 10\nmax_train_samples: 5\n")
    config = train("--config", path, "--seed", "2", "--max_train_samples", "none")
    assert (config.seed, config.warmup_steps, config.max_train_samples, config.weight_decay) == (2, 10, None, 0.01)


def test_a_checkpoint_named_by_a_flag_replaces_the_recipes_model_config(tmp_path: Path) -> None:
    """A recipe from random weights, fine-tuned: `--config configs/digits.yaml --model_name_or_path runs/demo/model`."""
    path = write_yaml(tmp_path, "model_config: {model_type: wav2vec2}\nseed: 7\n")
    config = train("--config", path)
    assert (config.model_name_or_path, config.model_config, config.seed) == ("m", None, 7)
    config = parse_arguments(TrainConfig, [*TRAIN[:4], "--config", path], "")
    assert (config.model_name_or_path, config.model_config) == (None, {"model_type": "wav2vec2"})


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_accepted(path: Path) -> None:
    kind = PretrainConfig if path.stem.startswith("pretrain") else TrainConfig
    config = parse_arguments(kind, ["--config", str(path)], "")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: getattr(config, name) for name in given} == {
        name: float(value) if isinstance(value, str) and name == "learning_rate" else value
        for name, value in given.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

WRONG_TYPES = [
    (["--seed", "x"], "--seed is 'x', a whole number is needed"),
    (["--seed", "1.5"], "--seed is '1.5', a whole number is needed"),
    (["--seed", "inf"], "--seed is 'inf', a whole number is needed"),
    (["--seed", "nan"], "--seed is 'nan', a whole number is needed"),
    (["--learning_rate", "fast"], "--learning_rate is 'fast', a number is needed"),
    (["--learning_rate", "nan"], "--learning_rate is 'nan', a number is needed"),
    (["--max_batch_seconds", "inf"], "--max_batch_seconds is 'inf', a number or one of auto or none is needed"),
    (["--learning_rate", "none"], "--learning_rate is 'none', a number is needed"),
    (["--case", "Upper"], "--case is 'Upper', one of auto, upper, lower, keep is needed"),
    (["--gradient_checkpointing", "maybe"], "--gradient_checkpointing is 'maybe', true or false is needed"),
    (["--report_to", "mlflow"], "--report_to is ['mlflow'], list of one of tensorboard, wandb is needed"),
]
WRONG_YAML = [
    ("seed: 2001-01-01", "--seed is datetime.date(2001, 1, 1), a whole number is needed"),
    ("seed: .inf", "--seed is inf, a whole number is needed"),
    ("seed: true", "--seed is True, a whole number is needed"),
    ("seed: null", "--seed is None, a whole number is needed"),
    ("learning_rate: {a: 1}", "--learning_rate is {'a': 1}, a number is needed"),
    ("case: [upper]", "--case is ['upper'], one of auto, upper, lower, keep is needed"),
    ("vocabulary: no", "--vocabulary is False, text is needed"),
    ("report_to: null", "--report_to is None, list of one of tensorboard, wandb is needed"),
    ("model_overrides: 3", "--model_overrides is 3, a mapping (YAML only) or none is needed"),
]
OUT_OF_RANGE = [
    (
        ["--early_stopping_patience", "0"],
        "--early_stopping_patience is 0, at least 1 is needed; leave it out to train to the end",
    ),
    (
        ["--early_stopping_threshold", "0.01"],
        "--early_stopping_threshold 0.01 does nothing without --early_stopping_patience",
    ),
    (
        ["--early_stopping_patience", "2", "--early_stopping_threshold", "-1"],
        "--early_stopping_threshold is -1.0, it cannot be negative",
    ),
    (["--ema_decay", "1.0"], "--ema_decay is 1.0, it must lie between 0 and 1, such as 0.999"),
    (["--ema_decay", "0"], "--ema_decay is 0.0, it must lie between 0 and 1, such as 0.999"),
    (["--vocabulary_min_count", "0"], "--vocabulary_min_count is 0, at least 1 is needed"),
    (
        ["--vocabulary_min_count", "3", "--vocabulary", "model"],
        "--vocabulary_min_count belongs to a vocabulary built from the text: give --vocabulary train",
    ),
    (["--language", "ha", "yo"], "--language names 2 for 1 folders: give one, or one for each"),
    (["--average_best", "1"], "--average_best is 1, at least 2 are needed for a mean"),
    (
        ["--metric_for_best_model", "eval_wre"],
        "--metric_for_best_model is 'eval_wre', one of eval_wer, eval_cer, eval_loss, eval_raw_wer, "
        "eval_sentence_error_rate is needed, the nearest is eval_wer",
    ),
    *(
        ([f"--{name}", "0"], f"--{name} is 0, at least 1 is needed")
        for name in (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "logging_steps", "eval_steps", "save_steps", "save_total_limit",
        )
    ),
    *(
        ([f"--{name}", "-1"], f"--{name} is {value}, it cannot be negative")
        for name, value in (
            ("warmup_steps", "-1"), ("weight_decay", "-1.0"), ("min_duration_in_seconds", "-1.0"),
        )
    ),
    (["--dataloader_num_workers", "-2"], "--dataloader_num_workers is -2, give at least 0, or -1 to have it chosen"),
    (["--learning_rate", "0"], "--learning_rate is 0.0, it must be above 0"),
    (["--max_grad_norm", "0"], "--max_grad_norm is 0.0, it must be above 0"),
    (["--num_train_epochs", "0"], "--num_train_epochs is 0.0, it must be above 0"),
    (["--max_train_samples", "0"], "--max_train_samples is 0, it must be above 0"),
    (["--max_eval_samples", "-3"], "--max_eval_samples is -3, it must be above 0"),
    (["--max_batch_seconds", "0"], "--max_batch_seconds is 0.0, it must be above 0"),
    (["--train_fraction", "0"], "--train_fraction is 0.0, it must lie in (0, 1]"),
    (["--train_fraction", "10"], "--train_fraction is 10.0, it must lie in (0, 1]"),
    (["--max_steps", "0"], "--max_steps is 0, give at least 1, or -1 to count epochs"),
    (["--max_steps", "-2"], "--max_steps is -2, give at least 1, or -1 to count epochs"),
    (["--seed", "-1"], "--seed is -1, it must lie in 0 .. 4294967295"),
    (["--seed", "4294967296"], "--seed is 4294967296, it must lie in 0 .. 4294967295"),
    (
        ["--min_duration_in_seconds", "5", "--max_duration_in_seconds", "2"],
        "--min_duration_in_seconds 5.0 is above --max_duration_in_seconds 2.0",
    ),
]  # fmt: skip
UNKNOWN = [
    (["--learning_rat", "1"], "unknown setting --learning_rat: the nearest known one is learning_rate"),
    (["--output-directory", "x"], "unknown setting --output-directory: the nearest known one is output_dir"),
    # Half a name is no name: argparse would take it for the whole one.
    (["--learning", "1"], "unknown setting --learning: the nearest known one is learning_rate"),
    (["--warmup-steps", "3"], "--warmup-steps is written warmup_steps"),
    (["--model_config", "x"], "--model_config is a mapping: set it in the YAML file"),
    (["--fp16"], "unknown setting --fp16: that is the launcher's --mixed_precision fp16"),
    (["--bf16", "true"], "unknown setting --bf16: that is the launcher's --mixed_precision bf16"),
    (
        ["--num_processes", "2"],
        "unknown setting --num_processes: that is the launcher: accelerate launch --num_processes N train.py",
    ),
    (
        ["--mixed_precision=fp16"],
        "unknown setting --mixed_precision=fp16: that is the launcher: "
        "accelerate launch --mixed_precision fp16 train.py",
    ),
    (["--evaluation_steps", "3"], "unknown setting --evaluation_steps: that is eval_steps"),
    (["--batch_size=4"], "unknown setting --batch_size=4: that is per_device_train_batch_size"),
    (["--group_by_length"], "unknown setting --group_by_length: that is not needed, lengths are always grouped"),
    (["stray"], "'stray' belongs to no flag"),
    (["--seed"], "argument --seed: expected one argument; --help lists every flag"),
]


@pytest.mark.parametrize(("arguments", "message"), [*WRONG_TYPES, *OUT_OF_RANGE, *UNKNOWN])
def test_a_wrong_flag_is_one_line_with_value_and_limit(arguments: list[str], message: str) -> None:
    assert refusal(TrainConfig, [*TRAIN, *arguments]) == message


@pytest.mark.parametrize(("text", "message"), WRONG_YAML)
def test_a_wrong_yaml_value_is_the_same_line(text: str, message: str, tmp_path: Path) -> None:
    assert refusal(TrainConfig, [*TRAIN, "--config", write_yaml(tmp_path, text)]) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "unknown setting learning_rte: the nearest known one is learning_rate"),
        ("fp16: true", "unknown setting fp16: that is the launcher's --mixed_precision fp16"),
        ("max-steps: 3", "max-steps is written max_steps"),
        ("3: 4", "unknown setting 3: the nearest known one is"),
        ("seed: 1\nseed: 2", "seed is given 2 times"),
        ("- a", "must hold `name: value` lines, found a list"),
        ("only words", "must hold `name: value` lines, found a str"),
        ("a: [", "is not valid YAML: while parsing"),
        ("\tseed: 1", "is not valid YAML"),
        ("seed: \x00", "is not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_a_yaml_file_that_cannot_be_used_names_itself(text: str, message: str, tmp_path: Path) -> None:
    path = write_yaml(tmp_path, text)
    found = refusal(TrainConfig, [*TRAIN, "--config", path])
    assert message in found
    assert path in found


def test_a_config_that_cannot_be_read_is_the_only_complaint(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert refusal(TrainConfig, ["--config", str(missing)]) == (
        f"--config {missing} cannot be read: No such file or directory"
    )
    assert refusal(TrainConfig, ["--config", str(tmp_path)]) == f"--config {tmp_path} cannot be read: Is a directory"
    (tmp_path / "latin.yaml").write_bytes("data_dir: caf\xe9".encode("latin-1"))
    assert "latin.yaml is not valid YAML" in refusal(TrainConfig, ["--config", str(tmp_path / "latin.yaml")])


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "warmup_stps: 3\ncase: loud\nsave_steps: 0\noutput_dir: [a]\n")
    arguments = ["--config", path, "--seed", "-1", "--fp16", "--max_steps", "many", "--data_dir", "d"]
    assert refusal(TrainConfig, arguments).split("; ") == [
        "unknown setting --fp16: that is the launcher's --mixed_precision fp16",
        f"{path}: unknown setting warmup_stps: the nearest known one is warmup_steps",
        "--case is 'loud', one of auto, upper, lower, keep is needed",
        "--output_dir is ['a'], text is needed",
        "--max_steps is 'many', a whole number is needed",
        "give either --model_name_or_path or, in the YAML file, model_config",
        "--save_steps is 0, at least 1 is needed",
        "--seed is -1, it must lie in 0 .. 4294967295",
    ]


def test_what_a_run_needs_is_asked_for(tmp_path: Path) -> None:
    assert refusal(TrainConfig, []).split("; ") == [
        "--data_dir is missing: name the folder that prepare.py wrote",
        "--output_dir is missing: name the run directory",
        "give either --model_name_or_path or, in the YAML file, model_config",
    ]
    both = write_yaml(tmp_path, "model_config: {hidden_size: 3}\nmodel_name_or_path: m")
    assert refusal(TrainConfig, [*TRAIN[:4], "--config", both]).split("; ") == [
        "give either --model_name_or_path or, in the YAML file, model_config",
        "model_config needs the key model_type (wav2vec2, hubert, wavlm)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_dir", "d"], "--corpus is missing: name the corpus"),
        (["--corpus", "c"], "--data_dir is missing: name the output folder"),
        ([*PREPARE, "--chunk_size", "0"], "--chunk_size is 0, at least 1 is needed"),
        ([*PREPARE, "--num_workers", "0"], "--num_workers is 0, give at least 1, or -1 for one per core"),
        ([*PREPARE, "--seed", "-1"], "--seed is -1, it must lie in 0 .. 4294967295"),
        ([*PREPARE, "--split_by", "age"], "--split_by is 'age', one of speaker, utterance, sentence or none is needed"),
        *(
            (
                [*PREPARE, "--split_fractions", *map(str, shares)],
                f"--split_fractions {shares} must be two or three shares that sum to 1",
            )
            for shares in ([], [1.0], [0.7, 0.2], [1.5, -0.5], [0.25, 0.25, 0.25, 0.25])
        ),
    ],
)
def test_prepare_refuses(arguments: list[str], message: str) -> None:
    assert refusal(PrepareConfig, arguments) == message


def test_prepare_takes_the_seeds_split() -> None:
    arguments = [*PREPARE, "--split_by", "utterance", "--split_fractions", "0.7", "0.3", "--test_speakers", "theo"]
    config = parse_arguments(PrepareConfig, arguments, "")
    assert (config.split_fractions, config.test_speakers) == ([0.7, 0.3], ["theo"])


# ---------------------------------------------------------------------------------------------------------------------
# config.yaml and --help


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_name_or_path": None, "model_config": {"model_type": "wav2vec2", "layer_norm_eps": 1e-5, "n": [1, 2]}},
        {"characters_to_ignore": "'\"#: -\\|>{}[]%&*!@`“”…\u0300", "data_dir": "a b/ü: #c", "learning_rate": 1e-7},
        {"output_dir": "1e3", "data_dir": "no", "model_name_or_path": "007", "vocabulary": "2001-01-01"},
        {"characters_to_ignore": "", "report_to": ["wandb"], "max_train_samples": 3, "max_batch_seconds": 12.5},
        {
            "characters_to_ignore": "\u2028\x85\t\n ",
            "max_steps": 10**9,
            "seed": 2**32 - 1,
            "gradient_checkpointing": True,
        },
    ],
)
def test_a_run_can_be_repeated_from_its_config(changes: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(train(), **changes)
    text = write_config(config, header="launched with fp16\non cuda:0")
    assert text.startswith("# launched with fp16\n# on cuda:0\ndata_dir: ")
    assert parse_arguments(TrainConfig, ["--config", write_yaml(tmp_path, text)], "") == config


@pytest.mark.parametrize("config_class", [PrepareConfig, TrainConfig])
def test_every_setting_is_explained_and_help_shows_it(
    config_class: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [field.name for field in dataclasses.fields(config_class)]
    docstrings = field_docstrings(config_class)
    assert list(docstrings) == names
    assert all(text.endswith(".") and len(text) > 20 for text in docstrings.values())
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as ended:
        parse_arguments(config_class, ["--help"], "What it does, at 100 %.")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "What it does, at 100 %." in shown
    for name in names:
        if docstrings[name].startswith("YAML only"):
            assert f"--{name} " not in shown
        else:
            assert f"--{name} " in shown
            assert docstrings[name] in shown


def test_flags_of_the_contract_are_there() -> None:
    contract = """model_name_or_path data_dir output_dir per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps learning_rate weight_decay warmup_steps lr_scheduler_type num_train_epochs max_steps
    logging_steps eval_steps save_steps save_total_limit max_grad_norm freeze_feature_encoder max_train_samples
    max_eval_samples train_fraction max_duration_in_seconds min_duration_in_seconds resume_from_checkpoint report_to
    seed max_batch_seconds case gradient_checkpointing dataloader_num_workers early_stopping_patience"""
    assert set(contract.split()) <= {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("config_class", [PrepareConfig, TrainConfig])
def test_no_setting_is_dead(config_class: type) -> None:
    """Each one is read somewhere outside config.py."""
    sources = "".join(path.read_text(encoding="utf-8") for path in REPOSITORY.glob("*.py") if path.name != "config.py")
    fields = {field.name for field in dataclasses.fields(config_class)}
    assert {name for name in fields if not re.search(rf"\.{name}\b|\"{name}\"", sources)} == set()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_class().seed = 3


def test_metrics_have_words() -> None:
    assert typing.get_args(typing.get_type_hints(TrainConfig)["metric_for_best_model"]) == tuple(METRICS)
