#!/usr/bin/env bash
# ray.init() of a new local cluster writes a password into the home folder, readable by everybody
#
# Versions   ray 2.60.0, Python 3.11.
# Guess      `ray.init(address="local")` starts a cluster that ends with the program, and leaves nothing behind but logs in its
#            temporary folder.
# Seen       It turns on token authentication and writes the token of all this user's local clusters to ~/.ray/auth_token, under
#            the usual umask with mode 644: every user of the machine can read what lets him run code as this one. Where the home
#            cannot be written (containers, some compute nodes), it ends with an OSError. With RAY_AUTH_TOKEN set it writes
#            nothing; with RAY_AUTH_MODE=disabled there is no token, and anybody may connect.
# Bites      programs that start Ray for one machine, on shared nodes and on read-only homes.
#
# Exits with 1 if any of this is no longer so. Needs a network that reaches a package index; 300 MB in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check ray==2.60.0
cat > "$work/local.py" <<'PYTHON'
import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR")
ray.shutdown()
PYTHON
umask 022
unset RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH
mkdir "$work/home" "$work/other"
run() { # HOME
    (cd "$work" && HOME=$1 RAY_USAGE_STATS_ENABLED=0 "$work/venv/bin/python" local.py >"$work/said" 2>&1)
}
run "$work/home"
mode=$(stat -c %a "$work/home/.ray/auth_token")
echo "token in the home folder, mode $mode, $(stat -c %s "$work/home/.ray/auth_token") bytes"
if run /proc; then unwritable="works"; else unwritable=$(tail -n 1 "$work/said"); fi
echo "a home that cannot be written: $unwritable"
RAY_AUTH_TOKEN=$(printf '0%.0s' {1..64}) run /proc && given="works"
echo "the same with RAY_AUTH_TOKEN: ${given:-fails}"
RAY_AUTH_TOKEN=$(printf '0%.0s' {1..64}) run "$work/other"
left=$(find "$work/other" -type f | wc -l)
echo "files it leaves in a home then: $left"
[[ $mode == 644 && $unwritable == *Error* && ${given:-} == works && $left == 0 ]] || { echo "no longer as seen"; exit 1; }
