"""Properties of the page: it stands alone, says what was trained, and never fails on half a study."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import fake_study
import pytest

from phi3_jax.reporting.page import headlines, write_report
from phi3_jax.reporting.table import read_study

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

    laws = {"law-knowledge-corpus", "law-reasoning-all"}
    assert names("whole") == {"loss", "knowledge", "reasoning", "gains", "training"} | laws
    assert names("text") == {"loss", "gains", "training"}
    assert names("single") == {"loss", "knowledge", "reasoning", "training"}
    text = (studies["text"] / "report.html").read_text()
    assert "Knowledge against size: no finished run has knowledge scores" in text


def test_headlines_say_what_intervals_cover(tmp_path: Path, studies: dict[str, Path]) -> None:
    one = fake_study.write_study(tmp_path / "one", budgets=(4_000_000,))
    text = " ".join(headlines(read_study(one)))
    assert "+18.3 [17.7, 18.9]" in text and "not the seeds of training" in text
    assert "ceiling made by the data" in text
    several = " ".join(headlines(read_study(studies["whole"])))
    assert "3 seeds a size" in several and "not the seeds" not in several


def test_a_contrast_whose_interval_includes_zero_is_not_called_smaller(studies: dict[str, Path]) -> None:
    (sentence,) = (s for s in headlines(read_study(studies["whole"])) if "exact rows" in s)
    assert "includes 0: these runs do not tell the two steps apart" in sentence
    assert "is larger" not in sentence and "is smaller" not in sentence


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
