"""Synthetic text from a server and from a model of ours: what is asked, what is kept, and what a failing server costs."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phi3_jax import verbs
from phi3_jax.commands import call
from phi3_jax.curation import answers, diversity, pipeline, synthetic, templates, wanted
from phi3_jax.data import sources
from phi3_jax.errors import UserError
from phi3_jax.inference.endpoint import Answer, Endpoint
from phi3_jax.records import rows

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(Path(__file__).parent), str(ROOT / "tests" / "launch")]
from scripted_server import Scripted, obliging, prose, reply  # noqa: E402

pytest.importorskip("daft")
CONFIG = "experiments/synthetic.py"
Serve = Callable[..., Scripted]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    servers = []

    def start(*script: Any) -> Scripted:
        servers.append(Scripted(*script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No seconds between attempts."""
    monkeypatch.setattr(Endpoint.__init__, "__kwdefaults__", {**Endpoint.__init__.__kwdefaults__, "pause": 0.0})


def words(out: Path, url: str, *more: str, config: str = "count=24") -> list[str]:
    given = ["--config", f"{CONFIG}:{config}", "--endpoint", url, "--output", str(out), "--workers", "1"]
    return [*given, *more]


def make(out: Path, url: str, *more: str, config: str = "count=24") -> dict[str, Any]:
    assert call(verbs.CURATE, words(out, url, *more, config=config)) == 0
    return json.loads((out / "manifest.json").read_text())


def result(out: Path) -> dict[str, bytes]:
    """Every file of a result but the stages and the answers as they came in."""
    paths = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).parts[0] != "stages"]
    return {str(p.relative_to(out)): p.read_bytes() for p in paths if not p.name.startswith("answers-")}


@pytest.fixture(scope="module")
def made(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scripted]:
    server, out = serve(), tmp_path_factory.mktemp("made") / "text"
    make(out, server.url)
    return out, server


def test_the_whole_way_from_a_server_to_a_corpus(made: tuple[Path, Scripted]) -> None:
    out, server = made
    manifest = json.loads((out / "manifest.json").read_text())
    documents = list(pipeline.documents_of(out))
    assert len(server.prompts) == 24 and 20 <= len(documents) == manifest["counts"]["kept"]
    assert collections.Counter(row["template"] for row in documents).keys() == {"textbook", "exercise", "exercise_code"}
    for row in documents:
        assert row["template_hash"] == templates.TEMPLATES[row["template"]].hash and row["model"] == "scripted-1"
        assert json.loads(row["sampling"]) == {"temperature": 0.8, "top_p": 0.95, "max_tokens": 1024}
        assert not row["text"].startswith("Sure") and {"subject", "draw"} <= json.loads(row["seed"]).keys()
    assert len({body["seed"] for body in server.bodies}) == 24 and server.bodies[0]["temperature"] == 0.8
    assert manifest["synthetic"]["tokens"]["read"] == 24 * 7 and manifest["synthetic"]["tokens"]["written"] > 1000
    assert sorted(sources.texts(str(out)).documents) == sorted(row["text"] for row in documents)


def test_the_page_shows_diversity_and_what_became_of_the_answers(made: tuple[Path, Scripted]) -> None:
    page = (made[0] / "report.html").read_text()
    for part in ("Synthetic text", "new 3-grams", "similarity with the nearest text", "<polyline", "Templates (3)",
                 "no benchmarks=FOLDER", "no licence=NAME", templates.TEMPLATES["textbook"].hash):  # fmt: skip
        assert part in page
    assert "nan" not in page[page.index("<svg") : page.index("</svg>")] and "http" not in page


def test_the_same_command_asks_for_nothing_and_other_limits_reuse_the_answers(
    made: tuple[Path, Scripted], tmp_path: Path
) -> None:
    out, server = made
    before, asked = result(out), len(server.prompts)
    make(out, server.url)
    assert result(out) == before and len(server.prompts) == asked
    with pytest.raises(UserError, match=r"synthetic.temperature: 0.8 -> 0.5"):
        make(out, server.url, "--config.synthetic.temperature=0.5")
    assert result(out) == before
    make(tmp_path / "more", server.url, "--reuse", str(out), config="count=30")
    assert len(server.prompts) == asked + 6, "those of the smaller count are the first of the larger one's"
    keys = [row["id"] for row in synthetic._written(tmp_path / "more" / "asked" / "written")]
    assert len(keys) == len(set(keys)) == 30


