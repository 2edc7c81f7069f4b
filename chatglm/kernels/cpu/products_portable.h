/* Products with quantised weights in plain C, in loops that compilers turn into SIMD. */
#pragma once

#include "product.h"

enum { PORTABLE_ROWS = 8 };  /* rows of x per pass */

/* One group of weights as integers; INT4 in four streams, one for each nibble of a 16-bit word. */
INLINE void unpack_group(const uint8_t *weight, int bits, i64 bytes, int16_t *restrict to) {
    int8_t padded[GROUP];
    if (bytes < GROUP * bits / 8) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, weight, (size_t)bytes);
        weight = (const uint8_t *)padded;
    }
    if (bits == 8) {
        for (int i = 0; i < GROUP; i++) to[i] = (int8_t)weight[i];
        return;
    }
    for (int i = 0; i < GROUP / 4; i++) {
        uint16_t word;
        memcpy(&word, weight + 2 * i, 2);
        to[i] = (int16_t)((int16_t)(uint16_t)(word << 8) >> 12);
        to[i + 32] = (int16_t)((int16_t)(uint16_t)(word << 12) >> 12);
        to[i + 64] = (int16_t)((int16_t)word >> 12);
        to[i + 96] = (int16_t)((int16_t)(uint16_t)(word << 4) >> 12);
    }
}

INLINE float dot_floats(const int16_t *restrict weight, const float *restrict x) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (int i = 0; i < GROUP; i++) sum += (float)weight[i] * x[i];
    return sum;
}

INLINE int32_t dot_integers(const int16_t *restrict weight, const int16_t *restrict x) {
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) sum += (int32_t)weight[i] * x[i];
    return sum;
}

/* Rows first..first + count of x with one row of weights, unpacked once for all of them. */
INLINE void portable_output(const Job *job, i64 output, i64 first, int count, int bits) {
    float sums[PORTABLE_ROWS] = {0};
    const uint8_t *weight = job->weight + output * job->row_bytes;
    for (i64 g = 0; g < job->groups; g++) {
        int16_t integers[GROUP];
        unpack_group(weight + g * job->group_bytes, bits, bytes_in_group(job, g), integers);
        for (int r = 0; r < count; r++) {
            const char *x = block_of(job, g, first + r);
            if (!job->levels) sums[r] += dot_floats(integers, (const float *)x);
            else sums[r] += job->step[g * job->rows + first + r] * (float)dot_integers(integers, (const int16_t *)x);
        }
    }
    float scale = load_number(job->scale, job->scale_type, output);
    for (int r = 0; r < count; r++) store_number(job->y, job->x_type, (first + r) * job->out + output, sums[r] * scale);
}

INLINE void to_floats(const Job *job, i64 output, float *restrict to) {
    const uint8_t *weight = job->weight + output * job->row_bytes;
    float scale = load_number(job->scale, job->scale_type, output);
    if (job->bits == 8) for (i64 i = 0; i < job->in; i++) to[i] = (float)(int8_t)weight[i] * scale;
    else for (i64 i = 0; i < job->row_bytes; i++) {
        to[2 * i] = (float)((int8_t)weight[i] >> 4) * scale;
        to[2 * i + 1] = (float)((int8_t)(uint8_t)(weight[i] << 4) >> 4) * scale;
    }
}

/* The portable kernels once for any CPU and once for AVX2: the same source, inlined into functions of either target. */
#define PORTABLE_KERNELS(suffix, target) \
    target static void prepare_##suffix(const Job *job, i64 group, i64 row) { \
        if (job->bits == 4) prepare_group(job, group, row, 4); \
        else prepare_group(job, group, row, 1); \
    } \
    target static void output_##suffix(const Job *job, i64 output, i64 first, int count) { \
        if (job->bits == 4 && count == 1) portable_output(job, output, first, 1, 4); \
        else if (job->bits == 4) portable_output(job, output, first, count, 4); \
        else if (count == 1) portable_output(job, output, first, 1, 8); \
        else portable_output(job, output, first, count, 8); \
    } \
    target static void floats_##suffix(const Job *job, i64 output, float *to) { to_floats(job, output, to); }

PORTABLE_KERNELS(plain, )
#if X86
PORTABLE_KERNELS(avx2, AVX2)
#endif
