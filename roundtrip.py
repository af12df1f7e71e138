"""Is a model/ that was written what was trained? It is opened in a clean process, by transformers alone, as users do.

    python roundtrip.py RUN/model.rejected RUN/probe.safetensors

The run writes a probe: a few dev clips with the input and the logits that its own model makes of each alone, in fp32
and without autocast. The clean process opens the folder and compares: no key is missing, unexpected or misshapen;
tokenizer, head and configuration have one size, each output has a token and each token an output; all weights are
finite and no row of the head is zero; the inputs are the probe's, and so are the logits inside `pipeline`, which writes
the text that our own decoder does. Both make it of the pipeline's logits where these are the probe's but for rounding,
so a tie of two labels that rounding turns is no difference.

Status 0: all of it holds; 1: not, with one line of JSON on stdout that names each failed check.

A clean process costs 8 s with a tiny model, its imports, and 12 s and 3.4 GB with 315 million weights (two cores, no
GPU). So it checks the first model that a process of training saves, and the one that it ends with; the saves between
are read back where they were written, every byte, in less than a second (`check_written`).

Dimensions: S samples, T frames, V vocabulary.
"""

from errors import STATUS_DONE, STATUS_FAILED, RunFailed, UsageError, exit_status

# isort: split

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import PreTrainedModel, Wav2Vec2CTCTokenizer

from atomic import format_bytes, write_atomically
from audio import INT16_STEP, SAMPLE_RATE_HZ
from checkpoint import check_tensors
from findings import some_of
from metrics import greedy_decode
from stopping import end_with_parent, ignore_stop_signals
from text import Vocabulary

if TYPE_CHECKING:
    from data import Collator, Utterance
    from pretrained import LoadedModel

PROBE_FILE = "probe.safetensors"
# Of the largest logit, which counts as SMALLEST_SCALE at least. 315 million weights on one thread and on two differ by
# 1.6e-6 of it; a GPU adds up in another order than the CPU of the clean process, and its error is not measured here.
TOLERANCE_ON_CPU, TOLERANCE_ON_OTHERS = 1e-5, 1e-3
SMALLEST_SCALE = 10.0
# Processor and collator do the same arithmetic; numpy may add up a variance in another order.
INPUT_TOLERANCE = 1e-4
SECONDS_FOR_CHECK = 600
# What the clean process holds beside the weights: torch and transformers.
BYTES_OF_LIBRARIES = 900 * 10**6
# With these a process takes itself for a rank of the run.
LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "GROUP_", "MASTER_", "PARALLELISM_CONFIG_", "ROLE_", "TORCHELASTIC_")
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SHOWN_CHARACTERS, SHOWN_NAMES = 60, 5


@dataclass(frozen=True)
class Failure:
    """A check that failed: what was found, and what would have passed."""

    check: str
    found: str
    limit: str

    def __str__(self) -> str:
        return f"{self.check}: {self.found} ({self.limit})"


def main() -> None:
    """The command."""
    if len(sys.argv) != 3:
        raise UsageError(f"two arguments are needed, the folder of a model and a probe; {len(sys.argv) - 1} were given")
    if os.getsid(0) == os.getpid():  # started by a run, not by hand: it ends with that run, and not before
        end_with_parent(signal.SIGKILL)
        ignore_stop_signals()
        _let_training_live()
    folder, probe = map(Path, sys.argv[1:])
    for path in (folder, probe):
        if not path.exists():
            raise UsageError(f"{path} does not exist")
    failures = check_folder(folder, probe)
    print(json.dumps([asdict(failure) for failure in failures], ensure_ascii=False), flush=True)
    if failures:
        raise RunFailed(describe(folder, failures))


# --- In the run ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_probe(path: Path, loaded: "LoadedModel", collate: "Collator", utterances: "Sequence[Utterance]") -> None:
    """Clips as they are stored, with the input and the logits that the run's own model makes of each alone.

    Raises:
        RunFailed: disk full or not writable.
    """
    device = next(loaded.model.parameters()).device
    tensors = {}
    loaded.model.eval()
    # TF32, in which a GPU computes convolutions by default, has three digits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for number, utterance in enumerate(utterances):
            batch = collate([utterance], np.zeros(1, np.int64))
            logits_1TV, _ = loaded.model(batch.input_values_BS.to(device), batch.sample_lengths_B)
            tensors |= {
                f"audio.{number}": torch.tensor(utterance.audio),
                f"input.{number}": batch.input_values_BS[0],
                f"logits.{number}": logits_1TV[0].float().cpu(),
            }
    tolerance = TOLERANCE_ON_CPU if device.type == "cpu" else TOLERANCE_ON_OTHERS
    facts = {
        "vocabulary": json.dumps(asdict(loaded.vocabulary)),
        "tolerance": repr(tolerance),
        "clips": str(len(utterances)),
    }
    write_atomically(path, save(tensors, metadata=facts))


