"""Create .venv and install the pinned versions of requirements.lock. Standard library only: it runs before anything is there.

usage: python3 setup_env.py [--torch auto|cpu|cuda] [--torch-index URL] [--venv FOLDER]
"""
import argparse
import configparser
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SUPPORTED = ((3, 11), (3, 12))


def supported(version, implementation):
    return tuple(version[:2]) in SUPPORTED and implementation == "CPython"


def find_python():
    "A supported interpreter: this one, or python3.12 or python3.11 from PATH (tried, since a name on PATH may not work)."
    if supported(sys.version_info, platform.python_implementation()):
        return sys.executable
    probe = "import platform, sys; print(platform.python_implementation(), sys.version_info[0], sys.version_info[1])"
    for name in ("python3.12", "python3.11"):
        path = shutil.which(name)
        out = subprocess.run([path, "-c", probe], capture_output=True, text=True).stdout.split() if path else []
        if len(out) == 3 and supported((int(out[1]), int(out[2])), out[0]):
            print(f"setup: {platform.python_implementation()} {platform.python_version()} is not supported; using {name} from PATH")
            return path
    raise SystemExit(f"setup: this is {platform.python_implementation()} {platform.python_version()}; CPython 3.11 or 3.12 is needed and neither "
                     "is on PATH.\n  remedy: install one and run: make PYTHON=<path of python3.11 or python3.12> ...")


def run(*command):
    print("setup:", " ".join(str(c) for c in command[1:] if c), flush=True)
    subprocess.run([str(c) for c in command], check=True)


def pip(python, *args):
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *args)


def install_torch(python, version, choice, index):
    "torch first and pinned, so that no later package pulls another build. Says which build came when it is not the one asked for."
    wanted = ("cuda" if shutil.which("nvidia-smi") else "cpu") if choice == "auto" else choice
    args = ["--index-url", index] if index else []
    try:
        pip(python, f"torch=={version}", *args)
    except subprocess.CalledProcessError:
        if not index:
            raise SystemExit(f"setup: torch {version} could not be installed.\n  remedy: see pip's message above; TORCH_INDEX=<URL> names another index") from None
        print(f"setup: torch {version} could not be had from TORCH_INDEX; taking the default index instead")
        pip(python, f"torch=={version}")
    probe = "import torch; print('cuda' if torch.version.cuda else 'cpu', torch.__version__)"
    got, full = subprocess.run([str(python), "-c", probe], check=True, capture_output=True, text=True).stdout.split()
    how = "asked for" if choice != "auto" else "right for this machine"
    if got == wanted:
        print(f"setup: torch {full} ({got} build, as {how})")
    else:
        print(f"setup: torch {full}: the {wanted} build {how} could not be had here, so this is the default one ({got}). "
              f"Everything runs; TORCH_INDEX=<URL of an index with {wanted} builds> gets the other.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--torch-index", default="")
    parser.add_argument("--venv", default=".venv")
    args = parser.parse_args()
    venv = ROOT / args.venv
    python = venv / "bin" / "python"
    lock = (ROOT / "requirements.lock").read_text()
    stamp = venv / ".deescal"
    want = hashlib.sha256(repr((lock, (ROOT / "settings.ini").read_text(), args.torch, args.torch_index)).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == want and python.exists():
        return
    base = find_python()
    if not python.exists():
        run(base, "-m", "venv", venv)
    cfg = configparser.ConfigParser(delimiters=["="], interpolation=None)
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    install_torch(python, cfg["DEFAULT"]["torch"], args.torch, args.torch_index)
    pip(python, "-r", ROOT / "requirements.lock")
    pip(python, "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    stamp.write_text(want)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
