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
#define BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))
#endif
#else
#define X86 0
#endif

/* On ARM, the library is compiled for the CPU it runs on, see compile.py. */
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define ARM_DOTPROD 1
#include <arm_neon.h>
#ifdef __ARM_FEATURE_MATMUL_INT8
#define ARM_I8MM 1
#endif
#endif
#ifndef ARM_DOTPROD
#define ARM_DOTPROD 0
#endif
#ifndef ARM_I8MM
#define ARM_I8MM 0
#endif
#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;

/* The families, `isa` in every call. Those of one kind of CPU are in order, from the slowest to the fastest. */
enum { PORTABLE, PORTABLE_AVX2, VNNI, DOTPROD, I8MM };

/* Where weights are prefetched to; what is best is measured once, see fetching.py. With the L1 cache, Zen 4 takes up to
 * three times as long: the lines on their way there hold up the loads of activations. */
enum { TO_L1, TO_L2 };
static int fetching = TO_L2;

void chatglm_fetch(int place) { fetching = place; }
int chatglm_fetching(void) { return fetching; }

/* With weights that are prefetched to the L2 cache, activations are used in parts that leave room in the L1 cache, for
 * some outputs at a time. */
enum { PART_BYTES = 14336, PART_OUTS = 64 };
enum { AHEAD = 16384 };  /* bytes of weights between those in use and those being prefetched */

#if X86
INLINE void fetch_line(const void *line, int place) {
    if (place == TO_L1) _mm_prefetch(line, _MM_HINT_T0);
    else _mm_prefetch(line, _MM_HINT_T1);
}

/* Prefetches what comes after the weights at `weight`: into the L2 cache, `ahead` bytes on, one line of `every`; or
 * into the L1 cache, 8 KB on. */
INLINE void fetch(const void *weight, i64 bytes, int place, i64 ahead, int every) {
    for (i64 b = 0; b < bytes; b += 64) {
        const char *line = (const char *)weight + b;
        if (place == TO_L1) _mm_prefetch(line + 8192, _MM_HINT_T0);
        else if (!((uintptr_t)line & (uintptr_t)(every * 64 - 64))) _mm_prefetch(line + ahead, _MM_HINT_T1);
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

/* Whether this CPU (and its operating system) can run a family of kernels. */
int chatglm_runs(int isa) {
#if X86
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == PORTABLE_AVX2) return avx2;
    if (isa == VNNI) return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni");
#endif
    if (isa == DOTPROD) return ARM_DOTPROD;
    if (isa == I8MM) return ARM_I8MM;
    return isa == PORTABLE;
}
