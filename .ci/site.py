"""What mkdocs.yml cannot say: the site has the paths of the repository, and a page of reference per room of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")  # to a file of the repository
FLOOR = re.compile(r"^\| \d+ \| (`.+?`) \| (.+?) \|$", re.MULTILINE)  # CONTRIBUTING's table of rooms


def rooms() -> dict[str, list[str]]:
    """{room: its modules} of the package, in the order of their floors."""
    found = {}
    for names, _ in FLOOR.findall((ROOT / "CONTRIBUTING.md").read_text()):
        for room in re.findall(r"`(\w+)`", names):
            place = ROOT / "phi3_jax" / room
            files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
            parts = [file.relative_to(ROOT).with_suffix("").parts for file in files if "templates" not in file.parts]
            found[room] = [".".join(part for part in path if part != "__init__") for path in parts]
    return found


def on_config(config: Any) -> Any:
    """Adds the reference to the navigation."""
    config.nav.append({"Reference": [{room: f"reference/{room}.md"} for room in sorted(rooms())]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages, what they link to, and the reference."""
    paths: set[Path] = set()
    new = {ROOT / page for page in PAGES}
    while new:
        paths |= new
        links = [(p.parent / link).resolve() for p in new if p.suffix == ".md" for link in LINK.findall(p.read_text())]
        new = {path for path in links if path.is_file()} - paths
    names = sorted(str(path.relative_to(ROOT)) for path in paths)
    made = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names]
    for room, modules in rooms().items():
        content = f"# {room}\n\n" + "\n".join(f"::: {module}\n" for module in modules)
        made.append(File.generated(config, f"reference/{room}.md", content=content))
    theme = [file for file in files if not file.src_uri.endswith(".md")]
    return Files([*made, *theme])