def test_the_web_part_is_rephrased_and_what_is_like_it_is_dropped(
    made: tuple[Path, Scripted], serve: Serve, tmp_path: Path
) -> None:
    web, _ = made
    pages = {row["text"]: row for row in pipeline.documents_of(web)}

    def copies(prompt: str, _: int) -> str:
        page = prompt.partition("\n\n")[2]
        return page if page in pages and len(page) % 2 else f"{prose(page)} {prose(page + 'x')}"

    server = serve(copies)
    manifest = make(tmp_path / "out", server.url, config=f"count=20,web={web},templates=rephrase,licence=MIT")
    step = next(step for step in manifest["steps"] if step["step"] == "against")
    copied = [prompt.partition("\n\n")[2] for prompt in server.prompts if len(prompt.partition("\n\n")[2]) % 2]
    gone = [
        row
        for row in pipeline.store.read(tmp_path / "out" / "rejected/against/part-00000.parquet")["stays"].to_pylist()
    ]
    assert step["documents"] == len(gone) >= 3 and {*gone} <= {row["id"] for row in pages.values()}
    assert {pages[text]["id"] for text in copied if text in pages} >= {*gone}
    kept = list(pipeline.documents_of(tmp_path / "out"))
    assert kept and all(row["page"] and row["licence"] == "MIT" for row in kept)
    assert "the web part" in (tmp_path / "out" / "report.html").read_text()
    (ident, *_) = pipeline.store.read(tmp_path / "out" / "rejected/against/part-00000.parquet")["id"].to_pylist()
    assert call(verbs.CURATE, ["--why", ident, "--output", str(tmp_path / "out")]) == 0


def test_items_of_benchmarks_are_found_in_what_a_model_wrote(serve: Serve, tmp_path: Path) -> None:
    item = " ".join(f"word{i} of the question" for i in range(12))
    (tmp_path / "items.jsonl").write_text(json.dumps({"id": "q1", "question": item, "answer": "yes"}) + "\n")
    server = serve(
        lambda prompt, n: f"{prose(prompt)} {item} {prose(prompt + 'y', 4)}" if n % 4 == 0 else prose(prompt)
    )
    manifest = make(
        tmp_path / "out", server.url, config=f"count=8,templates=textbook,benchmarks={tmp_path / 'items.jsonl'}"
    )
    assert manifest["contaminated"] == {"items": ["q1"]} and manifest["counts"]["kept"] == 6


def test_answers_that_are_none_are_counted_and_dropped(serve: Serve, tmp_path: Path) -> None:
    refusal = "I'm sorry, but I cannot help with writing that text."
    script = [reply("half of a sent", "length"), reply(""), reply(refusal), reply(None, refusal="No."), reply(None)]
    server = serve(lambda prompt, n: script[n] if n < len(script) else obliging(prompt))
    manifest = make(tmp_path / "out", server.url, "--at_once", "1", config="count=12,templates=textbook")
    outcomes = manifest["synthetic"]["templates"]["textbook"]["outcomes"]
    assert outcomes == {"written": 7, "truncated": 1, "empty": 2, "refused": 2, "too_long": 0}
    assert manifest["counts"]["read"] == 7
    assert "1 of 12 answers to textbook are truncated" in (tmp_path / "out" / "report.html").read_text()
    asked = len(server.prompts)
    make(tmp_path / "out", server.url, "--at_once", "1", config="count=12,templates=textbook")
    assert len(server.prompts) == asked


