"""Install torch and the pinned versions of requirements.lock. Standard library only: it runs before anything is there.

usage: python3 setup_env.py [--torch auto|cpu|cuda] [--torch-index URL] [--venv FOLDER]

FOLDER is made where it is not there yet. A virtual environment or a conda environment that is there is used as it is.
"""
import argparse
import configparser
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SUPPORTED = ((3, 11), (3, 12))
VERSION = "import platform, sys; print(platform.python_implementation(), sys.version_info[0], sys.version_info[1])"
TORCH = "import torch; v = torch.version; print(torch.__version__, 'cuda' if v.cuda else 'rocm' if v.hip else 'cpu')"


class PipError(Exception):
    "pip failed; the text is what it said."


def stop(what, remedy):
    raise SystemExit(f"setup: {what}\n  remedy: {remedy}")


def say(text):
    print("setup:", text, flush=True)


def supported(version, implementation):
    return tuple(version[:2]) in SUPPORTED and implementation == "CPython"


def probe(python, code):
    "The words that `code` prints under an interpreter; none where it fails, since a name on PATH may not work."
    out = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=environ())
    return out.stdout.split() if out.returncode == 0 else []


def is_supported(python):
    words = probe(python, VERSION)
    return len(words) == 3 and supported((int(words[1]), int(words[2])), words[0])


def find_python():
    "A supported interpreter: this one, or python3.12 or python3.11 from PATH."
    mine = f"{platform.python_implementation()} {platform.python_version()}"
    if supported(sys.version_info, platform.python_implementation()):
        return sys.executable
    for name in ("python3.12", "python3.11"):
        path = shutil.which(name)
        if path and is_supported(path):
            say(f"{mine} is not supported; using {name} from PATH")
            return path
    stop(f"this is {mine}; CPython 3.11 or 3.12 is needed and neither is on PATH.",
         "install one and run: make PYTHON=<path of python3.11 or python3.12> ...")


def kind_of(folder):
    "What is at `folder`: new, venv or conda. Nothing else is touched: packages of other programs may live there."
    if (folder / "conda-meta").is_dir():
        if (folder / "condabin").is_dir():
            stop(f"{folder} is conda's base environment, and conda itself runs from it.",
                 "conda env create -f environment.yml; conda activate deescal")
        return "conda"
    if (folder / "pyvenv.cfg").is_file():
        return "venv"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "new"
    stop(f"{folder} is there and is neither a virtual environment nor a conda environment.",
         "name another folder: make VENV=<folder> ...")


def make_environment(folder):
    "The interpreter of the environment at `folder`, which is made or repaired where it lacks one or its pip."
    kind, python = kind_of(folder), folder / "bin" / "python"
    if python.exists() and not is_supported(python):
        stop(f"the environment {folder} has a Python that is not CPython 3.11 or 3.12.",
             f"conda install -p {folder} python=3.12" if kind == "conda" else "remove it and run this again")
    if not (python.exists() and probe(python, "import pip; print(pip.__version__)")):
        if kind == "conda":
            stop(f"the conda environment {folder} has no Python with pip.",
                 f"conda install -p {folder} python=3.12 pip")
        say(f"making {folder}")
        subprocess.run([find_python(), "-m", "venv", str(folder)], check=True)
    return python


def environ():
    "For the environment's own packages only: what a user has in the home folder would hide what is missing here."
    return os.environ | {"PYTHONNOUSERSITE": "1"}


def pip(python, *args):
    "Run pip install. What it says is shown only where it fails: its warnings are about this machine's settings."
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *map(str, args)]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ())
    if out.returncode:
        raise PipError(out.stdout.strip())


def pip_or_stop(what, python, *args):
    try:
        pip(python, *args)
    except PipError as e:
        stop(f"{what} could not be installed. pip says:\n{e}",
             "a network (or an index named in pip's settings) and free disk are needed; then run this again")


def fits(have, pin):
    "Whether an installed version is the pinned one, in whatever build: 2.13.0, 2.13.0+cpu, 2.13.0.post1."
    return re.fullmatch(re.escape(pin) + r"(\.post\d+)?(\+.*)?", have) is not None


def keeps_torch(have, build, pin, choice, conda):
    "Whether the torch that is installed stays. A user's own one in a conda environment is never replaced unasked."
    if have and not fits(have, pin) and conda and choice == "auto":
        stop(f"torch {have} ({build} build) is in this conda environment; this project is pinned to torch {pin}.",
             f"install {pin} there in the build that you want, or let this replace it: make TORCH=cpu|cuda ...")
    return fits(have, pin) and choice in ("auto", build)


def install_torch(python, pin, choice, index, conda=False):
    "torch first and pinned, so that no later package pulls another build."
    have, build = probe(python, TORCH) or ("", "")
    if keeps_torch(have, build, pin, choice, conda):
        return say(f"torch {have} ({build} build) is there")
    say(f"installing torch {pin}")
    # pip takes another build of the same version for the same thing
    args = [f"torch=={pin}", *(["--force-reinstall"] if fits(have, pin) else [])]
    try:
        pip(python, *args, *(["--index-url", index] if index else []))
    except PipError as e:
        if not index:
            stop(f"torch {pin} could not be installed. pip says:\n{e}", "TORCH_INDEX=<URL> names another index")
        say(f"torch {pin} could not be had from TORCH_INDEX; taking the default index instead. pip said:\n{e}")
        pip_or_stop(f"torch {pin}", python, *args)
    tell_build(python, choice)


def tell_build(python, choice):
    "Say which build came, and when it is not the one asked for."
    wanted = choice if choice != "auto" else "cuda" if shutil.which("nvidia-smi") else "cpu"
    how = "asked for" if choice != "auto" else "right for this machine"
    full, got = probe(python, TORCH) or stop("torch was installed and cannot be imported.",
                                             f"see what this says: {python} -c 'import torch'")
    if got == wanted:
        return say(f"torch {full} ({got} build, as {how})")
    say(f"torch {full}: the {wanted} build {how} could not be had here, so this is the default one ({got}). "
        f"Everything runs; TORCH_INDEX=<URL of an index with {wanted} builds> gets the other.")


def fingerprint(args):
    "What an environment was set up from. The project's folder is part of it: two checkouts may share an environment."
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("requirements.lock", "settings.ini", "setup.py")]
    return hashlib.sha256(repr((texts, args.torch, args.torch_index, str(ROOT))).encode()).hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--torch-index", default="")
    parser.add_argument("--venv", default=".venv")
    args = parser.parse_args()
    if not args.venv:
        stop("VENV is empty.", "for conda: conda activate deescal, then make VENV=$CONDA_PREFIX ...")
    folder = ROOT / args.venv
    stamp, want = folder / ".deescal", fingerprint(args)
    if stamp.is_file() and stamp.read_text() == want and (folder / "bin" / "python").exists():
        return
    python = make_environment(folder)
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    install_torch(python, cfg["DEFAULT"]["torch"], args.torch, args.torch_index, kind_of(folder) == "conda")
    say("installing the packages of requirements.lock (two to three minutes where none is there yet)")
    # the lock is complete, so no dependency is looked up: nothing without a hash, and no other torch, can come in
    pip_or_stop("requirements.lock", python, "--no-deps", "--require-hashes", "-r", ROOT / "requirements.lock")
    pip_or_stop("this project", python, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    stamp.write_text(want)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
