#!/bin/sh
# Gathers what run.sh installs, on a machine with a network: sh tests/device/wheels.sh FOLDER [PYTHON]. The project's own wheel is
# built for that Python (3.12 by default). torch and what comes with it are left out: a machine with a GPU has its own.
set -eu
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { echo "give the folder: sh tests/device/wheels.sh FOLDER [PYTHON]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd) python=${2:-python3.12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
pip="$work/venv/bin/python -m pip --quiet --disable-pip-version-check"
$pip install scikit-build-core "pybind11>=2.13" "cmake>=3.25" ninja "grpcio-tools>=1.80"
$pip wheel --no-deps --no-build-isolation --wheel-dir "$folder" .
# Resolved beside a CPU build of torch, so that the dependencies' own wish for torch is met and not downloaded.
$pip install "torch==2.13.0"
$pip install "$(ls "$folder"/kt_expert-*.whl)[server,transformers]" pytest pytest-timeout trustme
$pip freeze | grep -v -i -E '^(torch|triton|nvidia|cuda|numpy|sympy|mpmath|networkx|jinja2|markupsafe|kt-expert|kt_expert|pybind11|cmake|ninja|scikit|grpcio-tools|setuptools)' \
    > "$work/wanted"
$pip download --no-deps --only-binary :all: --dest "$folder" --requirement "$work/wanted"
du -sh "$folder"
