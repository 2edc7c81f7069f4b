/* Dot products with VNNI for up to FEW_ROWS rows: two outputs by FOUR rows at a time. */
#pragma once

#include "products_dots.h"

enum { FEW_ROWS = 8, FEW_OUTS = 64 };  /* the most rows of x, and the outputs per run */
enum { CHUNK = 16 };                   /* blocks of FOUR rows that take half of the L1 cache */

#if X86
/* One variable per row of x: GCC would keep an array of so many sums in memory. */
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3)

/* y (FOUR, 2) += groups from..to of an output, and of the one `stride` bytes after it, for rows first..first + count.
 * An activation is loaded once for both. `even`: for each run, whether its groups have the same step, so that their
 * products can be summed as integers. */
AVX512 INLINE void dot_pair(const Job *job, i64 out, i64 stride, i64 from, i64 to, i64 first, int count, int bits,
                            int planes, const uint8_t *even, float *y) {
    const i64 size = GROUP * bits / 8, whole = job->row_bytes / size;
    const uint8_t *weight = job->weight + out * job->row_bytes + from * size;
    const char *x = block_of(job, from, first);
    const float *steps = job->step + from * job->rows + first;
    const int place = fetching;
    #define DECLARE(r) __m512 sum_a##r = _mm512_setzero_ps(), sum_b##r = sum_a##r;
    #define BEGIN(r) __m512i low_a##r = _mm512_setzero_si512(), low_b##r = low_a##r, high_a##r = low_a##r, \
        high_b##r = low_a##r;
    #define ADD(r) if (r < count) { \
        const __m512i *at = (const __m512i *)(x + r * GROUP * planes); \
        __m512i one = at[0], two = at[1], three = at[2 * planes - 2], four = at[2 * planes - 1]; \
        __asm__("" : "+v"(one), "+v"(two), "+v"(three), "+v"(four));  /* loaded here, not by each product */ \
        low_a##r = dot4(dot4(low_a##r, before_a, three), after_a, four); \
        low_b##r = dot4(dot4(low_b##r, before_b, three), after_b, four); \
        if (planes == 2) { \
            high_a##r = dot4(dot4(high_a##r, before_a, one), after_a, two); \
            high_b##r = dot4(dot4(high_b##r, before_b, one), after_b, two); \
        } \
    }
    #define END(r) if (r < count) { \
        const __m512 step = _mm512_set1_ps(steps[r]); \
        if (planes == 2) { \
            low_a##r = _mm512_add_epi32(low_a##r, _mm512_slli_epi32(high_a##r, 8)); \
            low_b##r = _mm512_add_epi32(low_b##r, _mm512_slli_epi32(high_b##r, 8)); \
        } \
        sum_a##r = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_a##r), step, sum_a##r); \
        sum_b##r = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_b##r), step, sum_b##r); \
    }
    EACH_ROW(DECLARE)
    for (i64 g = from, end; g < to; g = end) {
        end = !even[g / SHARE] ? g + 1 : g / SHARE * SHARE + SHARE < to ? g / SHARE * SHARE + SHARE : to;
        EACH_ROW(BEGIN)
        for (i64 i = g; i < end; i++, weight += size, x += count * GROUP * planes) {
            uint8_t padded[2][GROUP];
            const uint8_t *a = weight, *b = weight + stride;
            if (i == whole) {
                memset(padded, 0, sizeof padded);
                a = memcpy(padded[0], a, (size_t)bytes_in_group(job, i));
                b = memcpy(padded[1], b, (size_t)bytes_in_group(job, i));
            }
            for (i64 p = 0; p < size && !first; p += 64) {  /* for the pair of outputs after the next */
                fetch_line(weight + 4 * job->row_bytes + p, place);
                fetch_line(weight + 5 * job->row_bytes + p, place);
            }
            const __m512i packed_a = _mm512_loadu_si512(a), packed_b = _mm512_loadu_si512(b);
            const __m512i before_a = bits == 4 ? even_columns(packed_a) : make_unsigned(packed_a);
            const __m512i before_b = bits == 4 ? even_columns(packed_b) : make_unsigned(packed_b);
            const __m512i after_a = bits == 4 ? odd_columns(packed_a) : make_unsigned(_mm512_loadu_si512(a + 64));
            const __m512i after_b = bits == 4 ? odd_columns(packed_b) : make_unsigned(_mm512_loadu_si512(b + 64));
            EACH_ROW(ADD)
        }
        EACH_ROW(END)
        steps += (end - g) * job->rows;
    }
    #undef DECLARE
    #undef BEGIN
    #undef ADD
    #undef END
    const __m256 first_rows = add_across(sum_a0, sum_b0, sum_a1, sum_b1);
    const __m256 other_rows = add_across(sum_a2, sum_b2, sum_a3, sum_b3);
    const __m256 low = _mm256_permute2f128_ps(first_rows, other_rows, 0x20);
    const __m256 high = _mm256_permute2f128_ps(first_rows, other_rows, 0x31);
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), _mm256_add_ps(low, high)));
}

/* Outputs from..to of a few rows of x, taking a run of outputs and some groups of all rows at a time. */
AVX512 INLINE void few_rows(const Job *job, i64 from, i64 to, int bits, int planes) {
    double excess[FEW_ROWS];
    find_excess(job, excess);
    const i64 fours = (job->rows + FOUR - 1) / FOUR, chunk = CHUNK / fours / SHARE * SHARE;
    uint8_t even[FEW_ROWS / FOUR][MOST_RUNS];
    for (i64 f = 0; f < fours; f++) {
        const i64 end = (f + 1) * FOUR < job->rows ? (f + 1) * FOUR : job->rows;
        for (i64 run = 0; run * SHARE < job->groups; run++) even[f][run] = (uint8_t)is_even(job, run, f * FOUR, end);
    }
    for (; from < to; from += FEW_OUTS) {
        const i64 outs = to - from < FEW_OUTS ? to - from : FEW_OUTS;
        float y[FEW_OUTS / 2][FEW_ROWS / FOUR][FOUR][2] = {0};
        for (i64 g = 0; g < job->groups; g += chunk) {
            const i64 end = g + chunk < job->groups ? g + chunk : job->groups;
            for (i64 o = 0; o < outs; o += 2)
                for (i64 first = 0; first < job->rows; first += FOUR) {
                    const i64 stride = o + 1 < outs ? job->row_bytes : 0;
                    const uint8_t *same = even[first / FOUR];
                    float *sums = y[o / 2][first / FOUR][0];
                    #define CASE(c) case c: \
                        dot_pair(job, from + o, stride, g, end, first, c, bits, planes, same, sums); break;
                    switch (job->rows - first) { CASE(1) CASE(2) CASE(3) default: CASE(4) }
                    #undef CASE
                }
        }
        for (i64 o = 0; o < outs; o++) {
            const float scale = load_number(job->scale, job->scale_type, from + o);
            for (i64 r = 0; r < job->rows; r++)
                store_number(job->y, job->x_type, r * job->out + from + o,
                             (float)((double)y[o / 2][r / FOUR][r % FOUR][o % 2] - excess[r]) * scale);
        }
    }
}

AVX512 static void few_vnni(const Job *job, i64 from, i64 to) {
    const int planes = job->levels == LEVELS16 ? 2 : 1;
    if (job->bits == 4 && planes == 2) few_rows(job, from, to, 4, 2);
    else if (job->bits == 4) few_rows(job, from, to, 4, 1);
    else if (planes == 2) few_rows(job, from, to, 8, 2);
    else few_rows(job, from, to, 8, 1);
}
#endif
