"""The built-in demo corpus: spoken digit strings by espeak-ng, in several voices, the same on every run."""

import csv
import ctypes
import json
import multiprocessing
import os
import random
import shutil
import wave
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from audio import without_interrupts, without_main_module
from errors import RunFailed, UsageError

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Share of the strings of two and more digits that never occur in training, half for dev, half for test.
HELD_OUT_SHARE = 0.3
DEMO_MANIFEST = "manifest.csv"
DEMO_SETTINGS = "demo.json"
ESPEAK_SYNCHRONOUS, ESPEAK_RATE, ESPEAK_PITCH, ESPEAK_UTF8 = 2, 1, 3, 1
ESPEAK_NOISE_SEED = 1


@dataclass(frozen=True)
class DemoCorpus:
    """Spoken digit strings by espeak-ng: what is said, by whom, how varied."""

    num_train_clips: int = 1200
    num_dev_clips: int = 80
    """Strings unseen in training, voices of training."""
    num_test_strings: int = 80
    """Strings unseen in training, each spoken by one voice of training and by the unseen voice."""
    train_voices: tuple[str, ...] = (
        "en-us",
        "en-us+f2",
        "en-us+m7",
        "en-us+f4",
        "en-us+m3",
        "en-gb-scotland",
        "en-029",
        "en-gb-x-rp",
    )
    unseen_voice: str = "en-us+f3"
    words_per_minute: tuple[int, int] = (145, 185)
    pitch: tuple[int, int] = (40, 60)
    """espeak-ng's scale of 0 to 99."""
    max_digits: int = 4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Speech:
    path: str
    split: str
    text: str
    voice: str
    words_per_minute: int
    pitch: int


def make_demo_corpus(folder: Path, demo: DemoCorpus | None = None) -> None:
    """Write WAV files and manifest.csv (path, text, speaker, split) into `folder`, which appears whole or not at all.

    A folder with the same corpus is left alone. The same settings give the same samples on every run.

    Raises:
        UsageError: the extra `demo` is not installed, or `folder` holds another corpus.
    """
    demo = demo or DemoCorpus()
    settings = json.dumps(asdict(demo), indent=1)
    if folder.exists():
        found = (folder / DEMO_SETTINGS).read_text() if (folder / DEMO_SETTINGS).is_file() else ""
        if found != settings:
            raise UsageError(f"{folder} holds another corpus than this demo: delete it or use another folder")
        return
    library, data = _find_espeak()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "wav").mkdir(parents=True)
    speeches = _plan_demo(demo)
    try:
        _speak_alone(temporary, speeches, library, data)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    with (temporary / DEMO_MANIFEST).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "text", "speaker", "split"))
        writer.writerows((speech.path, speech.text, speech.voice, speech.split) for speech in speeches)
    (temporary / DEMO_SETTINGS).write_text(settings)
    temporary.rename(folder)


def _find_espeak() -> tuple[str, str]:
    try:
        import espeakng_loader
    except ImportError:
        raise UsageError(
            "the demo corpus is spoken by espeak-ng, which is not installed: pip install -e '.[demo]'"
        ) from None
    return espeakng_loader.get_library_path(), espeakng_loader.get_data_path()


