"""Audio to text: files, folders, patterns and stdin, of any length.

    python transcribe.py --model_name_or_path runs/en/model interview.mp3
    python transcribe.py --model_name_or_path runs/en/model --format srt --output_dir subtitles recordings/ 'more/*.wav'
    ffmpeg -i film.mp4 -f wav - | python transcribe.py --model_name_or_path runs/en/model -

Long recordings pass through the model in overlapping windows that are joined where nothing is said; memory does not
grow with their length. A file that cannot be read is named and left out, and the status is 1.
"""

from errors import RunFailed, UsageError, exit_status, in_one_line

# isort: split

import allocator  # noqa: F401 - before torch
import collector  # before torch

# isort: split

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from atomic import nearest_existing, reporting_disk_errors, write_atomically
from audio import ClipError
from config import TranscribeConfig, parse_arguments
from progress import Progress, say
from recognition import Recogniser
from recording import Recording, find_recordings, header_seconds
from recovery import failing_by_name
from subtitles import FORMATS, Transcript

collector.wake()

# Files are batched by length among as many as this; their texts come in the order of the names.
GROUP_SECONDS = 900.0
# Each file of a group, and of the one that is decoded meanwhile, is open: systems allow 1,024, macOS 256.
GROUP_FILES = 64
OUT_OF_MEMORY_REMEDY = "lower --max_batch_seconds, or --chunk_length_s"

Opened = tuple[str, Recording | ClipError]


def main() -> None:
    """Parse, read, write."""
    config = parse_arguments(TranscribeConfig, sys.argv[1:], __doc__)
    names = find_recordings(config.audio)
    if not names:
        raise UsageError(f"{', '.join(config.audio)}: no audio file in it")
    formats = list(FORMATS) if config.format == "all" else [config.format]
    outputs = plan_outputs(names, config.audio, config.output_dir, formats)
    recogniser = Recogniser(config)
    with failing_by_name(OUT_OF_MEMORY_REMEDY):
        failed = transcribe(recogniser, names, outputs, formats)
    if failed:
        raise RunFailed(f"{len(failed)} of {len(names)} files without a whole transcript: {', '.join(failed)}")


def plan_outputs(
    names: Sequence[str], arguments: Sequence[str], output_dir: str | None, formats: Sequence[str]
) -> dict[str, dict[str, Path]]:
    """Where each file's transcript goes, by format; empty without --output_dir.

    Files of a folder keep their places below it; files of one stem (a.wav, a.mp3) keep their suffix.

    Raises:
        UsageError: subtitles of several files would run into each other; two files would share one transcript.
    """
    if output_dir is None:
        if len(formats) > 1 or (len(names) > 1 and formats[0] in ("srt", "vtt")):
            raise UsageError(f"{len(names)} files as {', '.join(formats)} need --output_dir, a file for each")
        return {}
    existing = nearest_existing(Path(output_dir))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "cannot be written to" if existing.is_dir() else "is a file"
        raise UsageError(f"--output_dir: {existing} {why}: name a folder for the transcripts")
    folders = [Path(argument) for argument in arguments if Path(argument).is_dir()]
    places = [_place_of(name, folders) for name in names]
    times = Counter(place.with_suffix("") for place in places)
    bases = [place if times[place.with_suffix("")] > 1 else place.with_suffix("") for place in places]
    twice = sorted((str(base), count) for base, count in Counter(bases).items() if count > 1)
    if twice:
        name, count = twice[0]
        raise UsageError(f"{count} of the files are called {name}: transcribe one by one")
    return {
        name: {kind: Path(output_dir) / f"{base}.{kind}" for kind in formats}
        for name, base in zip(names, bases, strict=True)
    }


def _place_of(name: str, folders: Sequence[Path]) -> Path:
    inside = [folder for folder in folders if Path(name).is_relative_to(folder)]
    return Path(name).relative_to(inside[0]) if inside else Path("stdin" if name == "-" else Path(name).name)


def transcribe(
    recogniser: Recogniser, names: Sequence[str], outputs: dict[str, dict[str, Path]], formats: Sequence[str]
) -> list[str]:
    """Every file in its turn. Returns the names of those without a whole transcript."""
    failed = []
    seconds = {name: header_seconds(name) for name in names}
    is_alone = len(names) == 1
    with Progress("transcribing", round(sum(seconds.values())), "s of audio") as progress:
        for group in open_ahead(group_files(seconds)):
            seconds |= {name: one.seconds if isinstance(one, Recording) else 0.0 for name, one in group}
            progress.expect(round(sum(seconds.values())))
            for name, found in recogniser.read(group, progress.advance):
                if isinstance(found, ClipError):
                    say(f"skipped {in_one_line(name)}: {found.reason} ({found.detail})", sys.stderr)
                    failed.append(name)
                    continue
                transcript, shortfall = found
                if shortfall:
                    say(
                        f"{in_one_line(name)} breaks off {shortfall:.1f} s before the end that its header names",
                        sys.stderr,
                    )
                    failed.append(name)
                if outputs:
                    write_transcript(transcript, outputs[name])
                else:
                    print_transcript(progress, on_stdout(transcript, formats[0], is_alone))
    return failed


def group_files(seconds: dict[str, float]) -> list[list[str]]:
    """Names in their order, so many together that they fill GROUP_SECONDS, GROUP_FILES at most."""
    groups: list[list[str]] = []
    filled = GROUP_SECONDS
    for name, length in seconds.items():
        if filled >= GROUP_SECONDS or len(groups[-1]) == GROUP_FILES:
            groups.append([])
            filled = 0.0
        groups[-1].append(name)
        filled += length
    return groups


def open_ahead(groups: list[list[str]]) -> Iterator[list[Opened]]:
    """The recordings of each group, decoded in a thread while the model is at work on the group before."""
    coming = _open_in_thread(groups[0])
    for following in [*groups[1:], None]:
        opened = coming.result()
        if following is not None:
            coming = _open_in_thread(following)
        yield opened


def _open_in_thread(names: list[str]) -> "Future[list[Opened]]":
    """In a daemon thread, which Ctrl-C does not wait for: a file may be hours long, and stdin never end."""
    future: Future[list[Opened]] = Future()

    def work() -> None:
        try:
            future.set_result([(name, _open(name)) for name in names])
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _open(name: str) -> Recording | ClipError:
    try:
        return Recording(name)
    except ClipError as error:
        return error


def write_transcript(transcript: Transcript, paths: dict[str, Path]) -> None:
    """One file for each format."""
    for kind, path in paths.items():
        with reporting_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, FORMATS[kind](transcript))


def print_transcript(progress: Progress, text: str) -> None:
    """On stdout.

    Raises:
        RunFailed: nobody reads it any more (`| head`), or the disk is full, and the work has no other result.
    """
    try:
        is_read = progress.print(text)
    except OSError as error:
        raise RunFailed(f"stdout cannot be written: {error.strerror}") from error
    if not is_read:
        raise RunFailed("stdout is closed, the other transcripts would be lost; --output_dir writes files")


def on_stdout(transcript: Transcript, kind: str, is_alone: bool) -> str:
    """A transcript as printed; text of several files has the name of its file before it."""
    prefix = "" if is_alone or kind != "txt" else in_one_line(transcript.file).replace("\t", " ") + "\t"
    return prefix + FORMATS[kind](transcript).removesuffix("\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
