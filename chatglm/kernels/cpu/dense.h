/* Products with weights that are not quantised, for a few rows: blocks of such models, and output heads.
 *
 * Activations become floats; or bfloat16 if the weights are and the CPU multiplies pairs of them. One output at a time
 * is a linear stream through the weights; but if a row of activations fills the L1 cache, it is loaded once for EIGHT
 * outputs. Zen 4 then does best without prefetching in software, which hinders its own. */
#pragma once

#include "products_dots.h"

enum { RUN = 24, RUN_BYTES = 393216 };  /* limits of a run: outputs whose weights stay in the L2 cache */
enum { THREE = 3 };             /* outputs at a time for more than DOT_ROWS rows: as many sums as registers hold */
enum { EIGHT = 8, DENSE_BYTES = 20480 };  /* outputs at a time, for rows of more bytes of activations */

/* Numbers from one row of prepared activations to the next: whole groups. */
INLINE i64 dense_step(const Job *job) { return job->groups * GROUP; }

INLINE float dot_dense(const void *weight, int type, const float *restrict x, i64 count) {
    float sum = 0;
    if (type == FLOAT32) {
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < count; i++) sum += ((const float *)weight)[i] * x[i];
    } else if (type == FLOAT16) {
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < count; i++) sum += half_to_float(((const uint16_t *)weight)[i]) * x[i];
    } else {
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < count; i++) sum += bfloat_to_float(((const uint16_t *)weight)[i]) * x[i];
    }
    return sum;
}

#define PORTABLE_DENSE(suffix, target) \
    target static void copy_##suffix(const Job *job, i64 group, i64 row) { \
        const i64 from = group * GROUP, left = job->in - from; \
        float *to = (float *)job->blocks + row * dense_step(job) + from; \
        memset(to, 0, GROUP * sizeof(float)); \
        load_numbers(job->x, job->x_type, row * job->in + from, left < GROUP ? (int)left : GROUP, to); \
    } \
    target static void dense_##suffix(const Job *job, i64 from, i64 to) { \
        for (i64 o = from; o < to; o++) \
            for (i64 r = 0; r < job->rows; r++) { \
                const float *x = (const float *)job->blocks + r * dense_step(job); \
                const uint8_t *weight = job->weight + o * job->row_bytes; \
                store_number(job->y, job->x_type, r * job->out + o, dot_dense(weight, job->scale_type, x, job->in)); \
            } \
    }

PORTABLE_DENSE(plain, )
#if X86
PORTABLE_DENSE(avx2, AVX2)

static i64 run_of(const Job *job) {
    const i64 outs = RUN_BYTES / job->row_bytes / THREE * THREE;
    return outs < THREE ? THREE : outs < RUN ? outs : RUN;
}

/* Memory is as slow as the arithmetic of many rows: each pass over a run of outputs prefetches a part of the next one.
 * Which of four pairs of lines: bits. */
static int lines_of(const Job *job, i64 first) {
    const i64 passes = (job->rows + DOT_ROWS - 1) / DOT_ROWS;
    int lines = 0;
    for (int pair = 0; pair < 4; pair++) lines |= (pair % passes == first / DOT_ROWS) << pair;
    return lines;
}

/* `outs` outputs from `o` on, of `count` rows of x from `first` on. */
AVX512 INLINE void dense_floats(const Job *job, int type, i64 o, const int outs, i64 first, const int count) {
    const i64 in = job->in, step = dense_step(job), bytes = bytes_of(type);
    const int place = fetching;
    const i64 ahead = run_of(job) * job->row_bytes;
    const int lines = lines_of(job, first);
    const float *x = (const float *)job->blocks + first * step;
    const uint8_t *weight = job->weight + o * job->row_bytes;
    __m512 sums[EIGHT][DOT_ROWS][2];
    #pragma GCC unroll 8
    for (int k = 0; k < outs; k++)
        #pragma GCC unroll 4
        for (int r = 0; r < count; r++) sums[k][r][0] = sums[k][r][1] = _mm512_setzero_ps();
    for (i64 i = 0; i < in; i += 32) {  /* with zeros for x past the end */
        const __mmask16 even = in - i < 16 ? (__mmask16)((1u << (in - i)) - 1) : 0xffff;
        const __mmask16 odd = in - i < 17 ? 0 : in - i < 32 ? (__mmask16)((1u << (in - i - 16)) - 1) : 0xffff;
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512 columns[DOT_ROWS];  /* loaded once for all outputs */
            #pragma GCC unroll 4
            for (int r = 0; r < count; r++) columns[r] = _mm512_loadu_ps(x + r * step + i + half * 16);
            #pragma GCC unroll 8
            for (int k = 0; k < outs; k++) {
                const uint8_t *at = weight + k * job->row_bytes + (i + half * 16) * bytes;
                if (outs == 1 && !half) fetch(at, 32 * bytes, place, AHEAD, 4);
                if (outs == THREE && !half && lines >> (i >> 5 & 3) & 1) fetch(at, 32 * bytes, TO_L2, ahead, 1);
                const __m512 w = load_any(at, type, half ? odd : even);
                #pragma GCC unroll 4
                for (int r = 0; r < count; r++) sums[k][r][half] = _mm512_fmadd_ps(w, columns[r], sums[k][r][half]);
            }
        }
    }
    #pragma GCC unroll 8
    for (int k = 0; k < outs; k++)
        #pragma GCC unroll 4
        for (int r = 0; r < count; r++)
            store_number(job->y, job->x_type, (first + r) * job->out + o + k,
                         _mm512_reduce_add_ps(_mm512_add_ps(sums[k][r][0], sums[k][r][1])));
}

