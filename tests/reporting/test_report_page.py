"""Properties of the page: it stands alone, says what was trained, and never fails on half a study."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import fake_study
import pytest

from phi3_jax.__main__ import main
from phi3_jax.errors import UserError
from phi3_jax.records.table import read_study
from phi3_jax.reporting import page as page_module
from phi3_jax.reporting.page import headlines, write_report

LABEL = "NOT the released models"


class _Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parse(page: Path) -> _Tags:
    tags = _Tags()
    tags.feed(page.read_text())
    assert tags.open == []
    return tags


@pytest.mark.parametrize("name", ["whole", "text", "single", "broken"])
def test_the_page_needs_nothing_from_elsewhere(studies: dict[str, Path], name: str) -> None:
    page = studies[name] / "report.html"
    for source in _parse(page).sources:
        assert source.startswith("data:") or (studies[name] / source).is_file()
    assert "http" not in re.sub(r"base64,[^\"]*", "", page.read_text())


@pytest.mark.parametrize("name", ["whole", "text", "single", "broken"])
def test_every_caption_and_every_figure_says_proxy(studies: dict[str, Path], name: str) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", (studies[name] / "report.html").read_text())
    assert captions and all(LABEL in caption for caption in captions)
    assert len(captions) == len(list((studies[name] / "figures").glob("*.png")))
    for svg in (studies[name] / "figures").glob("*.svg"):
        assert "<!-- Proxies at pico scale" in svg.read_text() and LABEL in svg.read_text()


def test_figures_without_data_are_left_out_and_said(studies: dict[str, Path]) -> None:
    def names(study: str) -> set[str]:
        return {p.stem for p in (studies[study] / "figures").glob("*.svg")}

    assert names("whole") == {"loss", "knowledge", "reasoning", "gains", "training"}
    assert names("text") == {"loss", "gains", "training"}
    assert names("single") == {"loss", "knowledge", "reasoning", "training"}
    text = (studies["text"] / "report.html").read_text()
    assert "Knowledge against size: no finished run has knowledge scores" in text


def test_headlines_say_what_intervals_cover(tmp_path: Path, studies: dict[str, Path]) -> None:
    one = fake_study.write_study(tmp_path / "one", budgets=(4_000_000,))
    text = " ".join(headlines(read_study(one)))
    assert "+18.3" in text and "how far seeds lie apart from other runs" in text
    assert "ceiling made by the data" in text
    several = " ".join(headlines(read_study(studies["whole"])))
    assert "3 seeds per size" in several and "the seeds of training" not in several


TESTS = re.compile(r"signific|excludes 0|includes 0|tell the two|is larger|is smaller|p = ", re.I)


@pytest.mark.parametrize("kind", ["controlled", "text"])
@pytest.mark.parametrize("members", [("mini", "small", "medium"), ("mini", "small")])
def test_one_seed_is_described_and_never_tested(tmp_path: Path, kind: str, members: tuple[str, ...]) -> None:
    made = fake_study.write_study(tmp_path / "s", members, kind=kind)
    text = " ".join(headlines(read_study(made)))
    assert "One seed per size: a description, not a test" in text and not TESTS.search(text.replace("seed_sd.csv", ""))
    # Of the facts other runs have measured how far seeds lie apart, at 4M tokens; of text nobody has.
    assert ("[" in text) == ("seed_sd.csv" in text) == (kind == "controlled")
    page = re.sub(r"base64,[^\"]*", "", write_report(made).read_text())
    assert "significant" not in page and "excludes 0" not in page and "these runs do not tell" not in page
    difference = page.partition("second minus first</th>" if len(members) == 3 else "over the same seeds</th>")[2]
    assert difference and ("[" in difference.partition("</table>")[0]) == (kind == "controlled")


def test_several_seeds_are_tested_and_the_answer_spans_the_budgets(studies: dict[str, Path]) -> None:
    """The control of the one above: with seeds there are intervals, one a budget."""
    sentences = headlines(read_study(studies["whole"]))
    assert TESTS.search(" ".join(sentences))
    (recall,) = (s for s in sentences if s.startswith("Recall of the whole universe"))
    spread = recall.partition("Second step minus first:")[2]
    assert all(f"] at {budget}" in spread for budget in ("1M", "2M", "4M"))


def test_a_sign_that_changes_with_the_budget_is_said(tmp_path: Path) -> None:
    study = read_study(fake_study.write_study(tmp_path / "s", kind="text"))
    for run in study.runs:
        step = {"mini": 0, "small": 1, "medium": 3 if run.budget_group == "4M" else 1.5}[run.member]
        run.finals["text", "docs", "loss"]["value"] = 3 - 0.1 * step
        run.finals["text", "code", "loss"]["value"] = 3 - {"mini": 0, "small": 1, "medium": 1.2}[run.member]
    code, docs = headlines(study)[:2]
    assert docs.endswith("tokens. Its sign changes with the budget.") and "−0.0" in docs and "+0.1" in docs
    assert code.endswith("tokens. It is negative at each budget.")


def test_the_first_screen_asks_and_answers_and_the_rest_is_below(studies: dict[str, Path]) -> None:
    for name in ("whole", "text", "single", "broken"):
        page = re.sub(r"base64,[^\"]*", "", (studies[name] / "report.html").read_text())
        order = [
            page.index(part) for part in ("Question: ", "<h3>", "<h2>Runs</h2>", "Made by", "What the full run is")
        ]
        assert order == sorted(order)


def test_a_law_that_the_runs_do_not_determine_is_one_sentence(studies: dict[str, Path]) -> None:
    for name in ("whole", "text", "broken"):
        page = (studies[name] / "report.html").read_text()
        assert ("No law is shown of the loss on" in page and "a law takes" in page) or "it takes 6 or more runs" in page
        assert "E, loss of an endless model" not in page and not list((studies[name] / "figures").glob("law-*"))
    cards = json.loads((studies["whole"] / "fit_card.json").read_text())
    assert cards and all(not card["result"]["determined"] and "alpha" not in card["result"] for card in cards.values())


def test_a_law_that_they_determine_has_its_figure_and_table(tmp_path: Path) -> None:
    sizes = ("mini", "mini-small", "small", "small-medium", "medium")
    made = fake_study.write_study(tmp_path / "s", sizes, (500_000, 1_000_000, 2_000_000, 4_000_000), kind="text")
    page = write_report(made).read_text()
    assert "No law is shown" not in page and page.count("E, loss of an endless model") == 2
    assert (made / "figures" / "law-text-docs.svg").is_file()
    assert json.loads((made / "fit_card.json").read_text())["text/docs/loss"]["result"]["determined"]


def test_a_contrast_whose_interval_includes_zero_is_not_called_smaller(studies: dict[str, Path]) -> None:
    (sentence,) = (s for s in headlines(read_study(studies["whole"])) if s.startswith("Exact rows"))
    assert "includes 0: these runs do not tell the two steps apart" in sentence
    assert "larger" not in sentence and "smaller" not in sentence


def test_scores_of_two_scorers_are_not_put_on_one_page(tmp_path: Path) -> None:
    made = fake_study.write_study(tmp_path / "s", budgets=(4_000_000,))

    def scored(member: str, version: int | None) -> None:
        path = made / f"{member}-clean-pico-s0-4M" / "evals.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [r if r["suite"] != "reasoning" or version is None else r | {"scorer": version} for r in rows]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))

    for member in ("mini", "small", "medium"):
        scored(member, 2)
    write_report(made)  # all of one version
    scored("mini", 1)
    before = (made / "report.html").read_bytes()
    with pytest.raises(
        UserError, match=r"mixes scores of reasoning/\w+ by scorers 1 and 2.*evaluate mini-clean"
    ) as caught:
        write_report(made)
    assert "\n" not in str(caught.value) and (made / "report.html").read_bytes() == before
    for member in ("mini", "small"):
        scored(member, 1)
    (made / "medium-clean-pico-s0-4M" / "evals.jsonl").write_text("")
    fake_study.write_run(tmp_path / "t", "medium", 4_000_000, 0)
    rows = (tmp_path / "t" / "medium-clean-pico-s0-4M" / "evals.jsonl").read_text()
    (made / "medium-clean-pico-s0-4M" / "evals.jsonl").write_text(rows)  # rows without a version are of version 1
    write_report(made)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    made = fake_study.write_study(tmp_path / "s", ("mini",), (4_000_000,))
    made.chmod(0o500)
    try:
        with pytest.raises(UserError, match="the report cannot be written to"):
            write_report(made)
    finally:
        made.chmod(0o700)


def test_a_report_that_meets_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = fake_study.write_study(tmp_path / "s", ("mini",), (4_000_000,))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(page_module, "write_csv", full)
    assert main(["report", str(made)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the report cannot be written to") and error.count("\n") == 1


def test_a_folder_that_is_no_study_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = fake_study.write_study(tmp_path / "s", ("mini",), (4_000_000,))
    (tmp_path / "none").mkdir()
    for words, said in (
        (tmp_path / "none", "is no study"),
        (made / "mini-clean-pico-s0-4M", f"give the study {made}"),
        (made / "study.json", "is no folder"),
        (tmp_path / "gone", "does not exist"),
    ):
        assert main(["report", str(words)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list((tmp_path / "none").iterdir())


def test_scores_at_chance_are_not_read_as_gains(tmp_path: Path) -> None:
    folder = fake_study.write_study(tmp_path / "floor", budgets=(4_000_000,))
    warning = "No size is a point above chance in exact rows"
    assert warning not in " ".join(headlines(read_study(folder)))
    study = read_study(folder)
    for run in study.runs:
        run.finals["reasoning", "row", "exact"]["value"] = 0.001
    assert warning in " ".join(headlines(study))


def test_a_study_with_no_runs_still_gives_a_page(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text()
    assert "no run folder was found" in text.lower() and "no study.json" in text


@pytest.mark.parametrize("lost", ["config.json", "plan.json", "metrics.jsonl", "evals.jsonl", "status.json"])
@pytest.mark.parametrize("content", [None, "", "null", "[1, 2]", '{"step": "x", "config": 3, "value": []}'])
def test_any_lost_or_strange_file_leaves_a_page(
    tmp_path: Path, lost: str, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phi3_jax.reporting import figures

    monkeypatch.setattr(figures, "FIGURES", [f for f in figures.FIGURES if lost in _FEEDS[f[0]]])
    run = fake_study.write_study(tmp_path / "s", ("mini",), (4_000_000,)) / "mini-clean-pico-s0-4M"
    (run / lost).unlink()
    if content is not None:
        (run / lost).write_text(content)
    assert "mini-clean-pico-s0-4M" in write_report(tmp_path / "s").read_text()


# The figures that a file could break; drawing the others too would only take time.
_FEEDS = {
    "loss": ("evals.jsonl",), "knowledge": (), "reasoning": (), "gains": ("evals.jsonl",),
    "training": ("metrics.jsonl", "config.json"),
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"design": [1]}, {"design": 3}, {"design": {"config": [1]}}, {"design": {"config": "x"}}, {"runs": 3},
        {"runs": {"a": 1}}, {"runs": [3, None, {"name": 4}]}, {"title": [7]}, {"name": {}}, {"full": 3}, {"command": 5},
        {"title": None, "name": None, "design": None, "runs": None}, {"design": [], "runs": {}, "title": 0},
    ],
)  # fmt: skip
def test_a_study_file_of_other_types_leaves_a_page_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict
) -> None:
    monkeypatch.setattr("phi3_jax.reporting.figures.draw", lambda *_: ([], []))
    monkeypatch.setattr(page_module.sections, "laws", lambda *_: "")
    study = fake_study.write_study(tmp_path / "study", ("mini",), (1_000_000,))
    path = study / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (next(study.glob("*/config.json")).parent / "goodput.jsonl").mkdir()
    assert main(["report", str(study), "--keep", str(tmp_path / "kept")]) == 0
    page = (study / "report.html").read_text()
    kinds = {"design": dict, "title": str, "name": str, "command": str}
    for name, value in change.items():
        if value and name in kinds and not isinstance(value, kinds[name]):
            assert f"unreadable {name}" in page
    assert ("unreadable design.config" in page) == (change.get("design") in ({"config": [1]}, {"config": "x"}))


def test_rows_that_cannot_be_read_are_said_and_blamed_on_nothing_else(tmp_path: Path) -> None:
    study = fake_study.write_study(tmp_path / "study", ("mini", "small"), (1_000_000,))
    path = next(study.glob("*/evals.jsonl"))
    path.unlink()
    path.mkdir()
    found = read_study(study)
    assert any("has evals.jsonl, which cannot be read (Is a directory)" in line for line in found.missing)


def test_two_ladders_are_drawn_apart_and_never_pooled(tmp_path: Path) -> None:
    folder = fake_study.write_study(tmp_path / "two", budgets=(4_000_000,), kind="text")
    for member in ("mini", "small", "medium"):
        fake_study.write_run(folder, member, 4_000_000, 0, "text", ladder="family")
    text = write_report(folder).read_text()
    assert len(read_study(folder).arms) == 2
    assert (folder / "figures" / "gains-1.svg").is_file() and (folder / "figures" / "gains-2.svg").is_file()
    assert "(clean ladder)" in text and "(family ladder)" in text


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    folder = fake_study.write_study(tmp_path / "x", ("mini",), (4_000_000,))
    meta = json.loads((folder / "study.json").read_text()) | {"title": "<script>alert(1)</script>"}
    (folder / "study.json").write_text(json.dumps(meta))
    page = write_report(folder)
    assert "<script" not in page.read_text() and "&lt;script&gt;" in page.read_text()
    _parse(page)


def test_reading_a_study_imports_neither_jax_nor_matplotlib() -> None:
    code = "import sys, phi3_jax.reporting.page; print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