def _plan_demo(demo: DemoCorpus) -> list[_Speech]:
    """What each clip says and how, ordered by voice (changing the voice is slow)."""
    rng = random.Random(demo.seed)
    training, dev, test = _digit_strings(demo, rng)
    voices = demo.train_voices
    plan = []
    for clip in range(demo.num_train_clips):
        strings = training[clip // len(voices) % len(training)]
        plan.append((voices[clip % len(voices)], "train", rng.choice(strings)))
    plan += [(voices[clip % len(voices)], "dev", text) for clip, text in enumerate(dev)]
    plan += [(voices[clip % len(voices)], "test", text) for clip, text in enumerate(test)]
    plan += [(demo.unseen_voice, "test", text) for text in test]
    return [
        _Speech(
            path=f"wav/{number:05d}.wav",
            split=split,
            text=" ".join(DIGIT_WORDS[int(digit)] for digit in digits),
            voice=voice,
            words_per_minute=rng.randint(*demo.words_per_minute),
            pitch=rng.randint(*demo.pitch),
        )
        for number, (voice, split, digits) in enumerate(sorted(plan))
    ]


def _digit_strings(demo: DemoCorpus, rng: random.Random) -> tuple[list[list[str]], list[str], list[str]]:
    """Training strings by length, dev strings, test strings; no string is in two of them.

    All single digits are for training; dev and test take lengths in turn, as long as there are strings left.
    """
    training = [[str(digit) for digit in range(10)]]
    held_out: list[list[str]] = []
    for length in range(2, demo.max_digits + 1):
        strings = [f"{number:0{length}d}" for number in range(10**length)]
        rng.shuffle(strings)
        count = int(HELD_OUT_SHARE * len(strings))
        held_out.append(strings[:count])
        training.append(strings[count:])
    taken = []
    for clip in range(demo.num_dev_clips + demo.num_test_strings):
        pools = held_out[clip % len(held_out) :] + held_out
        taken.append(next(pool for pool in pools if pool).pop())
    rng.shuffle(taken)
    return training, taken[: demo.num_dev_clips], taken[demo.num_dev_clips :]


def _speak_alone(folder: Path, speeches: list[_Speech], library: str, data: str) -> None:
    """Synthesise every speech in a fresh process: espeak-ng is not thread safe and carries state from clip to clip."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_speak_and_tell, args=(sender, folder, speeches, library, data), daemon=True)
    with without_main_module(), without_interrupts():
        process.start()
    sender.close()
    try:
        complaint = receiver.recv()
    except EOFError:
        complaint = "espeak-ng died: out of memory, or install the extra again, '.[demo]'"
    finally:
        process.kill()
        process.join()
    if complaint:
        raise RunFailed(complaint)


def _speak_and_tell(sender: Connection, folder: Path, speeches: list[_Speech], library: str, data: str) -> None:
    try:
        _speak(folder, speeches, library, data)
    except RunFailed as error:
        sender.send(str(error))
    else:
        sender.send("")


def _speak(folder: Path, speeches: list[_Speech], library: str, data: str) -> None:
    espeak = ctypes.CDLL(library)
    rate_hz = espeak.espeak_Initialize(ESPEAK_SYNCHRONOUS, 0, data.encode(), 0)
    _check_espeak("espeak_Initialize", 0 if rate_hz > 0 else rate_hz)
    # Breathy voices (f2, f3, f5) add noise, which is seeded with the time unless told otherwise.
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(ESPEAK_NOISE_SEED))
    samples: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def keep(block: int | None, num_samples: int, _events: int) -> int:
        if block and num_samples > 0:
            samples.append(ctypes.string_at(block, 2 * num_samples))
        return 0

    espeak.espeak_SetSynthCallback(keep)
    voice = None
    for speech in speeches:
        if speech.voice != voice:
            # An unknown voice returns 2 and the last voice goes on speaking.
            _check_espeak(f"voice {speech.voice!r}", espeak.espeak_SetVoiceByName(speech.voice.encode()))
            voice = speech.voice
        espeak.espeak_SetParameter(ESPEAK_RATE, speech.words_per_minute, 0)
        espeak.espeak_SetParameter(ESPEAK_PITCH, speech.pitch, 0)
        text = speech.text.encode() + b"\0"
        samples.clear()
        _check_espeak("espeak_Synth", espeak.espeak_Synth(text, len(text), 0, 1, 0, ESPEAK_UTF8, None, None))
        _write_wav(folder / speech.path, b"".join(samples), rate_hz)


def _check_espeak(what: str, status: int) -> None:
    if status != 0:
        raise RunFailed(f"espeak-ng: {what} failed with status {status}: install the extra again, '.[demo]'")


def _write_wav(path: Path, samples: bytes, rate_hz: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(samples)
    # A fixed time, so that the same corpus made again agrees with what was prepared from it.
    os.utime(path, (0, 0))
