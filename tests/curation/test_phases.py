"""Two phases of a curated corpus: roles, rates, epochs, and phase 2's web text within that of phase 1."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from phi3_jax.curation import phases, pipeline
from phi3_jax.curation.command import summary
from phi3_jax.curation.config import base, with_steps
from phi3_jax.curation.engine import Engine
from phi3_jax.data import sources
from phi3_jax.data.quality import quality
from phi3_jax.errors import UserError

pytest.importorskip("daft")
PAGES = Path(__file__).resolve().parents[2] / "examples" / "pages"
ROLES = ("web=*:0.9:0.5", "textbook=code+nonfiction:0.1:0.2", "reasoning=reasoning:0:0.3")


def curate(folder: Path, **changes: Any) -> dict[str, Any]:
    config = with_steps(base(**{"phase1": 4_000_000, "phase2": 1_000_000, "roles": ROLES} | changes), "exact")
    return pipeline.curate(config.to_dict(), [str(PAGES)], folder, Engine("native", 1))


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phases") / "mine"
    curate(out)
    return out


def recipe(spec: str) -> Any:
    return sources.recipe(spec)


def test_every_document_has_its_role_and_phase_2_lies_within_phase_1(curated: Path) -> None:
    rows = list(pipeline.documents_of(curated))
    for row in rows:
        role = {"code": "textbook", "nonfiction": "textbook", "reasoning": "reasoning"}.get(row["genre"], "web")
        good = quality(row["text"]) >= 0.6
        assert row["role"] == role
        assert row["phases"] == ("2" if role == "reasoning" else "12" if good else "1")
    web = [row for row in rows if row["role"] == "web"]
    first, second = ({row["id"] for row in web if phase in row["phases"]} for phase in "12")
    assert second < first and len(second) > 20


def test_epochs_are_tokens_wanted_by_tokens_there(curated: Path) -> None:
    manifest = json.loads((curated / "manifest.json").read_text())
    rows = list(pipeline.documents_of(curated))
    for phase, of in manifest["phases"].items():
        assert sum(role["rate"] for role in of["roles"].values()) == pytest.approx(1)
        for name, role in of["roles"].items():
            here = [row["text"] for row in rows if row["role"] == name and phase in row["phases"]]
            size = sum(len(text.encode()) for text in here)
            assert (role["documents"], role["tokens"]) == (len(here), size)
            assert role["epochs"] == pytest.approx(role["rate"] * of["tokens"] / size)
    assert "reasoning" not in manifest["phases"]["1"]["roles"]
    assert "epochs" in summary(manifest) and "<h2>Phases</h2>" in (curated / "report.html").read_text()
    assert any("phase 2 reads role reasoning" in line for line in phases.warnings(manifest))
    assert not any("phase 2 has all" in line for line in phases.warnings(manifest))


def test_a_phase_2_that_leaves_nothing_out_is_warned_of(tmp_path: Path) -> None:
    manifest = curate(tmp_path / "all", quality=0.0)
    assert sum("phase 2 has all documents" in line for line in phases.warnings(manifest)) == 2


def test_a_phase_is_a_mixture_of_roles_at_their_rates(curated: Path) -> None:
    pytest.importorskip("seqio")
    rows = list(pipeline.documents_of(curated))
    for phase, rates in (("1", {"web": 0.9, "textbook": 0.1}), ("2", {"web": 0.5, "textbook": 0.2, "reasoning": 0.3})):
        made = recipe(f"curated:{phase}:{curated}")
        assert {part.name: part.weight for part in made.sources} == pytest.approx(rates)
        for part in made.sources:
            tokens = sum(int((w.segments > 0).sum()) for w in part.windows)
            texts = [row["text"] for row in rows if row["role"] == part.name and phase in row["phases"]]
            there = sum(len(text.encode()) + 1 for text in texts)
            assert 0.85 * there < tokens <= there, "all but what is held out"


def test_what_is_not_there_is_one_line(curated: Path, tmp_path: Path) -> None:
    plain = with_steps(base(), "exact")
    pipeline.curate(plain.to_dict(), [str(PAGES / "code.jsonl")], tmp_path / "plain", Engine("native", 1))
    for spec, line in (
        (f"curated:3:{curated}", "has no phase '3'; its phases are 1, 2"),
        (f"curated:1:{tmp_path / 'plain'}", "it was curated without --config.phase1"),
        (f"curated:1:{tmp_path}", "is not curated:PHASE:FOLDER"),
    ):
        with pytest.raises(UserError, match=line):
            recipe(spec)
    for roles, line in (
        (("web=*:0.9:0.5",), "the rates of phase 1 sum to 0.9"),
        (("web=*:1:1", "web=code:0:0"), "is named twice"),
        (("web=*:0.5:1", "poems=verse:0.5:0"), "role poems has no document for phase 1"),
    ):
        with pytest.raises(UserError, match=line):
            curate(tmp_path / line.replace(" ", "_"), roles=roles)
    with pytest.raises(UserError, match="is not NAME=SOURCE"):
        curate(tmp_path / "form", roles=("web",))


def test_a_document_of_phase_2_alone_is_refused(curated: Path, tmp_path: Path) -> None:
    from phi3_jax.data.corpora import files
    from phi3_jax.data.sources.curated import texts

    account = files.account(curated)
    assert (
        len(list(texts(curated, account, "web", "2", True)))
        == Counter(row["role"] for row in pipeline.documents_of(curated) if "2" in row["phases"])["web"]
    )
    with pytest.raises(UserError, match="is in phase 2 and not in phase 1"):
        list(texts(curated, account, "reasoning", "2", True))
