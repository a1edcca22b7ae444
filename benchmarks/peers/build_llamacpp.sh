#!/usr/bin/env bash
# Install llama-cpp-python for the Python named in $1, built for this CPU.
# A native build is tried first. Virtual machines sometimes claim instructions they
# cannot run, which kills the compiler or the library: then the same instruction sets
# are named one by one from /proc/cpuinfo.
set -euo pipefail
python=$1
version=0.3.36

install() {
  CMAKE_ARGS="$1" "$python" -m pip --disable-pip-version-check install --quiet \
    --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python \
    "llama-cpp-python==$version" &&
    "$python" -c 'import llama_cpp; llama_cpp.llama_print_system_info()'
}

"$python" -m pip --disable-pip-version-check install --quiet diskcache==5.6.3
if "$python" -c "import llama_cpp as m; assert m.__version__ == '$version'" \
  2>/dev/null; then
  exit 0
fi
if install "-DGGML_NATIVE=ON"; then exit 0; fi

echo "the native build failed; naming the instruction sets instead" >&2
flags="-DGGML_NATIVE=OFF"
declare -A names=(
  [avx]=AVX [avx2]=AVX2 [fma]=FMA [f16c]=F16C [bmi2]=BMI2 [avx512f]=AVX512
  [avx512vbmi]=AVX512_VBMI [avx512_vnni]=AVX512_VNNI [avx512_bf16]=AVX512_BF16
)
for flag in "${!names[@]}"; do
  if grep -qw "$flag" /proc/cpuinfo; then
    flags+=" -DGGML_${names[$flag]}=ON"
  fi
done
install "$flags"
