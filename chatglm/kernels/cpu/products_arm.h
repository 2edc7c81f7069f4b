/* Products with quantised weights on ARM CPUs, by dot products of bytes. I8MM multiplies several rows of 16-bit
 * activations by two outputs and two planes at a time; everything else takes one output and one plane (DOTPROD).
 *
 * Weights stay signed. 16-bit activations are two planes of signed bytes: 256 * high + low. The planes of a block lie
 * one after the other; or, for I8MM, eight bytes of the high one alternate with eight of the low one. */
#pragma once

#include "product.h"

#if ARM_DOTPROD
/* Whether these kernels compute a product. */
INLINE int is_arm(const Job *job) {
    return (job->isa == DOTPROD || job->isa == I8MM) && job->levels && job->bits != DENSE_BITS;
}

enum { OUTS = 4, TOGETHER = 4 };  /* outputs at a time, and rows that share what I8MM prepares of the weights */

INLINE int by_matrices(const Job *job) {
    return ARM_I8MM && job->isa == I8MM && job->levels == LEVELS16 && job->rows > 1;
}

/* Reads one group of activations and writes its block. */
static void prepare_arm(const Job *job, i64 group, i64 row) {
    float x[GROUP] = {0};
    const i64 start = group * GROUP, left = job->in - start;
    load_numbers(job->x, job->x_type, row * job->in + start, left < GROUP ? (int)left : GROUP, x);
    const Step step = find_step(largest_magnitude(x), job->levels);
    const int pairs = by_matrices(job);
    int16_t q[GROUP], ordered[GROUP];
    int8_t *to = (int8_t *)block_of(job, group, row);
    round_group(x, step, q);
    if (job->bits == 4) { FOR_COLUMNS(2, p, c) ordered[p] = q[c]; }
    else memcpy(ordered, q, sizeof q);
    for (int p = 0; p < GROUP; p++) {
        int8_t *low = to + (pairs ? p / 8 * 16 + 8 + p % 8 : job->levels == LEVELS16 ? GROUP + p : p);
        *low = (int8_t)ordered[p];
        if (job->levels == LEVELS16) low[pairs ? -8 : -GROUP] = (int8_t)((ordered[p] + 128) >> 8);
    }
    job->step[group * job->rows + row] = step.size;
}

/* INT4 weights are used as 16 times their values: that takes an instruction less. */
INLINE int8x16_t high_nibbles(int8x16_t packed) { return vandq_s8(packed, vdupq_n_s8(-16)); }
INLINE int8x16_t low_nibbles(int8x16_t packed) { return vshlq_n_s8(packed, 4); }

/* The integer sums of one group for OUTS outputs; INT4: times 16. */
INLINE int32x4_t dot_group(const int8_t *const *weight, const int8_t *x, int bits, int planes) {
    int32x4_t sums[OUTS][2];
    for (int k = 0; k < OUTS; k++) sums[k][0] = sums[k][1] = vdupq_n_s32(0);
    for (int i = 0; i < GROUP * bits / 8; i += 16)
        for (int k = 0; k < OUTS; k++) {
            const int8x16_t packed = vld1q_s8(weight[k] + i);
            const int8x16_t first = bits == 4 ? high_nibbles(packed) : packed;
            for (int p = 0; p < planes; p++) {
                sums[k][p] = vdotq_s32(sums[k][p], first, vld1q_s8(x + p * GROUP + i));
                if (bits == 4)
                    sums[k][p] = vdotq_s32(sums[k][p], low_nibbles(packed), vld1q_s8(x + p * GROUP + GROUP / 2 + i));
            }
        }
    if (planes == 2)
        for (int k = 0; k < OUTS; k++) sums[k][0] = vaddq_s32(vshlq_n_s32(sums[k][0], 8), sums[k][1]);
    return vpaddq_s32(vpaddq_s32(sums[0][0], sums[1][0]), vpaddq_s32(sums[2][0], sums[3][0]));
}

#if ARM_I8MM
INLINE int8x16_t low_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