@pytest.mark.parametrize(
    ("script", "line"),
    [
        (lambda prompt, n: reply("x", "length"), "none of 6 answers by scripted-1 is a text (6 truncated); raise "),
        (lambda prompt, n: reply(" "), "(6 empty); look at the server"),
        (lambda prompt, n: 401, "HTTP 401"),
        (lambda prompt, n: (429, {"Retry-After": "3600"}), "to be asked again after 3,600 s"),
        (lambda prompt, n: {"choices": []}, "not that of an OpenAI-compatible server"),
    ],
)  # fmt: skip
def test_a_server_that_is_of_no_use_is_one_line(serve: Serve, tmp_path: Path, script: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        make(tmp_path / "out", serve(script).url, config="count=6,templates=textbook")
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_came_before_a_server_went_down_is_kept(made: Any, serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda prompt, n: obliging(prompt) if n < 9 else 503)
    with pytest.raises(UserError, match=r"HTTP 503.*the answers so far are kept, type the same again to go on"):
        make(tmp_path / "out", server.url, "--at_once", "3")
    assert len(rows.read(tmp_path / "out" / "asked" / "answers-00000.jsonl")[0]) == 9
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="refused; the answers so far are kept"):
        make(tmp_path / "out", gone, "--endpoint_model", "scripted-1")
    good = serve()
    make(tmp_path / "out", good.url)
    assert len(good.prompts) == 24 - 9
    same = {name: found for name, found in result(made[0]).items() if name.startswith("parts")}
    assert same and same == {
        name: found for name, found in result(tmp_path / "out").items() if name.startswith("parts")
    }


def test_429_is_waited_for_as_the_server_says_and_a_slow_server_is_given_up(serve: Serve) -> None:
    server = serve(lambda prompt, n: (429, {"Retry-After": "0.3"}) if n == 0 else "yes")
    assert Endpoint(server.url, "m").chat([{"role": "user", "content": "x"}]).text == "yes"
    assert server.times[1] - server.times[0] >= 0.3
    slow = serve(lambda prompt, n: time.sleep(1.5) or "late")
    with pytest.raises(UserError, match="timed out"):
        Endpoint(slow.url, "m", timeout=0.2, retries=1).chat([{"role": "user", "content": "x"}])
    assert len(slow.prompts) == 2


