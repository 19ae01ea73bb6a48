# Which Pythons there are. Sourced by the other scripts.

version() { # PYTHON: 3.12
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# PYTHON [3.N]: whether it starts (a shim of pyenv may not), is one we support, and can make environments and build FFCV.
runs() {
    "$1" - "${2:-}" <<'END' >/dev/null 2>&1
import ensurepip, os, sys, sysconfig, venv
found = "%d.%d" % sys.version_info[:2]
assert found in ([sys.argv[1]] if sys.argv[1] else ["3.11", "3.12", "3.13"])
assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
END
}

# Those on PATH that run, one for each version, the newest first.
all_pythons() {
    local number python
    for number in 3.13 3.12 3.11; do
        for python in "python$number" python3 python; do
            if runs "$python" "$number"; then
                echo "$python"
                break
            fi
        done
    done
}

newest_python() {
    local found
    found=$(all_pythons)
    [[ $found ]] && echo "${found%%$'\n'*}"
}
