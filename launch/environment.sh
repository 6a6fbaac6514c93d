# Sourced by the scripts beside it: `environment [extra]` makes .venv in the project's root, installs
# the project there with what training, reports and the embedded data need, in the pinned versions,
# and changes into the root. Nothing outside is touched. Of scripts that `simvq-moe init launch` has
# copied out, the root is the folder that holds launch/, and nothing is installed.
# `supervised deepspeed ARGS` passes signals on to the ranks here, which save and stop (exit code 130):
# the launcher alone would end and leave them running. `free_port` prints a port for ranks to meet at.

environment() {
    local extra="${1:-}" python="${PYTHON:-python3}" stamp wanted
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
    if ! grep -qs '^name = "simvq-moe"' pyproject.toml; then # no clone
        PATH="$PWD/.venv/bin:$PATH"
        if ! command -v simvq-moe > /dev/null; then
            echo "simvq-moe is not in the PATH: activate the environment that it is installed in" >&2
            exit 2
        fi
        return
    fi
    if ! "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))'; then
        echo "$python must be Python 3.10 or newer with venv: set PYTHON to one that is" >&2
        exit 2
    fi
    stamp=".venv/installed${extra:+-$extra}"
    wanted="$(cat pyproject.toml constraints.txt | cksum)"
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
        echo "environment: .venv is up to date" >&2
    else
        echo "environment: installing into .venv (about 2 GB, 2 minutes and the download)" >&2
        "$python" -m venv .venv
        .venv/bin/pip install --quiet --disable-pip-version-check \
            --constraint constraints.txt --editable ".[train,report,image,demo${extra:+,$extra}]"
        echo "$wanted" > "$stamp"
    fi
    PATH="$PWD/.venv/bin:$PATH"
}

free_port() { # of this machine, at this moment
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

port_is_free() {
    python -c 'import socket, sys; socket.socket().bind(("", int(sys.argv[1])))' "$1" 2> /dev/null
}

supervised() {
    local launcher code=0
    setsid "$@" & # where Ctrl-C does not reach it, only this script
    launcher=$!
    # the ranks are its grandchildren
    trap 'pkill -TERM -P "$(pgrep -P "$launcher")"' INT TERM HUP
    wait "$launcher" || true # a signal ends it as well
    while kill -0 "$launcher" 2> /dev/null; do
        wait "$launcher" || true
    done
    wait "$launcher" || code=$?
    if [[ "$code" == 130 ]]; then # what the ranks said of it, the launcher has buried
        echo "stopped and saved: the same command goes on" >&2
    fi
    return "$code"
}
