#!/usr/bin/env bash
# Make .venv from the complete lock: requirements/gpu.lock where an NVIDIA GPU answers, else requirements/cpu.lock.
# Asks nothing, is safe to run again, and installs nothing that is there already. `make` calls it when it is needed.
#   SPA_DEVICE=cpu|gpu   overrules the choice of the lock
#                        (gpu: an NVIDIA driver of 580 or newer; no CUDA toolkit is needed)
#   SPA_PYTHON=PATH      overrules the choice of the interpreter (3.11 to 3.13)
set -euo pipefail
cd "$(dirname "$0")/.."

UV_VERSION=0.13.8
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { echo "set-up: $*"; }
die() { echo "set-up: $*" >&2; exit 2; }

# torch compiles kernels against the interpreter's C headers, so one that has them comes first.
serves='import ensurepip, os, sys, sysconfig, venv
headers = os.path.exists(sysconfig.get_path("include") + "/Python.h") or sys.argv[1] == "any"
print(sys.executable) if (3, 11) <= sys.version_info < (3, 14) and headers else sys.exit(1)'

find_python() {
    local name headers
    for headers in present $([ "${device:-}" = gpu ] || echo any); do
        for name in ${SPA_PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
            "$name" -c "$serves" "$headers" 2>/dev/null && return
        done
    done
    return 1
}

make_venv() {
    if python=$(find_python); then
        say "$("$python" --version) ($python)"
        "$python" -m venv .venv
    elif [ -z "${SPA_PYTHON:-}" ] && python3 -c 'import ensurepip, venv' 2>/dev/null; then
        say "no Python 3.11 to 3.13 with venv and its C headers here; uv fetches one"
        python3 -m venv .cache/uv
        .cache/uv/bin/pip install --quiet "uv==$UV_VERSION"
        .cache/uv/bin/uv venv --quiet --seed --managed-python --python 3.11 .venv
    else
        die "needs Python 3.11, 3.12 or 3.13 with venv (Debian, Ubuntu: apt install python3-venv python3-dev)"
    fi
}

choose_device() {
    if [ -n "${SPA_DEVICE:-}" ]; then
        echo "$SPA_DEVICE"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        echo gpu
    else
        echo cpu
    fi
}

check_driver() {
    local cuda
    cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Z ]*Version: *\([0-9]*\)\..*/\1/p' | head -1)
    [ -z "$cuda" ] || [ "$cuda" -ge 13 ] ||
        die "this NVIDIA driver serves CUDA $cuda, the GPU lock needs 13: update the driver (580 or newer), or set SPA_DEVICE=cpu"
}

configure_uv() { # as this host's pip is configured, which uv does not read: a mirror, certificates of its own
    local settings variable key value
    settings=$(.venv/bin/pip config list)
    for variable in UV_DEFAULT_INDEX:index-url SSL_CERT_FILE:cert; do
        key=${variable#*:} variable=${variable%:*}
        value=$(sed -n "s/^[^=]*\.$key='\(.*\)'\$/\1/p" <<<"$settings" | head -1)
        if [ -n "$value" ] && [ -z "${!variable:-}" ]; then
            export "$variable=$value"
        fi
    done
}

install_cpu_torch() { # VERSION
    # PyTorch's CPU build is in no default index. First as pip is configured on this host (a mirror, a folder of
    # wheels), then from PyTorch's own index, which uv knows by name.
    .venv/bin/pip install --quiet --no-deps "torch==$1+cpu" 2>/dev/null ||
        .venv/bin/uv pip install --quiet --no-deps --torch-backend cpu "torch==$1"
}

install_lock() { # LOCK
    local uv=.venv/bin/uv rest deepspeed
    deepspeed=$(grep '^deepspeed==' "$1")
    rest=$(grep -Ev '^(#|deepspeed==)' "$1")
    if [ "$device" = cpu ]; then
        install_cpu_torch "$(sed -n 's/^torch==//p' "$1")"
        rest=$(grep -v '^torch==' <<<"$rest")
    fi
    # Compiled once here: where Python may not write byte code, every engine and worker would compile all it imports.
    "$uv" pip install --quiet --no-deps --compile-bytecode -r /dev/stdin <<<"$rest"
    # Its set-up looks for torch, and where torch sees a GPU for nvcc too, which only its own kernels need: none is built.
    DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 \
        "$uv" pip install --quiet --no-deps --compile-bytecode --no-build-isolation "$deepspeed"
    "$uv" pip install --quiet --no-deps --no-build-isolation --editable .
}

command -v "${CXX:-g++}" >/dev/null || die "needs a C++ compiler (Debian, Ubuntu: apt install g++), or name yours in CXX"
[ "$(uname -sm)" = "Linux x86_64" ] || die "the locks are for Linux on x86-64, this is $(uname -sm)"
device=$(choose_device)
case $device in cpu) ;; gpu) check_driver ;; *) die "SPA_DEVICE is '$device'; it may be cpu or gpu" ;; esac
lock=requirements/$device.lock

[ -x .venv/bin/python ] || make_venv
[ "$device" = cpu ] || .venv/bin/python -c "$serves" present >/dev/null ||
    die "no Python.h for $(.venv/bin/python --version), and Triton compiles against it: apt install python3-dev, then make clean-venv"
export VIRTUAL_ENV=$PWD/.venv
.venv/bin/pip install --quiet "uv==$UV_VERSION"
configure_uv
say "$(grep -c == "$lock") packages from $lock (the first time takes some minutes)"
install_lock "$lock"
touch .venv/.ready
say "done in ${SECONDS}s"
