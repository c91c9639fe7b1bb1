"""MT-Bench: replies kept across runs, judged by a callable or a server of our own, bad ones said."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

import phi3_jax
from phi3_jax.data import tokenizers
from phi3_jax.errors import UserError
from phi3_jax.evaluation import mt_bench
from phi3_jax.inference.endpoint import Endpoint
from phi3_jax.inference.engine import Completion
from phi3_jax.interop.templates import Template
from phi3_jax.records import ownership
from phi3_jax.records import rows as rows_module

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "benchmarks"


def question(number: int, category: str, reference: list[str] = [], gpt4: list[str] = []) -> dict:  # noqa: B006
    turns = [f"first {number}", f"second {number}"]
    row = {"id": f"mt_bench/{category}/{number}", "subset": category, "turns": turns}
    return row | {"reference": reference, "gpt4_reference": gpt4}


QUESTIONS = [
    question(1, "writing"), question(2, "math", ["2", "3"], ["two", "three"]), question(3, "stem"),
    question(4, "math", ["5", "6"]), question(5, "extraction", ["7", "8"]),
]  # fmt: skip


def prompts() -> list[dict]:
    texts = {
        "single-v1": "Q {question} A {answer}", "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1-multi-turn": "{ref_answer_1} {ref_answer_2} {question_1} {answer_1} {question_2} {answer_2}",
    }  # fmt: skip
    return [{"name": name, "system_prompt": f"you judge {name}", "prompt_template": t} for name, t in texts.items()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def write_data(folder: Path) -> Path:
    (folder / "mt_bench").mkdir(parents=True)
    (folder / "mt_bench" / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "mt_bench" / "judge_prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts()))
    return folder


class Echo:
    """An engine that answers with the last 20 characters of its prompt; remembers temperatures and prompts."""

    def __init__(self, context: int = 400, fail_after: int | None = None) -> None:
        self.config = phi3_jax.proxy("mini", "pico", vocab=320, context=context)
        self.template = Template("mini", "a test says so")
        self.tokenizer, self.calls, self.fail_after = tokenizers.load("bytes"), [], fail_after

    def generate(self, prompts, max_new_tokens, sampling, stop=()):
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append((prompts, max_new_tokens, sampling, stop))
        return [Completion([], self.tokenizer.decode(p)[-20:], [], "stop", len(p)) for p in prompts]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ replies


def test_two_turns_with_the_temperature_of_the_category(tmp_path: Path) -> None:
    engine = Echo()
    rows = mt_bench.answer(engine, QUESTIONS, tmp_path, "m step 3")
    assert [r["id"] for r in rows] == [q["id"] for q in QUESTIONS]
    assert [r["settings"]["temperature"] for r in rows] == [0.7, 0.0, 0.1, 0.0, 0.0]
    assert all(len(r["replies"]) == 2 and r["finish"] == ["stop", "stop"] for r in rows)
    for given, limit, sampling, _ in engine.calls:
        texts = [engine.tokenizer.decode(p) for p in given]
        assert limit == 100
        heat = {"1": 0.7, "3": 0.1}
        assert {heat.get(t.split("first ")[1][0], 0.0) for t in texts} == {sampling.temperature}
    second = next(t for t in map(engine.tokenizer.decode, engine.calls[1][0]))
    assert second == f"User: first 1\n\nAssistant: {rows[0]['replies'][0]}\n\nUser: second 1\n\nAssistant:"
    assert {r["id"]: r for r in lines(tmp_path / mt_bench.REPLIES)} == {r["id"]: r for r in rows}


def test_replies_of_the_same_model_and_settings_are_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        mt_bench.answer(Echo(fail_after=3), QUESTIONS, tmp_path, "m")
    kept = lines(tmp_path / mt_bench.REPLIES)
    assert [r["category"] for r in kept] == ["writing"]
    with open(tmp_path / mt_bench.REPLIES, "a") as file:
        file.write('{"id": "mt_bench/st')  # a torn line
    engine = Echo()
    rows = mt_bench.answer(engine, QUESTIONS, tmp_path, "m")
    assert rows[0] == kept[0] and len(engine.calls) == 4
    mt_bench.answer(engine, QUESTIONS, tmp_path, "m")
    assert len(engine.calls) == 4
    mt_bench.answer(engine, QUESTIONS, tmp_path, "another")
    assert len(engine.calls) == 10
    mt_bench.answer(engine, QUESTIONS, tmp_path, "m", seed=1)
    assert len(engine.calls) == 16
    changed = [q | {"turns": [q["turns"][0], "other"]} if q is QUESTIONS[0] else q for q in QUESTIONS]
    mt_bench.answer(engine, changed, tmp_path, "m")
    assert len(engine.calls) == 18


def test_a_group_of_questions_is_saved_whole_and_drawn_again_as_before(tmp_path: Path) -> None:
    """Samples depend on the questions answered together: a stop between groups changes none."""
    asked = [question(n, "writing") for n in range(mt_bench.GROUP + 3)]

    class Seeded(Echo):
        def generate(self, prompts, max_new_tokens, sampling, stop=()):
            super().generate(prompts, max_new_tokens, sampling, stop)
            return [Completion([], f"{sampling.seed} {i}", [], "stop", 1) for i in range(len(prompts))]

    whole = mt_bench.answer(Seeded(), asked, tmp_path / "whole", "m")
    with pytest.raises(KeyboardInterrupt):
        mt_bench.answer(Seeded(fail_after=3), asked, tmp_path / "cut", "m")
    assert len(lines(tmp_path / "cut" / mt_bench.REPLIES)) == mt_bench.GROUP
    assert mt_bench.answer(Seeded(), asked, tmp_path / "cut", "m") == whole
    assert (tmp_path / "cut" / mt_bench.REPLIES).read_bytes() == (tmp_path / "whole" / mt_bench.REPLIES).read_bytes()


def test_replies_with_line_separators_are_kept_for_every_reader(tmp_path: Path) -> None:
    class Odd(Echo):
        def generate(self, prompts, *more, **options):
            return [Completion([], "a\u2028b\x85c\u2029d\x0ce\rf", [], "stop", 1) for _ in prompts]

    rows = mt_bench.answer(Odd(), QUESTIONS, tmp_path, "m")
    by_id = {row["id"]: row for row in lines(tmp_path / mt_bench.REPLIES)}
    assert [by_id[row["id"]] for row in rows] == rows
    assert mt_bench.answer(Echo(fail_after=0), QUESTIONS, tmp_path, "m") == rows, "nothing is asked again"


@pytest.mark.parametrize(
    "change", [{"id": 3}, {"id": ["x"]}, {"replies": None}, {"replies": ["one"]}, {"replies": [1, 2]}, {"cut": "no"}]
)
def test_a_kept_reply_that_is_none_is_asked_again(tmp_path: Path, change: dict) -> None:
    rows = mt_bench.answer(Echo(), QUESTIONS[:1], tmp_path, "m")
    path = tmp_path / mt_bench.REPLIES
    path.write_text(json.dumps(rows[0] | change) + "\n")
    engine = Echo()
    assert mt_bench.answer(engine, QUESTIONS[:1], tmp_path, "m") == rows and len(engine.calls) == 2


def test_replies_are_added_under_the_lock(tmp_path: Path, monkeypatch) -> None:
    seen, put = [], rows_module.put_rows
    owner = tmp_path / ownership.INSIDE
    monkeypatch.setattr(rows_module, "put_rows", lambda *a: seen.append(owner.exists()) or put(*a))
    replies = mt_bench.answer(Echo(), QUESTIONS[:1], tmp_path, "m")
    mt_bench.grade(replies, QUESTIONS[:1], {p["name"]: p for p in prompts()}, lambda _: "[[3]]", "j", tmp_path)
    assert seen == [True] * 3 and not owner.exists()


def test_prompts_longer_than_the_context_are_cut_and_counted(tmp_path: Path) -> None:
    engine = Echo(context=40)
    rows = mt_bench.answer(engine, QUESTIONS[:1], tmp_path, "m")
    assert [len(call[0][0]) for call in engine.calls] == [len("User: first 1\n\nAssistant:"), 30]
    assert rows[0]["cut"] == 1


# ------------------------------------------------------------------------------------------------ judging


def test_the_judge_sees_references_where_fastchat_shows_them(data: Path) -> None:
    named = mt_bench.judge_prompts(data)
    replies = ["r{question}1", "r2"]
    seen = [[mt_bench.prompt_of(q, replies, t, named).user for t in (0, 1)] for q in QUESTIONS]
    assert seen[0] == ["Q first 1 A r{question}1", "first 1 r{question}1 second 1 r2"]
    assert seen[1] == ["Q first 2 R two A r{question}1", "two three first 2 r{question}1 second 2 r2"]
    assert seen[3][0] == "Q first 4 R 5 A r{question}1"
    assert seen[4][0] == "Q first 5 A r{question}1"  # an extraction question is graded without
    whole = mt_bench.prompt_of(QUESTIONS[1], replies, 1, named)
    assert whole.system == "you judge single-math-v1-multi-turn" and whole == f"{whole.system}\n\n{whole.user}"


@pytest.mark.parametrize(
    ("text", "value"),
    [("Good. Rating: [[7]]", 7), ("[[8.5]] then [[2]]", 8.5), ("Rating: [3]", 3), ("7", None), ("[[rating]]", None),
     ("[[0]]", None), ("[[11]]", None), ("", None)],
)  # fmt: skip
def test_ratings(text: str, value: float | None) -> None:
    assert mt_bench.rating(text) == value


def test_means_over_turns_and_categories(data: Path, tmp_path: Path) -> None:
    answers = {"first 1 ": "[[2]]", "second 1": "[[4]]", "first 2 ": "[[9]]", "second 2": "no rating"}
    replies = mt_bench.answer(Echo(), QUESTIONS[:2], tmp_path, "m")
    asked = []

    def judge(prompt: str) -> str:
        asked.append(prompt)
        assert isinstance(prompt, str)
        key = [k for k in answers if k.strip() in str(prompt).partition("Q ")[2 if "Q " in prompt else 0]]
        return answers["second 1" if "second 1" in prompt else "second 2" if "second 2" in prompt else key[0]]

    graded = mt_bench.grade(replies, QUESTIONS[:2], mt_bench.judge_prompts(data), judge, "me", tmp_path)
    assert [g["rating"] for g in graded] == [2, 4, 9, None]
    rows = {r["task"]: r for r in mt_bench.rows_of(graded, 80)}
    assert rows["mt_bench"]["value"] == 5 and rows["mt_bench"]["n"] == 3 and rows["mt_bench"]["subset_of"] == 160
    assert rows["mt_bench/turn1"]["value"] == 5.5 and rows["mt_bench/turn2"]["value"] == 4
    assert rows["mt_bench/writing"]["value"] == 3 and rows["mt_bench/math"]["value"] == 9
    assert {(r["judge"], r["metric"]) for r in rows.values()} == {("me", "rating by me")}
    # clustered by question: residuals -4 (two ratings of question 1) and 4, G / (G - 1) = 2
    assert rows["mt_bench"]["stderr"] == pytest.approx(np.sqrt(2 * (16 + 16)) / 3)
    mt_bench.grade(replies, QUESTIONS[:2], mt_bench.judge_prompts(data), judge, "me", tmp_path)
    assert len(asked) == 5  # the four, and again the one without a rating
    mt_bench.grade(replies, QUESTIONS[:2], mt_bench.judge_prompts(data), judge, "you", tmp_path)
    assert len(asked) == 9
    assert mt_bench.rows_of([g | {"rating": None} for g in graded], 80) == []


# ------------------------------------------------------------------------------------------------ a server


class Server:
    """Answers each POST with the next of `script`: a status, or a body (the last one again and again)."""

    def __init__(self, script: list) -> None:
        self.requests: list[tuple[str, dict, dict]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                step = script[min(len(outer.requests), len(script)) - 1]
                text = step if isinstance(step, bytes) else b"{}"
                self.send_response(step if isinstance(step, int) else 200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def says(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(*script) -> Server:
        servers.append(Server(list(script)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_an_endpoint_gets_both_parts_and_the_key(serve, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(says("Rating: [[6]]"))
    judge = Endpoint(server.url + "/", "judge-1", pause=0)
    prompt = mt_bench.prompt_of(QUESTIONS[0], ["a", "b"], 0, mt_bench.judge_prompts(data))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert mt_bench.rating(judge(prompt)) == 6
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    judge("plain")
    (path, headers, body), (_, with_key, plain) = server.requests
    assert path == "/v1/chat/completions" and body["model"] == "judge-1" and body["temperature"] == 0
    assert [m["role"] for m in body["messages"]] == ["system", "user"] and "Authorization" not in headers
    assert with_key["Authorization"] == "Bearer sk-test"
    assert plain["messages"] == [{"role": "user", "content": "plain"}]


@pytest.mark.parametrize(
    ("script", "calls", "words"),
    [
        ([500, 503, 429, says("ok")], 4, None),
        ([b"not json", b'{"choices": []}', says(None), says("ok")], 4, None),
        ([500], 4, "HTTP 500"),
        ([b"[]"], 4, "not that of an OpenAI-compatible server"),
        ([says(3)], 4, "holds no text"),
        ([401], 1, "HTTP 401"),
        ([404], 1, "HTTP 404"),
    ],
)
def test_an_endpoint_is_asked_again_where_that_may_help(serve, script: list, calls: int, words: str | None) -> None:
    server = serve(*script)
    judge = Endpoint(server.url, "judge-1", pause=0)
    if words is None:
        assert judge("x") == "ok"
    else:
        with pytest.raises(UserError) as error:
            judge("x")
        assert words in str(error.value) and "\n" not in str(error.value) and server.url in str(error.value)
    assert len(server.requests) == calls


def test_a_server_that_is_down_and_one_that_hangs() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="refused; the replies and judgements so far are saved"):
        Endpoint(f"http://127.0.0.1:{port}/v1", "j", pause=0)("x")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="timed out"):
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            Endpoint(url, "j", pause=0, timeout=0.2, retries=1)("x")
    for url in ("localhost:8000", "file:///etc/passwd", "http://"):
        with pytest.raises(UserError, match="OpenAI-compatible server"):
            Endpoint(url, "j")


def test_judgements_before_the_server_went_down_stay(serve, data: Path, tmp_path: Path) -> None:
    server = serve(says("[[5]]"), says("[[6]]"), 500)
    replies = mt_bench.answer(Echo(), QUESTIONS, tmp_path, "m")
    judge, named = Endpoint(server.url, "j", pause=0), mt_bench.judge_prompts(data)
    with pytest.raises(UserError, match="HTTP 500"):
        mt_bench.grade(replies, QUESTIONS, named, judge, "j", tmp_path)
    assert [r["rating"] for r in lines(tmp_path / mt_bench.JUDGEMENTS)] == [5, 6]
    again = serve(says("[[7]]"))
    judge = Endpoint(again.url, "j", pause=0)
    graded = mt_bench.grade(replies, QUESTIONS, named, judge, "j", tmp_path)
    assert [g["rating"] for g in graded] == [5, 6] + [7] * 8 and len(again.requests) == 8


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 6 cannot be read as JSON"),
        ("[]", "line 6 is [], not an object"),
        (json.dumps(QUESTIONS[0] | {"turns": ["one"]}), "line 6: turns has 1 entries"),
        (json.dumps(QUESTIONS[0] | {"turns": "ab"}), "line 6: turns is 'ab', not a list"),
        (json.dumps({k: v for k, v in QUESTIONS[0].items() if k != "id"}), "line 6: id is None, not a str"),
        (json.dumps(QUESTIONS[0] | {"turns": ["one", 2]}), "line 6"),
    ],
)
def test_wrong_lines_are_named(line: str, words: str, data: Path) -> None:
    path = data / "mt_bench" / "test.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError) as error:
        mt_bench.questions(data)
    assert words in str(error.value)


def test_missing_files_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; it holds questions"):
        mt_bench.questions(tmp_path / "nowhere")
    path = data / "mt_bench" / "judge_prompts.jsonl"
    path.write_text(json.dumps(prompts()[0]) + "\n")
    with pytest.raises(UserError, match="no whole prompt 'single-v1-multi-turn'"):
        mt_bench.judge_prompts(data)
    (data / "mt_bench" / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        mt_bench.questions(data)


@pytest.mark.shared("benchmarks")
def test_the_real_questions() -> None:
    found, named = mt_bench.questions(SHARED), mt_bench.judge_prompts(SHARED)
    assert len(found) == 80 and {q["subset"] for q in found} == set(mt_bench.TEMPERATURES)
    for row in found:
        for turn in (0, 1):
            prompt = mt_bench.prompt_of(row, ["reply one", "reply two"], turn, named)
            assert "{" not in prompt.user.replace(row["turns"][0], "").replace(row["turns"][1], "") or (
                row["gpt4_reference"] or row["reference"]
            )
            assert ("Reference" in prompt.user) == (row["subset"] in ("math", "reasoning", "coding"))
