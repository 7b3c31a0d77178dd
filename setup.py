"Package metadata comes from settings.ini, the single source."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPy(build_py):
    "A wheel carries the notebooks, since they are the source of the library; an editable install has them already."

    def run(self):
        super().run()
        if not self.editable_mode:
            copy_notebooks(Path(self.build_lib) / "deescal" / "nbs")


def copy_notebooks(target):
    shutil.rmtree(target, ignore_errors=True)  # what an earlier build left must not be in this one
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "appendix").glob("*.ipynb")]:
        copy = target / path.relative_to(ROOT / "nbs")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def templates(package):
    "Every file below templates/, hidden ones too, which a pattern of setuptools would pass over."
    files = [p.relative_to(package) for p in (package / "templates").rglob("*") if p.is_file()]
    return [str(p) for p in files if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)]


cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read(ROOT / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="Apache-2.0",
    author=cfg["author"], python_requires=f">={cfg['min_python']},<3.13", cmdclass={"build_py": BuildPy},
    packages=find_packages(include=["deescal", "deescal.*"]),
    package_data={"deescal": ["roles.json", "*.csv", "reviewpage.*s"], "deescal.engine": templates(ROOT / "deescal" / "engine")},
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": [cfg["console_scripts"]]},
)
