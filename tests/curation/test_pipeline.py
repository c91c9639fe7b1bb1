"""The whole way on the shipped sample: from pages to a corpus that a study reads, with the same bytes always."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phi3_jax import experiment, verbs
from phi3_jax.commands import call
from phi3_jax.curation import config as configs
from phi3_jax.curation import pipeline
from phi3_jax.curation.engine import Engine
from phi3_jax.data import sources
from phi3_jax.data.corpora import files
from phi3_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "examples" / "pages"
pytest.importorskip("daft")


def curate(*words: str) -> int:
    return call(verbs.CURATE, list(words))


def words(
    out: Path, *more: str, inputs: Sequence[Path] = (PAGES,), config: str = "experiments/curation.py"
) -> list[str]:
    given = [word for path in inputs for word in ("--input", str(path))]
    return ["--config", config, *given, "--output", str(out), "--workers", "2", *more]


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated") / "sample"
    assert curate(*words(out)) == 0
    return out


def rejected(out: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return [row for path in sorted(out.glob("rejected/*/*.parquet")) for row in parquet.read_table(path).to_pylist()]


def content(out: Path) -> dict[str, bytes]:
    """What a result is made of."""
    names = ["manifest.json", "report.html", *(str(p.relative_to(out)) for p in sorted(out.glob("*/**/*.parquet")))]
    return {name: (out / name).read_bytes() for name in names if not name.startswith("stages")}


def test_what_was_planted_is_found(curated: Path) -> None:
    kept = Counter((row["planted"] or "").partition(":")[0] for row in pipeline.documents_of(curated))
    planted = Counter(
        (json.loads(line).get("planted") or "").partition(":")[0]
        for path in PAGES.glob("*.jsonl")
        for line in path.read_text().splitlines()
    )
    assert kept["junk"] <= 0.05 * planted["junk"] and planted["junk"] > 30
    assert kept["language"] == 0 < planted["language"]
    assert kept["kept"] == planted["kept"] > 5, "what is like another text only in part stays"
    assert kept["reasoning"] == planted["reasoning"] > 20
    assert kept[""] + kept["exact"] + kept["near"] >= 0.97 * planted[""], "of two copies, the longer one stays"


def test_copies_name_what_stays_and_that_stays(curated: Path) -> None:
    kept = {row["id"] for row in pipeline.documents_of(curated)}
    copies = [row for row in rejected(curated) if row["reason"] in ("exact_duplicate", "near_duplicate", "contained")]
    assert len({row["reason"] for row in copies}) == 3
    assert all(row["stays"] in kept and row["id"] not in kept for row in copies)
    assert all(row["similarity"] >= 0.8 for row in copies)


def test_the_parts_are_sorted_and_every_field_survives(curated: Path) -> None:
    rows = list(pipeline.documents_of(curated))
    ids = [row["id"] for row in rows]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)
    assert {"planted", "source", "genre", "licence"} <= rows[0].keys()
    manifest = json.loads((curated / "manifest.json").read_text())
    assert sum(part["rows"] for part in manifest["parts"]) == len(rows) == manifest["counts"]["kept"]
    dropped = sum(step["documents"] for step in manifest["steps"])
    assert manifest["counts"]["read"] == len(rows) + dropped == len(rows) + len(rejected(curated))


def test_personal_data_are_gone(curated: Path) -> None:
    texts = " ".join(row["text"] for row in pipeline.documents_of(curated))
    assert "clerk" in (PAGES / "made.jsonl").read_text() and "clerk0@" not in texts and "93.184.216" not in texts


def test_the_page_says_what_happened(curated: Path) -> None:
    page = (curated / "report.html").read_text()
    for part in ("Step by step", "gopher_quality", "drops alone", "Nearest to a limit, kept", "Least alike", "<del>"):
        assert part in page
    assert "http" not in page.replace("http-equiv", "")


def test_any_number_of_workers_and_files_gives_the_same_bytes(curated: Path, tmp_path: Path) -> None:
    one = tmp_path / "sample"
    assert curate(*words(one, "--workers", "1")[:-4], "--workers", "1") == 0
    assert content(one) == content(curated)
    lines = [line for path in sorted(PAGES.glob("*.jsonl")) for line in path.read_text().splitlines()]
    shards = tmp_path / "shards"
    shards.mkdir()
    for i in range(3):
        (shards / f"shard-{i}.jsonl").write_text("\n".join(lines[i::3]) + "\n")
    assert curate(*words(tmp_path / "sharded", inputs=[shards])) == 0
    same = {name: found for name, found in content(tmp_path / "sharded").items() if name.startswith("parts/")}
    assert same == {name: found for name, found in content(curated).items() if name.startswith("parts/")}


def test_a_study_reads_the_parts_of_the_manifest_and_nothing_else(curated: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(curated, out)
    for poisoned in ("rejected/poison.jsonl", "poison.jsonl", "parts/poison.jsonl"):
        (out / poisoned).write_text('{"text": "POISON"}\n')
    found = list(sources.texts(str(out)).documents)
    assert sorted(found) == sorted(row["text"] for row in pipeline.documents_of(out))
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished; type its command again"):
        files.account(out)


def test_another_config_is_refused_with_what_differs(curated: Path) -> None:
    before = content(curated)
    differs = r"order: .* -> exact,near; near.jaccard: 0.8 -> 0.7.*choose another --output"
    with pytest.raises(UserError, match=differs) as error:
        curate(*words(curated, "--config.rules.near.jaccard=0.7", "--config.order=exact,near"))
    assert "\n" not in str(error.value) and content(curated) == before
    assert curate(*words(curated)) == 0 and content(curated) == before


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--config.rules.near.jacard=0.7"], "unknown field config.rules.near.jacard; did you mean 'jaccard'"),
        (["--config.order=exact,naer"], "unknown rule 'naer'; did you mean 'near'"),
        (["--config.rules.near.jaccard=7"], "config.rules.near.jaccard=7.0 must be a number, 0 to 1"),
        (["--config.rules.gopher_quality.min_words=1000000"], "no document is left (gopher_quality.gopher_short_doc"),
        (["--config.text_field=body"], "has no field 'body'; its fields are"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, more: list[str], line: str) -> None:
    (tmp_path / "few.jsonl").write_text("".join((PAGES / "fiction.jsonl").read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(UserError) as error:
        curate(*words(tmp_path / "out", *more, inputs=[tmp_path / "few.jsonl"]))
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_rows_are_counted_and_too_many_abort(tmp_path: Path) -> None:
    good = (PAGES / "fiction.jsonl").read_text().splitlines()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join([*good, *good, "{broken", ""]) + "\n")
    assert curate(*words(tmp_path / "out", inputs=[tmp_path / "in"])) == 0
    read = json.loads((tmp_path / "out" / "manifest.json").read_text())["read"]
    assert read["malformed"] == 1 and read["positions"] == [f"{tmp_path}/in/a.jsonl:{2 * len(good) + 1}"]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join([*good, "{broken", "[]", ""]) + "\n")
    with pytest.raises(UserError, match=r"of 72 .*a.jsonl:71.*the limit is 1%: mend or remove them"):
        curate(*words(tmp_path / "other", inputs=[tmp_path / "in"]))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    import gzip

    packed = gzip.compress((PAGES / "fiction.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"a.jsonl.gz'"):
        curate(*words(tmp_path / "out", inputs=[tmp_path / "a.jsonl.gz"]))


def test_a_rule_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(text, row):\n    return len(text) < 1200 and row['genre'] == 'code'\n")
    rule = f"experiments/curation.py:rule={tmp_path / 'mine.py'}:short"
    assert curate(*words(tmp_path / "out", config=rule)) == 0
    kept = list(pipeline.documents_of(tmp_path / "out"))
    assert kept and all(len(row["text"]) < 1200 and row["genre"] == "code" for row in kept)
    (tmp_path / "mine.py").write_text("def short(text, row):\n    return True\n")
    with pytest.raises(UserError, match=r"own.content: "):
        curate(*words(tmp_path / "out", config=rule))


def test_other_limits_change_no_measurement() -> None:
    config = experiment.made("experiments/curation.py:fineweb")
    step = next(step for step in configs.steps_of(config) if step.name == "gopher_quality")
    assert step.parameters["words"] == "spacy" and "min_words" in step.parameters


def test_an_engine_reports_the_first_mistake_of_a_worker(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tasks = [{"number": 0, "out": str(tmp_path / "file" / "out.parquet"), "folders": []}]
    with pytest.raises(UserError, match="file/.*out.parquet.*: Not a directory"):
        list(Engine("native", 1).map("phi3_jax.curation.reading:gather", tasks))