#ifdef BF16
/* The same with pairs of bfloat16. */
BF16 INLINE void dense_pairs(const Job *job, i64 o, const int outs, i64 first, const int count) {
    const i64 in = job->in, step = dense_step(job), ahead = run_of(job) * job->row_bytes;
    const int place = fetching, lines = lines_of(job, first);
    const uint16_t *x = (const uint16_t *)job->blocks + first * step;
    const uint16_t *weight = (const uint16_t *)job->weight + o * in;
    __m512 sums[EIGHT][DOT_ROWS][2];
    #pragma GCC unroll 8
    for (int k = 0; k < outs; k++)
        #pragma GCC unroll 4
        for (int r = 0; r < count; r++) sums[k][r][0] = sums[k][r][1] = _mm512_setzero_ps();
    for (i64 i = 0; i < in; i += 64) {
        const __mmask32 even = in - i < 32 ? (1u << (in - i)) - 1 : ~0u;
        const __mmask32 odd = in - i < 33 ? 0 : in - i < 64 ? (1u << (in - i - 32)) - 1 : ~0u;
        #pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512bh columns[DOT_ROWS];  /* loaded once for all outputs */
            #pragma GCC unroll 4
            for (int r = 0; r < count; r++) columns[r] = (__m512bh)_mm512_loadu_si512(x + r * step + i + half * 32);
            #pragma GCC unroll 8
            for (int k = 0; k < outs; k++) {
                const uint16_t *at = weight + k * in + i + half * 32;
                if (outs == 1 && !half) fetch(at, 128, place, AHEAD, 4);
                if (outs == THREE && !half && lines >> (i >> 6 & 3) & 1) fetch(at, 128, TO_L2, ahead, 1);
                const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(half ? odd : even, at);
                #pragma GCC unroll 4
                for (int r = 0; r < count; r++) sums[k][r][half] = _mm512_dpbf16_ps(sums[k][r][half], w, columns[r]);
            }
        }
    }
    #pragma GCC unroll 8
    for (int k = 0; k < outs; k++)
        #pragma GCC unroll 4
        for (int r = 0; r < count; r++)
            store_number(job->y, job->x_type, (first + r) * job->out + o + k,
                         _mm512_reduce_add_ps(_mm512_add_ps(sums[k][r][0], sums[k][r][1])));
}

BF16 static void copy_pairs(const Job *job, i64 group, i64 row) {
    const i64 from = group * GROUP, left = job->in - from;
    uint16_t *to = (uint16_t *)job->blocks + row * dense_step(job) + from;
    float x[GROUP] = {0};
    load_numbers(job->x, job->x_type, row * job->in + from, left < GROUP ? (int)left : GROUP, x);
    for (int i = 0; i < GROUP; i++) to[i] = float_to_bfloat(x[i]);
}

static int has_bf16(void) { return __builtin_cpu_supports("avx512bf16") != 0; }
#else
static int has_bf16(void) { return 0; }
#endif

/* A product of up to DOT_ROWS of the rows that are left. */
#define DENSE_COUNT(left, product, o, outs, r) \
    switch (left) { \
        case 1: product(o, outs, r, 1); break; \
        case 2: product(o, outs, r, 2); break; \
        case 3: product(o, outs, r, 3); break; \
        default: product(o, outs, r, 4); \
    }

/* Outputs from..to of all rows. */
#define DENSE_ROWS(suffix, target, product) \
    target static void dense_##suffix(const Job *job, i64 from, i64 to) { \
        if (job->rows == 1 && job->groups * job->block_bytes > DENSE_BYTES) \
            for (; from + EIGHT <= to; from += EIGHT) { product(from, EIGHT, 0, 1); } \
        for (const i64 run = run_of(job); from < to; from += run) \
            for (i64 r = 0; r < job->rows; r += DOT_ROWS) { \
                const i64 end = from + run < to ? from + run : to; \
                i64 o = from; \
                if (job->rows > 1) \
                    for (; o + THREE <= end; o += THREE) { DENSE_COUNT(job->rows - r, product, o, THREE, r) } \
                for (; o < end; o++) { DENSE_COUNT(job->rows - r, product, o, 1, r) } \
            } \
    }

#define FROM_FLOAT32(o, outs, first, count) dense_floats(job, FLOAT32, o, outs, first, count)
#define FROM_FLOAT16(o, outs, first, count) dense_floats(job, FLOAT16, o, outs, first, count)
#define FROM_BFLOAT16(o, outs, first, count) dense_floats(job, BFLOAT16, o, outs, first, count)
DENSE_ROWS(float32, AVX512, FROM_FLOAT32)
DENSE_ROWS(float16, AVX512, FROM_FLOAT16)
DENSE_ROWS(bfloat16, AVX512, FROM_BFLOAT16)
#ifdef BF16
#define FROM_PAIRS(o, outs, first, count) dense_pairs(job, o, outs, first, count)
DENSE_ROWS(pairs_rows, BF16, FROM_PAIRS)
#endif
#endif

/* The function that computes outputs from..to of all rows. */
static void (*dense_kernel(const Job *job))(const Job *, i64, i64) {
#ifdef BF16
    if (job->pairs) return dense_pairs_rows;
#endif
#if X86
    if (job->isa == VNNI)
        return job->scale_type == FLOAT32 ? dense_float32 : job->scale_type == FLOAT16 ? dense_float16 : dense_bfloat16;
#endif
    return CHOOSE(job->isa, dense);
}
