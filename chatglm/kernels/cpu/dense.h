/* Products with half-precision weights for a few rows, such as those of the output head. */
#pragma once

#include "products_dots.h"

enum { RUN = 16 };  /* outputs whose weights stay in the L2 cache */

INLINE float dot_dense(const uint16_t *restrict weight, int type, const float *restrict x, i64 count) {
    float sum = 0;
    if (type == FLOAT16) {
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < count; i++) sum += half_to_float(weight[i]) * x[i];
    } else {
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < count; i++) sum += bfloat_to_float(weight[i]) * x[i];
    }
    return sum;
}

#define PORTABLE_DENSE(suffix, target) \
    target static float dense_##suffix(const uint16_t *weight, int type, const float *x, i64 count) { \
        return type == FLOAT16 ? dot_dense(weight, FLOAT16, x, count) : dot_dense(weight, BFLOAT16, x, count); \
    }

PORTABLE_DENSE(plain, )
#if X86
PORTABLE_DENSE(avx2, AVX2)

/* Outputs from..to of `count` rows of x: one linear stream through the weights. */
AVX512 INLINE void dense_rows(const uint16_t *weight, int type, const float *x, i64 in, i64 from, i64 to, int count,
                              void *y, int y_type, i64 out) {
    enum { STEP = 32 };
    const int place = fetching;
    for (i64 o = from; o < to; o++) {
        const uint16_t *row = weight + o * in;
        __m512 even[DOT_ROWS], odd[DOT_ROWS];
        for (int r = 0; r < count; r++) even[r] = odd[r] = _mm512_setzero_ps();
        i64 i = 0;
        for (; i + STEP <= in; i += STEP) {
            fetch(row + i, 64, place, AHEAD, 4);
            __m512 first = load_floats(row + i, type, 0xffff), second = load_floats(row + i + 16, type, 0xffff);
            for (int r = 0; r < count; r++) {
                even[r] = _mm512_fmadd_ps(first, _mm512_loadu_ps(x + r * in + i), even[r]);
                odd[r] = _mm512_fmadd_ps(second, _mm512_loadu_ps(x + r * in + i + 16), odd[r]);
            }
        }
        for (; i < in; i += 16) {
            __mmask16 mask = in - i < 16 ? (__mmask16)((1u << (in - i)) - 1) : 0xffff;
            __m512 last = load_floats(row + i, type, mask);
            for (int r = 0; r < count; r++)
                even[r] = _mm512_fmadd_ps(last, _mm512_maskz_loadu_ps(mask, x + r * in + i), even[r]);
        }
        for (int r = 0; r < count; r++)
            store_number(y, y_type, r * out + o, _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r])));
    }
}

AVX512 static void dense_vnni(const uint16_t *weight, int type, const float *x, i64 in, i64 from, i64 to, int count,
                              void *y, int y_type, i64 out) {
    #define CASE(c) case c: \
        if (type == FLOAT16) dense_rows(weight, FLOAT16, x, in, from, to, c, y, y_type, out); \
        else dense_rows(weight, BFLOAT16, x, in, from, to, c, y, y_type, out); \
        break;
    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) }
    #undef CASE
}
#endif

#ifdef BF16
/* The same if x is bfloat16 too: the CPU has an instruction that multiplies and adds pairs of them. */
BF16 INLINE void dense_pairs(const uint16_t *weight, const uint16_t *x, i64 in, i64 from, i64 to, int count,
                             uint16_t *y, i64 out) {
    enum { STEP = 64 };
    const int place = fetching;
    for (i64 o = from; o < to; o++) {
        const uint16_t *row = weight + o * in;
        __m512 sums[DOT_ROWS][2];
        for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (i64 i = 0; i < in; i += STEP) {
            for (int half = 0; half < 2; half++) {
                const i64 at = i + half * 32, left = in - at;
                const __mmask32 mask = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
                fetch(row + at, 64, place, AHEAD, 4);
                const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(mask, row + at);
                for (int r = 0; r < count; r++) {
                    const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * in + at);
                    sums[r][half] = _mm512_dpbf16_ps(sums[r][half], w, v);
                }
            }
        }
        for (int r = 0; r < count; r++)
            y[r * out + o] = float_to_bfloat(_mm512_reduce_add_ps(_mm512_add_ps(sums[r][0], sums[r][1])));
    }
}

BF16 static void dense_bf16(const uint16_t *weight, const uint16_t *x, i64 in, i64 from, i64 to, int count,
                            uint16_t *y, i64 out) {
    #define CASE(c) case c: dense_pairs(weight, x, in, from, to, c, y, out); break;
    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) }
    #undef CASE
}

static int has_bf16(void) { return __builtin_cpu_supports("avx512bf16") != 0; }
#elif X86
#define dense_bf16(...)
static int has_bf16(void) { return 0; }
#endif
/* y (rows, out) = x (rows, in) . weight for a few rows, weight in fp16 or bf16, y in x's type. Returns 0, or 1 if
 * memory runs out. */
int chatglm_dense(int isa, int threads, const void *x, int x_type, const void *weight, int weight_type, void *y,
                  i64 rows, i64 in, i64 out) {
    int pairs = 0;
#if X86
    pairs = isa == VNNI && x_type == BFLOAT16 && weight_type == BFLOAT16 && has_bf16();
#endif
    float *floats = pairs ? NULL : malloc((size_t)(rows * in) * 4 + 64);
    if (!pairs && !floats) return 1;
    for (i64 r = 0; r < rows && !pairs; r++) load_numbers(x, x_type, r * in, (int)in, floats + r * in);
    float (*dot)(const uint16_t *, int, const float *, i64) = CHOOSE(isa, dense);
    #pragma omp parallel num_threads(threads)
    {
#if X86
        if (isa == VNNI) {
            #pragma omp for schedule(static)
            for (i64 part = 0; part < threads; part++) {
                const i64 end = out * (part + 1) / threads;
                for (i64 from = out * part / threads; from < end; from += RUN)
                    for (i64 r = 0; r < rows; r += DOT_ROWS) {
                        const i64 to = from + RUN < end ? from + RUN : end;
                        const int count = rows - r < DOT_ROWS ? (int)(rows - r) : DOT_ROWS;
                        void *place = (char *)y + r * out * (x_type == FLOAT32 ? 4 : 2);
                        if (pairs) dense_bf16(weight, (const uint16_t *)x + r * in, in, from, to, count, place, out);
                        else dense_vnni(weight, weight_type, floats + r * in, in, from, to, count, place, x_type, out);
                    }
            }
        } else
#endif
        {
            #pragma omp for schedule(static)
            for (i64 o = 0; o < out; o++)
                for (i64 r = 0; r < rows; r++) {
                    float value = dot((const uint16_t *)weight + o * in, weight_type, floats + r * in, in);
                    store_number(y, x_type, r * out + o, value);
                }
        }
    }
    free(floats);
    return 0;
}
