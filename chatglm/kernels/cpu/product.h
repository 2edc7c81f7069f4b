/* One product: its arguments, its scratch memory, and the layout of its activations. */
#pragma once

#include "numbers.h"

enum { GROUP = 128 };                       /* columns that share a step of the activations */
enum { LEVELS16 = 32512, LEVELS8 = 127 };   /* 32512 = 127 * 256: its high byte stays within +-127 */
enum { EXACT, DEFAULT, INT8 };              /* the precisions */
enum { DENSE_BITS = 16 };                   /* the number of bits that stands for weights that are not quantised */
enum { FOUR = 4 };                          /* rows whose blocks are stored together, see block_of */
enum { SHARE = 8, MOST_RUNS = 64 };         /* groups that may share a step; runs of them, up to 65536 columns */

/* A product and its scratch memory. Blocks of activations are [groups][rows]. */
typedef struct {
    int isa, bits, levels, x_type, scale_type;   /* levels: 0 for exact. DENSE_BITS: weights of scale_type */
    i64 rows, in, out, groups, row_bytes, group_bytes;
    i64 share;                              /* groups of a row that may have the same step */
    i64 pass;                               /* rows that the kernels process in one call */
    i64 chunk;                              /* outputs of a chunk of work, see team.h */
    int tiles, few, one;                    /* whether products_tiles.h, products_few.h or products_avx2.h computes */
    int pairs;                              /* dense weights: whether the activations are bfloat16 */
    const void *x, *scale;
    const uint8_t *weight;
    void *y;
    i64 block_bytes;                        /* of one row and group in `blocks` */
    char *blocks;                           /* floats, int16 or byte planes, in the order of the unpacked weights */
    float *step;                            /* the value of one unit of a fixed-point activation */
    int32_t *total;                         /* the sum of a group's activations times the offset of the weights */
} Job;

INLINE char *block_of(const Job *job, i64 group, i64 row) {
    i64 first = 0, count = job->rows;
    if (job->few) {  /* FOUR rows are stored together: apart, they would evict each other from the L1 cache */
        first = row / FOUR * FOUR;
        count = count - first < FOUR ? count - first : FOUR;
    }
    return job->blocks + (first * job->groups + group * count + row - first) * job->block_bytes;
}

/* Number of runs; the groups of a run are prepared together. */
INLINE i64 runs_of(const Job *job) { return (job->groups + job->share - 1) / job->share; }

/* Bytes of weights in this group; the last group of a row can be short. */
INLINE i64 bytes_in_group(const Job *job, i64 group) {
    i64 left = job->row_bytes - group * job->group_bytes;
    return left < job->group_bytes ? left : job->group_bytes;
}

/* Columns of a group in the order of `streams` interleaved runs: 0, streams, 2 * streams, ..., 1, streams + 1, ... */
#define FOR_COLUMNS(streams, position, column) \
    for (int s_ = 0; s_ < (streams); s_++) \
        for (int i_ = 0, position = s_ * (GROUP / (streams)), column = s_; i_ < GROUP / (streams); \
             i_++, position++, column += (streams))

typedef struct { float size, inverse; } Step;

/* The step for values whose largest magnitude has these bits. */
INLINE Step find_step(uint32_t magnitude, int levels) {
    const float largest = bits_to_float(magnitude);
    Step step = {0, 0};
    if (magnitude >= 0x7f800000u) step.size = NAN;
    else if (largest > 1e-33f) step.size = largest / (float)levels, step.inverse = (float)levels / largest;
    return step;
}

/* The bits of the largest magnitude of a group; compared as integers, NaN is the largest. */
INLINE uint32_t largest_magnitude(const float *x) {
    uint32_t largest = 0;
    for (int i = 0; i < GROUP; i++) {
        uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

INLINE void round_group(const float *restrict x, Step step, int16_t *restrict to) {
    for (int i = 0; i < GROUP; i++)  /* adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits */
        to[i] = (int16_t)float_to_bits(x[i] * step.inverse + 12582912.0f);
}

/* Whether groups should share a step, given the largest and the smallest of their largest magnitudes: if that costs
 * none of them more than one bit. */
INLINE int can_share(uint32_t largest, uint32_t smallest) {
    return largest >= 0x7f800000u || bits_to_float(largest) <= 2 * bits_to_float(smallest);
}

/* Whether all groups of a run have the same step (or NaN), in each of the rows from..to. */
static int is_even(const Job *job, i64 run, i64 from, i64 to) {
    const i64 end = (run + 1) * SHARE < job->groups ? (run + 1) * SHARE : job->groups;
    for (i64 r = from; r < to; r++)
        for (i64 g = run * SHARE + 1; g < end; g++)
            if (memcmp(job->step + g * job->rows + r, job->step + (g - 1) * job->rows + r, 4)) return 0;
    return 1;
}

/* excess (rows): what the offset of the weights adds to the sums. If x has a mean, that is far more than the result. */
INLINE void find_excess(const Job *job, double *excess) {
    for (i64 r = 0; r < job->rows; r++) excess[r] = 0;
    for (i64 g = 0; g < job->groups; g++)
        for (i64 r = 0; r < job->rows; r++)
            excess[r] += (double)job->total[g * job->rows + r] * (double)job->step[g * job->rows + r];
}

/* How a linear stream of weights is used and prefetched: `part` groups of a row at a time, see fetch. */
typedef struct { i64 part, ahead; int place, every; } Stream;

/* On Zen 4, which prefetches the rest, one line of four is best; but not for parts of rows, nor for INT4 weights with
 * 16-bit activations or several rows, whose loop is slower. */
static Stream plan_stream(const Job *job) {
    const i64 room = job->rows * job->block_bytes, parts = (room * job->groups + PART_BYTES - 1) / PART_BYTES;
    Stream stream = {.part = job->groups, .place = fetching};
    if (stream.place == TO_L2 && parts > 1) stream.part = (job->groups + parts * SHARE - 1) / (parts * SHARE) * SHARE;
    const i64 bytes = stream.part * job->group_bytes;
    stream.ahead = (AHEAD + bytes - 1) / bytes * job->row_bytes;
    const int slow = job->bits == 4 && (job->levels == LEVELS16 || job->rows > 1);
    stream.every = stream.part < job->groups || slow ? 1 : 4;
    return stream;
}

/* Reads one group of activations and writes its block: 16-bit integers, or floats for `exact`. */
INLINE void prepare_group(const Job *job, i64 group, i64 row, int streams) {
    float x[GROUP] = {0};
    i64 start = group * GROUP, left = job->in - start, index = group * job->rows + row;
    load_numbers(job->x, job->x_type, row * job->in + start, left < GROUP ? (int)left : GROUP, x);
    if (!job->levels) {
        float *to = (float *)block_of(job, group, row);
        FOR_COLUMNS(streams, p, c) to[p] = x[c];
        return;
    }
    const Step step = find_step(largest_magnitude(x), job->levels);
    int16_t q[GROUP], *to = (int16_t *)block_of(job, group, row);
    round_group(x, step, q);
    FOR_COLUMNS(streams, p, c) to[p] = q[c];
    job->step[index] = step.size;
}
