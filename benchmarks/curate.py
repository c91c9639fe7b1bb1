"""Speed and memory of curation, beside datatrove in the same run: `python benchmarks/curate.py FOLDER --peer PYTHON`.

FOLDER holds documents as JSON lines; PYTHON is the interpreter of an environment with datatrove, spacy and xxhash. What is
printed are CPU seconds of one core, so that other work on the machine changes little:

    rules      FineWeb's chain (repetition, quality, C4, FineWeb) over the same documents, in one process that read others;
               and how many decisions are the same
    near       our near-duplicate removal, verified, compared with the peer's signatures alone
    memory     the largest resident memory of all processes together, at the input's size and at ten times of it with 30 %
               of the words redrawn
    sample     the shipped sample end to end, two workers: CPU and wall seconds

Only what --only names is measured, where it names something.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.curation import pipeline, shingles
from phi3_jax.curation.engine import Engine
from phi3_jax.curation.rule import decide
from phi3_jax.curation.table import DOCUMENT
from phi3_jax.data import sources
from phi3_jax.experiment import made

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
PEER = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
texts = [json.loads(line) for line in open(sys.argv[1])]
c4 = C4QualityFilter(filter_no_terminal_punct=False)
filters = [GopherRepetitionFilter(), GopherQualityFilter(), c4, FineWebQualityFilter()]
def chain(text):
    document = Document(text=text, id="")
    for f in filters:
        found = f.filter(document)
        if found is not True:
            return found[1]
    return "keep"
def timed(call, warm):
    for text in warm:
        call(text)
    start = time.process_time()
    found = [call(text) for text in texts]
    return time.process_time() - start, found
if sys.argv[2] == "rules":
    seconds, found = timed(chain, [json.loads(line) for line in open(sys.argv[3])])
else:
    step = MinhashDedupSignature(output_folder="/tmp", config=MinhashConfig())
    seconds, found = timed(lambda text: len(step.get_signature(step.get_shingles(text))), texts[:5])
print(json.dumps([seconds, found]))
"""


