#!/bin/sh
# Packs the wheels that a CUDA machine without network lacks, and prints the line that installs them there and runs the
# GPU benchmark:
#
#   tools/gpu/pack.sh [OUT]      OUT: the folder of the wheels, build/gpu-wheels by default
#
# The machine has Python 3.12 on x86-64 and the packages of machine.txt. requirements.txt lists what is packed.
set -eu
cd "$(dirname "$0")/../.."
out=${1:-build/gpu-wheels}
python=${PYTHON:-python3}

mkdir -p "$out"
rm -f "$out"/*.whl # two versions of a package would stop the installation
# pip matches a platform exactly, so each one that a wheel names is listed.
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    --dest "$out" --requirement tools/gpu/requirements.txt
"$python" -m tools.gpu.wheels "$out"
