"Settings, lock, conda environment, Makefile and README are in step; nothing names a machine or an index host."
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def settings():
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini")
    return cfg["DEFAULT"]


def name(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_the_conda_environment_has_the_requirements_of_settings_ini(settings):
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert pip == settings["requirements"].split() + settings["dev_requirements"].split()
    assert "python=3.12" in env["dependencies"]


def test_the_lock_pins_every_requirement_and_names_no_build_path_or_host(settings):
    lines = [l for l in (ROOT / "requirements.lock").read_text().splitlines() if not l.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", l) for l in lines)
    pinned = {name(l): l.split("==")[1] for l in lines}
    assert {name(r) for r in (settings["requirements"] + " " + settings["dev_requirements"]).split()} <= set(pinned)
    assert pinned["torch"] == settings["torch"]


def test_what_is_installed_is_what_is_locked():
    from importlib.metadata import version
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith("#"):
            package, pin = line.split("==")
            assert version(package).split("+")[0] == pin, package


def test_every_make_target_that_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?<![a-z])make ([a-z][a-z-]*)", (ROOT / "README.md").read_text())) <= targets
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_other_pythons_are_named():
    import setup_env
    assert setup_env.supported((3, 11, 4), "CPython") and setup_env.supported((3, 12, 1), "CPython")
    assert not setup_env.supported((3, 13, 0), "CPython") and not setup_env.supported((3, 11, 0), "PyPy")


def test_an_unsupported_python_without_another_is_an_error_that_names_it(monkeypatch, capsys):
    import setup_env
    monkeypatch.setattr(setup_env, "SUPPORTED", ((2, 7),))
    with pytest.raises(SystemExit) as e:
        setup_env.find_python()
    assert "3.11 or 3.12 is needed" in str(e.value) and "remedy" in str(e.value) and "make PYTHON=" in str(e.value)


def test_no_machine_path_and_no_index_host_is_committed():
    files = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True, text=True).stdout.split("\0")
    hosts = re.compile(r"(?:pypi|pythonhosted|debian|npmjs|pytorch)\.(?:org|com)")
    bad = [f for f in files if f and (ROOT / f).is_file() and (ROOT / f).suffix not in (".png",)
           and f != "tests/e2e/test_environment.py"
           and (hosts.search(text := (ROOT / f).read_text(errors="replace")) or str(ROOT) + "/" in text)]
    assert bad == []