INLINE int8x16_t high_halves(int8x16_t a, int8x16_t b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

/* The same of `count` <= TOGETHER rows, whose blocks follow each other, with both planes at a time. */
INLINE void matrix_group(const int8_t *const *weight, const int8_t *x, int bits, int count, int32x4_t *result) {
    static const int32_t values[4] = {256, 1, 256, 1};  /* of the planes */
    int32x4_t sums[OUTS / 2][TOGETHER];
    for (int k = 0; k < OUTS / 2; k++)
        for (int r = 0; r < count; r++) sums[k][r] = vdupq_n_s32(0);
    for (int i = 0; i < GROUP * bits / 8; i += 16)
        for (int k = 0; k < OUTS / 2; k++) {
            const int8x16_t a = vld1q_s8(weight[2 * k] + i), b = vld1q_s8(weight[2 * k + 1] + i);
            const int8x16_t pair[2] = {low_halves(a, b), high_halves(a, b)};
            for (int h = 0; h < 2; h++) {
                const int8_t *at = x + 2 * i + 16 * h;
                const int8x16_t first = bits == 4 ? high_nibbles(pair[h]) : pair[h], second = low_nibbles(pair[h]);
                for (int r = 0; r < count; r++, at += 2 * GROUP) {
                    sums[k][r] = vmmlaq_s32(sums[k][r], first, vld1q_s8(at));
                    if (bits == 4) sums[k][r] = vmmlaq_s32(sums[k][r], second, vld1q_s8(at + GROUP));
                }
            }
        }
    const int32x4_t value = vld1q_s32(values);
    for (int r = 0; r < count; r++)
        result[r] = vpaddq_s32(vmulq_s32(sums[0][r], value), vmulq_s32(sums[1][r], value));
}
#endif

/* `outs` <= OUTS outputs from `first` on, of `count` <= TOGETHER rows from `row` on; pairs: by matrix_group. */
INLINE void arm_outputs(const Job *job, i64 first, i64 outs, i64 row, const int count, int bits, int planes, int pairs) {
    const i64 size = GROUP * bits / 8, whole = job->row_bytes / size;
    const int8_t *weight[OUTS];
    int8_t padded[OUTS][GROUP] = {{0}};
    float32x4_t total[TOGETHER];
    for (int r = 0; r < count; r++) total[r] = vdupq_n_f32(0);
    for (int k = 0; k < OUTS; k++)  /* past the end: the last output again */
        weight[k] = (const int8_t *)job->weight + (first + (k < outs ? k : outs - 1)) * job->row_bytes;
    for (i64 g = 0; g < job->groups; g++) {
        const int8_t *x = (const int8_t *)block_of(job, g, row);
        int32x4_t sums[TOGETHER];
        if (g == whole)
            for (int k = 0; k < OUTS; k++) weight[k] = memcpy(padded[k], weight[k], (size_t)bytes_in_group(job, g));
        if (!pairs) sums[0] = dot_group(weight, x, bits, planes);
#if ARM_I8MM
        else matrix_group(weight, x, bits, count, sums);
#endif
        for (int r = 0; r < count; r++)
            total[r] = vfmaq_n_f32(total[r], vcvtq_f32_s32(sums[r]), job->step[g * job->rows + row + r]);
        for (int k = 0; k < OUTS; k++) weight[k] += size;
    }
    for (int r = 0; r < count; r++) {
        float y[OUTS];
        vst1q_f32(y, bits == 4 ? vmulq_n_f32(total[r], 0.0625f) : total[r]);
        for (i64 k = 0; k < outs; k++)
            store_number(job->y, job->x_type, (row + r) * job->out + first + k,
                         y[k] * load_number(job->scale, job->scale_type, first + k));
    }
}

/* Outputs from..to of all rows. */
INLINE void arm_rows(const Job *job, i64 from, i64 to, int bits, int planes, int pairs) {
    for (; from < to; from += OUTS) {
        const i64 outs = to - from < OUTS ? to - from : OUTS;
        for (i64 r = 0; r < job->rows; r += pairs ? TOGETHER : 1)
            if (pairs && job->rows - r >= TOGETHER) arm_outputs(job, from, outs, r, TOGETHER, bits, planes, 1);
            else if (!pairs) arm_outputs(job, from, outs, r, 1, bits, planes, 0);
            else for (i64 one = r; one < job->rows; one++) arm_outputs(job, from, outs, one, 1, bits, planes, 1);
    }
}

static void outputs_arm(const Job *job, i64 from, i64 to) {
    const int pairs = by_matrices(job);
    if (job->bits == 8) {
        if (pairs) arm_rows(job, from, to, 8, 2, 1);
        else if (job->levels == LEVELS16) arm_rows(job, from, to, 8, 2, 0);
        else arm_rows(job, from, to, 8, 1, 0);
    } else if (pairs) arm_rows(job, from, to, 4, 2, 1);
    else if (job->levels == LEVELS16) arm_rows(job, from, to, 4, 2, 0);
    else arm_rows(job, from, to, 4, 1, 0);
}
#endif
