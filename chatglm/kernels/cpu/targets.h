/* What the compiler and the CPU offer: OpenMP, and the families of kernels that a function can be compiled for. */
#pragma once

#include <math.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define thread_number() omp_get_thread_num()
#define team_size() omp_get_num_threads()
#else
#define thread_number() 0
#define team_size() 1
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#if defined(__clang__) || __GNUC__ >= 10
#define BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif
#else
#define X86 0
#endif
#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;

enum { PORTABLE, PORTABLE_AVX2, VNNI };  /* the families, `isa` in every call; a CPU runs those up to its best one */

/* Where weights are prefetched to. On Zen 4, lines on their way into the L1 cache hold up the loads, and a product then
 * takes three times as long; which place is best is measured once, see fetching.py. */
enum { TO_L1, TO_L2 };
static int fetching = TO_L2;

void chatglm_fetch(int place) { fetching = place; }
int chatglm_fetching(void) { return fetching; }

#if X86
/* Prefetches weights that are needed soon after those at `weight`. */
INLINE void fetch(const void *weight, i64 bytes, int place) {
    for (i64 b = 0; b < bytes; b += 64) {
        if (place == TO_L2) _mm_prefetch((const char *)weight + b + 16384, _MM_HINT_T1);
        else _mm_prefetch((const char *)weight + b + 8192, _MM_HINT_T0);
    }
}
#endif

/* A function that was compiled for any CPU and for AVX2 (CHOOSE), or for AVX-512 as well (CHOOSE_AVX512). */
#if X86
#define CHOOSE(isa, name) ((isa) == PORTABLE ? name##_plain : name##_avx2)
#define CHOOSE_AVX512(isa, name) ((isa) == VNNI ? name##_avx512 : CHOOSE(isa, name))
#else
#define CHOOSE(isa, name) name##_plain
#define CHOOSE_AVX512(isa, name) name##_plain
#endif

/* The best family of kernels that this CPU (and its operating system) can run. */
int chatglm_best(void) {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) return VNNI;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return PORTABLE_AVX2;
#endif
    return PORTABLE;
}
