#!/usr/bin/env bash
# Print the path of a Python that really runs and is at least MINIMUM (default 3.12).
# Looks on PATH, then in pyenv's versions folder, then asks uv (which may download one).
# With "exact" as second word only that minor version will do: tools/python.sh 3.11 exact
set -u
minimum=${1:-3.12}
mode=${2:-least}
major=${minimum%%.*}
minor=${minimum##*.}

# A pyenv shim exists for every version anywhere and fails when run: run it to know.
# venv and ensurepip are separate packages on Debian, and we need both.
works() {
  "$1" - "$major" "$minor" "$mode" 2>/dev/null <<'PY'
import sys
import ensurepip, venv
want = (int(sys.argv[1]), int(sys.argv[2]))
have = sys.version_info[:2]
if have != want if sys.argv[3] == "exact" else have < want:
    sys.exit(1)
print(sys.executable)
PY
}

try() {
  local found
  found=$(works "$1") && [ -n "$found" ] && printf '%s\n' "$found" && exit 0
}

# The minor version that the pins were tested on first, then newer ones.
names=("python$major.$minor")
if [ "$mode" = least ]; then
  for newer in 1 2 3 4; do names+=("python$major.$((minor + newer))"); done
fi
names+=(python3 python)

for name in "${names[@]}"; do
  while IFS= read -r path; do
    [ -n "$path" ] && try "$path"
  done < <(type -aP "$name" 2>/dev/null)
done

root=${PYENV_ROOT:-$HOME/.pyenv}/versions
for path in "$root/$major.$minor".*/bin/python "$root"/*/bin/python; do
  [ -x "$path" ] && try "$path"
done

if command -v uv >/dev/null 2>&1; then
  request=">=$minimum"
  [ "$mode" = exact ] && request=$minimum
  path=$(uv python find --no-project "$request" 2>/dev/null) && try "$path"
  uv python install "$minimum" >&2 &&
    path=$(uv python find --no-project "$minimum" 2>/dev/null) && try "$path"
fi

cat >&2 <<EOT
No Python $minimum${mode/least/ or newer} that runs (with venv and ensurepip) was found
on PATH, under $root, or through uv. Install one, for example:
  apt install python$minimum-venv    (Debian, Ubuntu)
  uv python install $minimum         (https://docs.astral.sh/uv)
  pyenv install $minimum
then run make again, or name it: make PYTHON=/path/to/python$minimum
EOT
exit 1
