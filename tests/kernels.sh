#!/usr/bin/env bash
# The test suite with the kernels that other processors would take: `make test-kernels`, or `tests/kernels.sh PYTEST_ARGUMENTS`.
# torch (ATen), oneDNN and MKL choose their kernels by the processor, and each adds up in its own order; these variables choose
# for them. ATEN_CPU_CAPABILITY is not checked against the processor: what it cannot run ends in an illegal instruction.
set -u
cd "$(dirname "$0")/.." || exit 1
flags=" $(grep -m1 '^flags' /proc/cpuinfo 2>/dev/null) "
summary=() failed=0

has() { # every flag of the processor
    for flag in "$@"; do [[ $flags == *" $flag "* ]] || return 1; done
}

suite() { # what it is called, then NAME=VALUE ... -- pytest arguments
    local name=$1 settings=() result
    shift
    while [[ $1 != -- ]]; do settings+=("$1") && shift; done
    shift
    echo "== $name: ${settings[*]}"
    if result=$(env "${settings[@]}" .venv/bin/python -m pytest -q -n 2 --dist loadfile "$@" | tee /dev/stderr | tail -1); then
        summary+=("passed   $name: $result")
    else
        summary+=("FAILED   $name: $result") && failed=1
    fi
}

skip() { # what it is called, why
    echo "== $1: left out, $2" && summary+=("left out $1: $2")
}
set -o pipefail

suite "as this processor chooses" OMP_NUM_THREADS=1 -- "$@"
suite "two threads" OMP_NUM_THREADS=2 -- "$@"
suite "ATen without vectors" OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default -- "$@"
suite "oneDNN with SSE4.1" OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=SSE41 -- "$@"
suite "MKL for any processor" OMP_NUM_THREADS=1 MKL_CBWR=COMPATIBLE -- "$@"
suite "the least of all, two threads" OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE -- "$@"
if has avx2 fma; then
    suite "AVX2" OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 -- "$@"
else
    skip "AVX2" "this processor has none"
fi
if has avx512f avx512bw avx512dq avx512vl; then
    suite "AVX-512" OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_CBWR=AVX512 -- "$@"
else
    skip "AVX-512" "this processor has none, and ATen would stop at an illegal instruction"
fi
# The copies that this plugin makes take memory, which one test measures.
suite "sums in another order" OMP_NUM_THREADS=1 -- -p tests.common.other_order \
    --deselect tests/run/test_plan.py::test_the_peak_of_a_learning_pass_is_below_the_estimate_and_near_it "$@"

printf '\n%s\n' "With the kernels of:" && printf '  %s\n' "${summary[@]}"
exit $failed
