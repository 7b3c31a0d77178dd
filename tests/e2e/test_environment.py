"Settings, lock, conda environment, Makefile and README are in step; nothing names a machine or an index host."
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="module")
def settings():
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini")
    return cfg["DEFAULT"]


@pytest.fixture(scope="module")
def pins():
    "The lock: each pin with its marker, as a requirement."
    text = (ROOT / "requirements.lock").read_text()
    return [Requirement(l.rstrip("\\")) for l in text.splitlines() if re.match(r"[a-z0-9]", l)]


def environment(python, system, machine):
    return {"python_version": python, "python_full_version": python + ".9", "sys_platform": system,
            "platform_machine": machine, "platform_system": system.capitalize()}


PLACES = [environment(p, *where) for p in ("3.11", "3.12")
          for where in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))]


def test_conda_gives_python_and_programs_and_no_package_of_its_own():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert {"python=3.12", "pip", "make", "git"} <= set(env["dependencies"])
    assert all(isinstance(d, str) for d in env["dependencies"])
    assert f"$(filter {env['name']},$(CONDA_DEFAULT_ENV))" in (ROOT / "Makefile").read_text()


def test_every_line_of_the_lock_is_a_pin_with_hashes_and_none_is_torch(pins):
    text = (ROOT / "requirements.lock").read_text()
    block = r"[a-z0-9][\w.-]*==[\w.!]+( ; [^\n\\]+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    assert re.fullmatch(rf"(#[^\n]*\n)(?:{block})+", text)
    assert not [p.name for p in pins if re.match(r"(torch$|nvidia|cuda)", p.name)]


@pytest.mark.parametrize("place", PLACES, ids=lambda p: "-".join(p.values()))
def test_the_lock_pins_every_requirement_once_wherever_the_project_runs(settings, pins, place):
    there = [p for p in pins if not p.marker or p.marker.evaluate(place)]
    pinned = {canonicalize_name(p.name): str(p.specifier)[2:] for p in there}
    assert len(pinned) == len(there)
    for r in map(Requirement, (settings["requirements"] + " " + settings["dev_requirements"]).split()):
        version = pinned.get(canonicalize_name(r.name)) if r.name != "torch" else settings["torch"]
        assert version and r.specifier.contains(version), f"{r}: {version} is locked; run make lock"


def test_what_is_installed_is_what_is_locked(settings, pins):
    from importlib.metadata import version
    for p in pins:
        if not p.marker or p.marker.evaluate():
            assert version(p.name) == str(p.specifier)[2:], p.name
    import setup_env
    assert setup_env.fits(version("torch"), settings["torch"])


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


FAKE = """#!/bin/sh
# an interpreter that says what it is told, and writes down what pip would do
case "$*" in
  *"import torch"*) echo "$FAKE_TORCH" ;;
  *python_implementation*) echo CPython 3 12 ;;
  *"import pip"*) echo 24.0 ;;
  *) echo "$*" >> "$FAKE_LOG"; echo "WARNING: noise"; exit "$FAKE_EXIT" ;;
esac
"""


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    "Run setup_env.py on a conda environment that is not real; returns what pip was asked for."
    import setup_env
    (tmp_path / "env/conda-meta").mkdir(parents=True)
    (tmp_path / "env/bin").mkdir()
    (tmp_path / "env/bin/python").write_text(FAKE)
    (tmp_path / "env/bin/python").chmod(0o755)
    log = tmp_path / "log"

    def run(torch, *args, pip_exit=0):
        log.write_text("")
        for key, value in {"FAKE_TORCH": torch, "FAKE_LOG": log, "FAKE_EXIT": pip_exit}.items():
            monkeypatch.setenv(key, str(value))
        monkeypatch.setattr(sys, "argv", ["setup_env.py", "--venv", str(tmp_path / "env"), *args])
        setup_env.main()
        return log.read_text().splitlines()
    return run


def test_a_conda_environment_is_used_as_it_is_and_keeps_its_torch(set_up, capsys):
    calls = set_up("2.13.0+cu130 cuda")
    assert len(calls) == 2 and "--require-hashes" in calls[0] and "--editable" in calls[1]
    assert not [c for c in calls if "torch" in c or "venv " in c]
    assert "noise" not in capsys.readouterr().out and set_up("2.13.0+cu130 cuda") == []  # the second time nothing


def test_another_torch_of_a_conda_environment_is_replaced_only_when_asked(set_up):
    with pytest.raises(SystemExit, match="torch 2.12.1 .*\n  remedy: .*TORCH="):
        set_up("2.12.1 cuda")
    assert "torch==2.13.0" in set_up("2.12.1 cuda", "--torch", "cuda")[0]
    assert "--force-reinstall" in set_up("2.13.0+cu130 cuda", "--torch", "cpu")[0]


def test_what_pip_says_is_shown_where_it_fails(set_up):
    with pytest.raises(SystemExit, match="(?s)requirements.lock could not be installed.*noise.*remedy"):
        set_up("2.13.0 cpu", pip_exit=1)


@pytest.mark.parametrize("inside, what", [("bin/ls", "neither"), ("condabin/conda", "base environment")])
def test_a_folder_that_is_no_environment_of_ours_is_not_touched(tmp_path, inside, what):
    import setup_env
    (tmp_path / inside).parent.mkdir()
    (tmp_path / inside).touch()
    if "conda" in inside:
        (tmp_path / "conda-meta").mkdir()
    with pytest.raises(SystemExit, match=f"(?s){what}.*remedy"):
        setup_env.kind_of(tmp_path)
    assert setup_env.kind_of(tmp_path / "new") == "new"


def test_only_the_pinned_torch_fits_in_any_build():
    import setup_env
    assert all(setup_env.fits(v, "2.13.0") for v in ("2.13.0", "2.13.0+cpu", "2.13.0.post300"))
    assert not any(setup_env.fits(v, "2.13.0") for v in ("", "2.13.1", "2.13.0rc1", "2.13.01", "12.13.0"))


def test_no_machine_path_and_no_index_host_is_committed():
    files = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True, text=True).stdout.split("\0")
    hosts = re.compile(r"(?:pypi|pythonhosted|debian|npmjs|pytorch)\.(?:org|com)")
    bad = [f for f in files if f and (ROOT / f).is_file() and (ROOT / f).suffix not in (".png",)
           and f != "tests/e2e/test_environment.py"
           and (hosts.search(text := (ROOT / f).read_text(errors="replace")) or str(ROOT) + "/" in text)]
    assert bad == []