def check_written(folder: Path, weights: "Mapping[str, torch.Tensor]") -> None:
    """The cheap check: every byte of the weights reads back, and the tokenizer has the size of the head.

    Args:
        folder: a saved model.
        weights: those in memory.

    Raises:
        RunFailed: not so.
    """
    check_tensors(folder / "model.safetensors", weights)
    size, outputs = len(Wav2Vec2CTCTokenizer.from_pretrained(folder)), len(weights["lm_head.weight"])
    if size != outputs:
        raise RunFailed(f"{folder}: its tokenizer has {size} tokens and the head {outputs} outputs")


def check_opening(folder: Path, probe: Path) -> None:
    """Open `folder` in a clean process; only there is it what users will get.

    Raises:
        RunFailed: a check fails, or the process could not tell.
    """
    failures = check_in_clean_process(folder, probe)
    if failures:
        raise RunFailed(f"{describe(folder, failures)}; to check again: python roundtrip.py FOLDER {probe}")


def describe(folder: Path, failures: Sequence[Failure]) -> str:
    """One line with every failed check."""
    return f"{folder} does not open as the model that was saved: {'; '.join(map(str, failures))}"


def check_in_clean_process(folder: Path, probe: Path) -> list[Failure]:
    """`check_folder` in a new process without a GPU, the network or the launcher's variables.

    Raises:
        RunFailed: the process did not start, was killed, took too long or said nothing.
    """
    # A session of its own: Ctrl-C in a terminal reaches the run, which ends the process if it has to.
    try:
        done = subprocess.run(
            [sys.executable, __file__, folder, probe], env=clean_environment(os.environ), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=SECONDS_FOR_CHECK, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunFailed(_not_checked(folder, f"it was not done within {SECONDS_FOR_CHECK} s")) from error
    except OSError as error:
        raise RunFailed(_not_checked(folder, f"it does not start ({error.strerror})")) from error
    if done.returncode < 0:
        raise RunFailed(_not_checked(folder, _describe_death(folder, -done.returncode)))
    answer = done.stdout.splitlines()[-1:]
    if done.returncode not in (STATUS_DONE, STATUS_FAILED) or not answer:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(_not_checked(folder, f"it ended with status {done.returncode} ({last})"))
    return [Failure(**fields) for fields in json.loads(answer[0])]


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that is no rank of a run, sees no GPU and asks no network."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    return kept | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _not_checked(folder: Path, why: str) -> str:
    return f"{folder} is not verified, for the clean process that opens it failed: {why}; mend that and resume"


def _describe_death(folder: Path, number: int) -> str:
    name = signal.Signals(number).name
    if number != signal.SIGKILL:
        return f"it was ended by {name}"
    needed = 2 * (folder / "model.safetensors").stat().st_size + BYTES_OF_LIBRARIES
    return f"it was ended by {name}, as the kernel does when memory runs out: make {format_bytes(needed)} free"


# --- In the clean process ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """What `write_probe` wrote; one entry per clip."""

    audio_S: list[np.ndarray]
    """float32 in -1 .. 1, as soundfile reads it."""
    input_S: list[torch.Tensor]
    logits_TV: list[torch.Tensor]
    vocabulary: Vocabulary
    tolerance: float


def check_folder(folder: Path, probe_path: Path) -> list[Failure]:
    """Every check of this module's docstring, by transformers alone; empty when all hold."""
    failures = []
    try:
        for failure in _find_failures(folder, _read_probe(probe_path)):
            failures.append(failure)
    except Exception as error:  # Whatever it is, a user would meet it too.
        failures.append(Failure("opening", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "no error"))
    return failures


def _find_failures(folder: Path, probe: _Probe) -> Iterator[Failure]:
    # Imported late: training needs no pipelines.
    from transformers import AutoModelForCTC, AutoProcessor, pipeline

    yield from _check_processor_files(folder)
    # Sizes that differ are named by _check_keys.
    model, info = AutoModelForCTC.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    processor = AutoProcessor.from_pretrained(folder)
    yield from _check_keys(info)
    yield from _check_outputs(model, processor.tokenizer)
    yield from _check_weights(model)
    inputs = [
        processor(audio_S, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_values[0]
        for audio_S in probe.audio_S
    ]
    del model  # The pipeline holds one of its own.
    recognise = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    logits_TV: list[torch.Tensor] = []
    recognise.model.register_forward_hook(lambda _module, _inputs, outputs: logits_TV.append(outputs.logits[0]))
    texts = [recognise({"raw": audio_S, "sampling_rate": SAMPLE_RATE_HZ})["text"] for audio_S in probe.audio_S]
    wrong_numbers = _check_numbers(probe, inputs, logits_TV)
    yield from wrong_numbers
    # Of logits that are equal but for rounding each gives a right text; others have no say.
    yield from _check_texts(probe.vocabulary, probe.logits_TV if wrong_numbers else logits_TV, texts)


def _read_probe(path: Path) -> _Probe:
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        clips = range(int(facts["clips"]))
        audio, inputs, logits = (
            [file.get_tensor(f"{name}.{clip}") for clip in clips] for name in ("audio", "input", "logits")
        )
    scaled = [samples_S.numpy().astype(np.float32) * np.float32(INT16_STEP) for samples_S in audio]
    vocabulary = Vocabulary(**json.loads(facts["vocabulary"]))
    return _Probe(scaled, inputs, logits, vocabulary, float(facts["tolerance"]))


def _check_processor_files(folder: Path) -> list[Failure]:
    """What version 4 of transformers reads must say what version 5 reads."""
    first, second = "preprocessor_config.json", "processor_config.json"
    old = json.loads((folder / first).read_text(encoding="utf-8"))
    new = json.loads((folder / second).read_text(encoding="utf-8"))["feature_extractor"]
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [Failure("processor", f"{first} and {second} differ in {_some(differing)}", "equal")] if differing else []


def _check_keys(info: Mapping[str, Any]) -> list[Failure]:
    kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "misshapen": "mismatched_keys"}
    found = {kind: [key if isinstance(key, str) else key[0] for key in info[name]] for kind, name in kinds.items()}
    said = [f"{kind} {_some(keys)}" for kind, keys in found.items() if keys]
    return [Failure("keys", ", ".join(said), "none of these")] if said else []


def _check_outputs(model: PreTrainedModel, tokenizer: Wav2Vec2CTCTokenizer) -> list[Failure]:
    """One size everywhere, and no output that no token names: it could be learned and never read."""
    failures = []
    outputs, size = len(model.lm_head.weight), model.config.vocab_size
    if not len(tokenizer) == outputs == size:
        found = f"{len(tokenizer)} tokens, {outputs} outputs of the head, vocab_size {size}"
        failures.append(Failure("tokenizer", found, "all equal"))
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    dead = sorted(set(range(outputs)) - tokens.keys())
    mute = [token for index, token in sorted(tokens.items()) if index >= outputs]
    if dead or mute:
        said = [f"without a token: {_some(map(str, dead))}"] if dead else []
        said += [f"tokens without an output: {_some(mute)}"] if mute else []
        failures.append(Failure("outputs", "; ".join(said), "each output has a token, each token an output"))
    zero = (model.lm_head.weight == 0).all(dim=1).nonzero().flatten().tolist()
    if zero:
        failures.append(Failure("head", f"only zeros in rows {_some(map(str, zero))}", "no such row"))
    return failures


def _check_weights(model: PreTrainedModel) -> list[Failure]:
    # A sum shows what is not finite in a tenth of the time, and may overflow by itself.
    suspects = {name: value for name, value in model.state_dict().items() if not torch.isfinite(value.sum())}
    bad = [name for name, value in suspects.items() if not torch.isfinite(value).all()]
    return [Failure("weights", f"not finite: {_some(bad)}", "all finite")] if bad else []


def _check_numbers(probe: _Probe, inputs: list[torch.Tensor], logits_TV: list[torch.Tensor]) -> list[Failure]:
    """The processor's inputs and the logits against the probe's."""
    scale = max([SMALLEST_SCALE, *(float(logits.abs().max()) for logits in probe.logits_TV)])
    compared = (
        ("input", inputs, probe.input_S, INPUT_TOLERANCE),
        ("logits", logits_TV, probe.logits_TV, probe.tolerance * scale),
    )
    failures = []
    for name, found, expected, limit in compared:
        shapes = [(list(a.shape), list(b.shape)) for a, b in zip(found, expected, strict=True) if a.shape != b.shape]
        if shapes:
            failures.append(Failure(name, f"of shape {shapes[0][0]}", f"{shapes[0][1]} in the run"))
            continue
        differences = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
        largest = float(np.max(differences, initial=0.0))
        if not largest <= limit:  # NaN, which numpy hands on, is no equality either
            failures.append(Failure(name, f"different by {largest:.3g}", f"at most {limit:.1g}"))
    return failures


def _check_texts(vocabulary: Vocabulary, logits_TV: list[torch.Tensor], texts: list[str]) -> list[Failure]:
    """The pipeline's text against that of our decoder, with the run's own vocabulary, from the same logits."""
    for logits, text in zip(logits_TV, texts, strict=True):
        (ours,) = greedy_decode(logits[None], torch.tensor([len(logits)]), vocabulary)
        if ours != text:
            return [Failure("text", f"the pipeline writes {_shortened(text)}", f"our decoder {_shortened(ours)}")]
    return []


def _some(names: Any) -> str:
    names = sorted(names, key=lambda name: (len(name), name))
    return some_of(names, SHOWN_NAMES)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "\u2026")


def _let_training_live() -> None:
    """Where the host runs out of memory, the kernel is to end this process and not the run (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.exit(exit_status(main))
