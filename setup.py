"""What setup.cfg cannot say: a wheel carries experiments and published tables, which `phi3_jax/shipped.py` finds there."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
FOLDERS = {
    "experiments": ("*.py",),
    "analysis/published": ("*.csv", "*.md"),
    "analysis/results": ("*.csv", "*.json", "*.md"),
}


class BuildWithFiles(build_py):
    """`build_py`, and the files below `phi3_jax/shipped/`; not where the clone itself is installed (pip install -e)."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, patterns in FOLDERS.items():
            for path in sorted(p for pattern in patterns for p in (HERE / folder).rglob(pattern)):
                target = Path(self.build_lib) / "phi3_jax" / "shipped" / path.relative_to(HERE)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithFiles})