def texts_of(folder: str, most: int, longest: int) -> list[str]:
    """Documents drawn with a fixed seed, cut to `longest` characters."""
    every = list(sources.texts(folder).documents)
    return [text[:longest] for text in random.Random(0).sample(every, min(most, len(every)))]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds of this process, what the call gives)."""
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def peer(python: str, what: str, texts: list[str], before: list[str]) -> tuple[float, list[Any]]:
    """(CPU seconds, what it says of each text) of datatrove, after the texts `before`."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "texts.jsonl", Path(folder) / "before.jsonl"]
        for path, of in zip(paths, (texts, before), strict=True):
            path.write_text("".join(json.dumps(text) + "\n" for text in of))
        command = [python, "-c", PEER, str(paths[0]), what, str(paths[1])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, found = json.loads(done.stdout.splitlines()[-1])
    return seconds, found


def rules(texts: list[str], before: list[str], python: str | None) -> None:
    """Our chain and the peer's."""
    plan = []
    for name in CHAIN:
        rule, more = DOCUMENT[name], {"words": "spacy"} | ({"terminal": False} if name == "c4" else {})
        parameters = {p: key.default for p, key in rule.keys.items()} | more
        plan.append((rule, parameters, {p: v for p, v in rule.how(parameters).items() if p != "exempt"}))

    def every(text: str) -> str:
        """All numbers of all rules, as a curation measures them, and the first reason."""
        reason = ""
        for rule, parameters, how in plan:
            values, text = rule.measure(text, {}, **how)
            reason = reason or decide(rule.checks, values, parameters)
        return reason or "keep"

    for text in before:
        every(text)
    seconds, found = timed(lambda: [every(text) for text in texts])
    size = sum(map(len, texts)) / 1e6
    print(f"rules      ours {len(texts) / seconds:8,.0f} documents/s {size / seconds:6.2f} MB/s")
    if python:
        theirs, reasons = peer(python, "rules", texts, before)
        same = sum(a == b for a, b in zip(found, reasons, strict=True))
        print(
            f"      datatrove {len(texts) / theirs:8,.0f} documents/s {size / theirs:6.2f} MB/s: ratio "
            f"{theirs / seconds:.1f}; {same} of {len(texts)} decisions are the same"
        )


def near(texts: list[str], python: str | None) -> None:
    """Our removal, all of it, and the peer's signatures."""
    config = made("experiments/curation.py").to_dict() | {"order": ("near",)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        engine = Engine("native", 1)
        spent: dict[str, float] = {}
        with _stages(spent):
            pipeline.curate(config, [str(path)], Path(folder) / "out", engine)
    seconds = spent["near"]
    size = sum(map(len, texts)) / 1e6
    factors = shingles.multipliers(140)
    alone, _ = timed(lambda: [shingles.bands(shingles.Hashes(shingles.plain(t)).of(5), factors, 7) for t in texts])
    print(
        f"near       ours {len(texts) / seconds:8,.0f} documents/s {size / seconds:6.2f} MB/s, verified; signatures alone "
        f"{len(texts) / alone:,.0f} documents/s"
    )
    if python:
        theirs, _ = peer(python, "signatures", texts, [])
        print(
            f"      datatrove {len(texts) / theirs:8,.0f} documents/s, signatures alone: ratio {theirs / seconds:.1f}"
        )


@contextlib.contextmanager
def _stages(spent: dict[str, float]) -> Iterator[None]:
    """Measures the step `near` inside a curation: CPU seconds of this process with all its threads."""
    from phi3_jax.curation import near as room

    step = room.near

    def measured(*arguments: Any) -> None:
        spent["near"], _ = timed(lambda: step(*arguments))

    room.near = measured
    try:
        yield
    finally:
        room.near = step


# ------------------------------------------------------------------------------------------------ memory


def resident(group: int) -> int:
    """Bytes in memory of all processes of a process group, pages that they share counted once for each as their part."""
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.joinpath("stat").read_text().rpartition(")")[2].split()[2]) == group:
                lines = path.joinpath("smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def curate(folder: str, out: str, *more: str) -> tuple[float, float, int]:
    """(CPU seconds, wall seconds, most bytes in memory) of the command."""
    before, start, most = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    command = [sys.executable, "-m", "phi3_jax", "curate", "--config", "experiments/curation.py", "--input", folder]
    process = subprocess.Popen(
        [*command, "--output", out, *more], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.2):
            most = max(most, resident(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    status = process.wait()
    done.set()
    thread.join()
    if status:
        raise SystemExit(f"the command ended with status {status}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, time.perf_counter() - start, most


def memory(folder: str) -> None:
    """The most memory at the input's size and at ten times of it."""
    every = list(sources.texts(folder).documents)
    words = sorted({word for text in every[:2000] for word in text.split()})
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        small, large = Path(place) / "small", Path(place) / "large"
        for path, copies in ((small, 1), (large, 10)):
            path.mkdir()
            for copy in range(copies):
                with (path / f"{copy}.jsonl").open("w") as file:
                    for text in every:
                        file.write(json.dumps({"text": text if copies == 1 else _redrawn(text, words, draw)}) + "\n")
        found = {}
        for path in (small, large):
            size = sum(f.stat().st_size for f in path.glob("*"))
            cpu, wall, most = curate(str(path), str(Path(place) / f"out-{path.name}"), "--workers", "2")
            found[path.name] = most
            print(f"memory     {size / 1e6:6.0f} MB: {most / 2**20:6,.0f} MiB at most; {cpu:,.0f} CPU s, {wall:,.0f} s")
        bound = 1.25 * found["small"] + 200 * 10 * len(every)
        print(f"           1.25 times the first and 200 bytes a document: {bound / 2**20:,.0f} MiB")


def _redrawn(text: str, words: list[str], draw: random.Random) -> str:
    lines = []
    for line in text.split("\n"):
        lines.append(" ".join(draw.choice(words) if draw.random() < 0.3 else word for word in line.split(" ")))
    return "\n".join(lines)


def sample() -> None:
    """The shipped pages, end to end."""
    with tempfile.TemporaryDirectory() as place:
        cpu, wall, most = curate("examples/pages", f"{place}/out", "--workers", "2")
    print(f"sample     {cpu:.1f} CPU s, {wall:.1f} s, {most / 2**20:,.0f} MiB at most")


COMMAND = Command(
    "benchmarks/curate.py",
    __doc__ or "",
    lambda given: main(given),
    {
        "folder": Flag(keys.local("documents as JSON lines"), "FOLDER", needed=True, bare=True),
        "peer": Flag(keys.local("python of an environment with datatrove"), "PYTHON"),
        "documents": Flag(keys.whole("documents for rules and near", 1500, 20)),
        "longest": Flag(keys.whole("characters of one of them", 2400, 200)),
        "only": Flag(keys.word("what is measured", None, "rules", "near", "memory", "sample"), repeated=True),
    },
    "FOLDER --peer PYTHON",
)


def main(given: Any) -> None:
    """Measures what is asked for."""
    asked = given["only"] or ("rules", "near", "memory", "sample")
    os.chdir(ROOT)
    texts = texts_of(given["folder"], 2 * given["documents"], given["longest"])
    texts, before = texts[: given["documents"]], texts[given["documents"] :]
    if "rules" in asked:
        rules(texts, before, given["peer"])
    if "near" in asked:
        near(texts, given["peer"])
    if "memory" in asked:
        memory(given["folder"])
    if "sample" in asked:
        sample()


if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