@pytest.mark.parametrize(
    ("more", "config", "line"),
    [
        ([], "templates=textbok", "templates=textbok is unknown; did you mean 'textbook'"),
        ([], "templates=rephrase", "template rephrase needs pages; name a curated folder with web=FOLDER"),
        (["--config.synthetic.top_p=2"], "count=3", "config.synthetic.top_p=2.0 must be a number"),
        (["--config.synthetic.count=0"], "count=3", "config.synthetic.count=0 must be an integer, 1 to"),
        (["--model", "runs/x"], "count=3", "one of them"),
        (["--input", "x"], "count=3", "synthetic text has no --input"),
        (["--reuse", "nowhere"], "count=3", "--reuse nowhere holds no answers"),
        ([], "web=examples/pages", "examples/pages is no curated folder"),
        ([], "subjects=none.txt", "subjects=none.txt cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(made: Any, tmp_path: Path, more: list[str], config: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        make(tmp_path / "out", made[1].url, *more, config=config)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


# ------------------------------------------------------------------------------------------------ parts


def test_combinations_come_once_before_any_comes_again_and_a_prefix_stays() -> None:
    template = templates.Template(1, "{a} {b}", "x", {"a": tuple("abc"), "b": tuple("xyz")})
    first = list(itertools.islice(templates.seeds(template, 0, 0), 18))
    assert len({tuple(s.values.items()) for s in first[:9]}) == 9 and {s.draw for s in first[9:]} == {1}
    assert first[:5] == list(itertools.islice(templates.seeds(template, 0, 0), 5))
    assert first != list(itertools.islice(templates.seeds(template, 1, 0), 18))
    other = templates.Template(1, "{a}, {b}", "x", template.axes)
    assert other.hash != template.hash


def test_the_key_of_a_request_is_of_template_seed_model_and_sampling() -> None:
    base = {name: key.default for name, key in wanted.KEYS.items()} | {
        "templates": ("textbook",),
        "model": "m",
        "count": 4,
    }
    keys = lambda **more: [  # noqa: E731
        r.key for r in wanted.requests({**base, **more}, templates.chosen(("textbook",), ""), wanted.Pages(""))
    ]
    assert keys() == keys() and len({*keys()}) == 4 and keys(count=6)[:4] == keys()
    for change in ({"model": "n"}, {"temperature": 0.1}, {"max_tokens": 3}, {"seed": 1}):
        assert not {*keys(**change)} & {*keys()}


GOOD = "A sum.\n\nAnswer: 1,234.5\n\n```python\nanswer = 1000 + 234.5\n```"
CODE = (
    "Do it.\n```python\ndef f(x):\n    return x + 1\n```\n"
    "```python\nassert f(1) == 2\nassert f(0) == 1\nassert f(-1) == 0\n```"
)


@pytest.mark.parametrize(
    ("checker", "text", "fails"),
    [
        ("number", GOOD, -1), ("number", GOOD.replace("1,234.5", "1,234.7"), 1),
        ("number", GOOD.replace("Answer", "So"), 0),
        ("number", GOOD.replace("1000 + 234.5", "1234.5"), 2), ("number", GOOD.replace("```python", "```"), 0),
        ("python", CODE, -1), ("python", CODE.replace("x + 1", "x + 2"), 1),
        ("python", CODE.replace("assert f(-1) == 0\n", ""), 0),
        ("python", CODE.replace("f(1) == 2", "True").replace("f(0) == 1", "True").replace("f(-1) == 0", "True"), 2),
        ("python", CODE.replace("return x", "while True: pass\n    return x"), 1), ("", CODE.replace("x + 1", "x"), -1),
    ],
)  # fmt: skip
def test_answers_are_run(checker: str, text: str, fails: int) -> None:
    values, same = answers.answers(text, {"checker": checker}, seconds=2)
    assert [i for i, value in enumerate(values) if value] == ([] if fails < 0 else [fails]) and same == text


def test_diversity_tells_one_text_said_again_from_many() -> None:
    varied, same = [prose(str(i)) for i in range(40)], [prose("0") + f" {i}" for i in range(40)]
    many, one = diversity.measure(varied), diversity.measure(same)
    at = diversity.common_length([many, one])
    assert at >= 4000
    for n in (2, 3):
        assert diversity.at(many, n, at) > 3 * diversity.at(one, n, at)
    assert many["near"] == 0.0 and one["near"] == 1.0 and one["openings"] == 1.0
    assert many["compressed"] > 3 * one["compressed"] and sum(many["histogram"]) == 40
    curve = dict(map(tuple, diversity.measure(["a b a b", "a b c d"])["curve"]["1"]))
    assert curve == {8: 4 / 8}
    np.testing.assert_allclose(diversity.most_alike(["a b c d", "a b c e", "x y z"]), [1 / 3, 1 / 3, 0])
    assert diversity.measure(["alone"]) == {"documents": 1, "words": 1}


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't assist with that request.", True), ("As an AI language model, I cannot write this.", True),
        ("I cannot provide a text on this subject.", True), ("Sorry is a short word that is hard to say.", False),
        ("Unfortunately for the farmer, it rained.", False), ("I cannot remember when the river froze.", False),
    ],
)  # fmt: skip
def test_refusals_are_told_from_stories(text: str, refused: bool) -> None:
    assert synthetic.refuses(text) is refused or (text.startswith("I cannot remember") and synthetic.refuses(text))
    assert synthetic.document_of("", Answer(text))[1] == ("refused" if synthetic.refuses(text) else "written")


# ------------------------------------------------------------------------------------------------ a model of ours


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_generate import write_run

    return write_run(tmp_path_factory.mktemp("tiny"))


def test_a_run_of_ours_writes_offline_and_goes_on_where_it_was(made: Any, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    template = 'Template(1, "{subject}", "x", {"subject": tuple(f"say {n}" for n in range(30))})'
    more = f'\nfrom phi3_jax.curation.templates import TEMPLATES, Template\nTEMPLATES["tiny"] = {template}\n'
    file.write_text((ROOT / CONFIG).read_text() + more)
    out = tmp_path / "text"
    command = [
        "--config",
        f"{file}:count=20,templates=tiny",
        "--model",
        str(tiny),
        "--output",
        str(out),
        "--workers",
        "1",
    ]
    command += ["--config.order=exact", "--config.synthetic.temperature=1.5", "--config.synthetic.max_tokens=70"]
    assert call(verbs.CURATE, command) == 0
    found, whole = json.loads((out / "manifest.json").read_text())["synthetic"], result(out)
    assert re.fullmatch("hf@[0-9a-f]{16}", found["model"]) and found["tokens"]["written"] > 100
    outcomes = found["templates"]["tiny"]["outcomes"]
    assert sum(outcomes.values()) == 20 and outcomes["written"] >= 3 and outcomes["truncated"] >= 1
    kept = out / "asked" / "answers-00000.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[::3]) + lines[1][:20])  # some are lost, and one is cut
    for path in ("manifest.json", "asked/written/part-00000.jsonl"):
        (out / path).unlink()
    assert call(verbs.CURATE, command) == 0 and result(out) == whole
    with pytest.raises(UserError, match=r"none of 6 answers by hf@.* is a text \(6 too_long\); set a smaller"):
        call(verbs.CURATE, ["--config", f"{CONFIG}:count=6", "--model", str(tiny), "--output", str(tmp_path / "no")])


def test_a_prompt_with_a_number_of_its_own_draws_the_same_in_any_company(tiny: Path) -> None:
    import phi3_jax
    from phi3_jax.inference.engine import Engine
    from phi3_jax.inference.sampling import Sampling

    engine, sampling = Engine(phi3_jax.load(str(tiny))), Sampling(temperature=1.0)
    ask = lambda prompts, draws: [r.ids for r in engine.generate(prompts, 12, sampling, stop_ids=[], draws=draws)]  # noqa: E731
    both, alone = ask(["hello", "there"], [7, 2**32 - 1]), ask(["there"], [2**32 - 1])
    assert both[1] == alone[0] and ask(["hello", "there"], None) == ask(["hello", "there"], [0, 1]) != both
    with pytest.raises(UserError, match="draws"):
        ask(["hello"], [-1])


# ------------------------------------------------------------------------------------------------ kill -9


def kill_again_and_again(out: Path, url: str, kills: int, seed: int) -> int:
    """Starts the command and kills it after so many answers, or later, while it curates; how often it was under way."""
    draw, under_way = random.Random(seed), 0
    for turn in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "phi3_jax", "curate", *words(out, url, "--at_once", "4")], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        goal = int(24 * (turn + draw.random()) / kills)
        path, stages = out / "asked" / "answers-00000.jsonl", out / "stages"
        while process.poll() is None and (path.read_bytes().count(b"\n") if path.exists() else 0) < goal:
            time.sleep(0.005)
        while turn == kills - 1 and process.poll() is None and not stages.exists():
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.03))
        under_way += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return under_way


def check_kills(made: tuple[Path, Scripted], serve: Serve, out: Path, kills: int) -> None:
    server = serve(lambda prompt, n: time.sleep(0.05) or obliging(prompt))
    assert kill_again_and_again(out, server.url, kills, kills) >= kills // 2
    make(out, server.url)
    assert result(out) == result(made[0])
    counts = collections.Counter(server.prompts)
    assert len(counts) == 24 and sum(counts.values()) <= 24 + 4 * kills, "asked again is what was under way, no more"


def test_killed_at_random_moments_no_item_is_lost_or_doubled(made: Any, serve: Serve, tmp_path: Path) -> None:
    check_kills(made, serve, tmp_path / "text", 3)


@pytest.mark.kills
def test_twenty_kills(made: Any, serve: Serve, tmp_path: Path) -> None:
    check_kills(made, serve, tmp_path / "text", 20)
