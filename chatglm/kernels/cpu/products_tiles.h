/* Products with VNNI for many rows: GROUP columns of TILE outputs are brought into the L1 cache for all rows of x. */
#pragma once

#include "products_dots.h"

enum { TILE = 64, TILE_ROWS = 512, MICRO_ROWS = 6 };  /* outputs per tile; rows of x per pass; rows in registers */

#if X86
/* The transpose of 16 rows of 64 bytes, in words of 32 bits: to[word] holds that word of each row. */
AVX512 INLINE void load_transposed(const uint8_t *const *rows, i64 offset, __m512i *to) {
    for (int quarter = 0; quarter < 4; quarter++, to += 4) {
        __m512i a[4], b[4];
        for (int i = 0; i < 4; i++) {  /* 16 bytes of rows i, 4 + i, 8 + i, 12 + i: loads are cheaper than shuffles */
            const i64 at = offset + quarter * 16;
            a[i] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(rows[i] + at)));
            a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00f0, _mm_loadu_si128((const void *)(rows[4 + i] + at)));
            a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0f00, _mm_loadu_si128((const void *)(rows[8 + i] + at)));
            a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xf000, _mm_loadu_si128((const void *)(rows[12 + i] + at)));
        }
        b[0] = _mm512_unpacklo_epi32(a[0], a[1]);
        b[1] = _mm512_unpackhi_epi32(a[0], a[1]);
        b[2] = _mm512_unpacklo_epi32(a[2], a[3]);
        b[3] = _mm512_unpackhi_epi32(a[2], a[3]);
        to[0] = _mm512_unpacklo_epi64(b[0], b[2]);
        to[1] = _mm512_unpackhi_epi64(b[0], b[2]);
        to[2] = _mm512_unpacklo_epi64(b[1], b[3]);
        to[3] = _mm512_unpackhi_epi64(b[1], b[3]);
    }
}

/* Copies one group of 16 outputs, from `offset` of their rows, into a tile, which has TILE / 16 vectors per word.
 * `next` is what to prefetch meanwhile, in one piece; NULL prefetches what follows in each row. */
AVX512 INLINE void fill_tile(const uint8_t *const *rows, i64 offset, i64 bytes, int bits, const uint8_t *next,
                             __m512i *tile) {
    uint8_t padded[16][GROUP];
    const uint8_t *inside[16];
    const int place = fetching;
    for (int i = 0; i < 16; i++) {
        if (!next) fetch_line(rows[i] + offset + 256, place);
        if (!next && bits == 8) fetch_line(rows[i] + offset + 320, place);
        inside[i] = rows[i] + offset;
    }
    for (int i = 0; i < bits * 4 && next; i++) fetch_line(next + i * 64, place);
    if (bytes < GROUP * bits / 8) {
        memset(padded, 0, sizeof padded);
        for (int i = 0; i < 16; i++) inside[i] = memcpy(padded[i], inside[i], (size_t)bytes);
    }
    for (int half = 0; half < bits / 4; half++) {
        __m512i words[16];
        load_transposed(inside, half * 64, words);
        for (int i = 0; i < 16; i++, tile += TILE / 16) *tile = words[i];
    }
}

/* sums (count, TILE) += one group's product of `count` rows of x with a tile. */
AVX512 INLINE void multiply_tile(const Job *job, const __m512i *tile, i64 group, i64 first, int count, int bits,
                                 int planes, float *sums) {
    enum { VECTORS = TILE / 16 };
    const i64 index = group * job->rows + first;
    const char *x = job->blocks + index * (GROUP * planes);
    __m512i sum[MICRO_ROWS][VECTORS];
    for (int i = 0; i < count * planes * 2; i++)  /* prefetches the next rows: not all of x fits into the cache */
        _mm_prefetch(x + (count * planes * 2 + i) * 64, _MM_HINT_T0);
    for (int r = 0; r < count; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_setzero_si512();
    for (int plane = 0; plane < planes; plane++, x += GROUP) {
        for (int word = 0; word < bits * 4; word++)
            for (int half = 0; half < 8 / bits; half++) {  /* INT4: even columns, then odd ones */
                __m512i weight[VECTORS];
                for (int v = 0; v < VECTORS; v++) {
                    __m512i packed = tile[word * VECTORS + v];
                    weight[v] = bits == 8 ? make_unsigned(packed) : half ? odd_columns(packed) : even_columns(packed);
                }
                for (int r = 0; r < count; r++) {
                    int32_t four;
                    memcpy(&four, x + r * (GROUP * planes) + half * 64 + word * 4, 4);
                    const __m512i columns = _mm512_set1_epi32(four);
                    for (int v = 0; v < VECTORS; v++) sum[r][v] = dot4(sum[r][v], weight[v], columns);
                }
            }
        if (planes == 2 && plane == 0)
            for (int r = 0; r < count; r++)
                for (int v = 0; v < VECTORS; v++) sum[r][v] = _mm512_slli_epi32(sum[r][v], 8);
    }
    for (int r = 0; r < count; r++) {
        __m512i total = _mm512_set1_epi32(job->total[index + r]);
        __m512 step = _mm512_set1_ps(job->step[index + r]);
        for (int v = 0; v < VECTORS; v++) {
            float *to = sums + r * TILE + v * 16;
            __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][v], total));
            _mm512_store_ps(to, _mm512_fmadd_ps(value, step, _mm512_load_ps(to)));
        }
    }
}

/* sums (count, TILE) = outputs output..output + TILE of `count` <= TILE_ROWS rows of x. */
AVX512 INLINE void tile_rows(const Job *job, i64 output, i64 first, int count, int bits, int planes, float *sums) {
    __m512i tile[GROUP / 4 * TILE / 16];  /* half of it if INT4 */
    const int blocks = (count + MICRO_ROWS - 1) / MICRO_ROWS;
    const uint8_t *rows[TILE];
    for (i64 i = 0; i < TILE; i++)  /* the last row stands in for rows past the end */
        rows[i] = job->weight + (output + i < job->out ? output + i : job->out - 1) * job->row_bytes;
    /* The length of short rows is often a power of two, a slow stride: the next tile is prefetched in one run. */
    const uint8_t *next = job->row_bytes <= 4096 ? rows[0] + TILE * job->row_bytes : NULL;
    memset(sums, 0, (size_t)count * TILE * sizeof(float));
    for (i64 g = 0; g < job->groups; g++) {
        for (int v = 0; v < TILE / 16; v++, next += next ? bits * 256 : 0)
            fill_tile(rows + v * 16, g * job->group_bytes, bytes_in_group(job, g), bits, next, tile + v);
        for (int b = 0, r = 0; b < blocks; b++) {
            int step = (count - r + blocks - b - 1) / (blocks - b);  /* even shares: 8 rows are 4 + 4, not 6 + 2 */
            #define CASE(c) case c: multiply_tile(job, tile, g, first + r, c, bits, planes, sums + r * TILE); break;
            switch (step) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
            #undef CASE
            r += step;
        }
    }
}

/* Writes what tile_vnni has computed to y. */
AVX512 static void store_tile(const Job *job, i64 output, i64 first, int count, float *sums) {
    const int width = job->out - output < TILE ? (int)(job->out - output) : TILE;
    float scales[TILE];
    load_numbers(job->scale, job->scale_type, output, width, scales);
    for (int r = 0; r < count; r++) {
        for (int i = 0; i < width; i++) sums[r * TILE + i] *= scales[i];
        store_numbers(job->y, job->x_type, (first + r) * job->out + output, width, sums + r * TILE);
    }
}

AVX512 static void tile_vnni(const Job *job, i64 output, i64 first, int count, float *sums) {
    int planes = job->levels == LEVELS16 ? 2 : 1;
    if (job->bits == 4 && planes == 2) tile_rows(job, output, first, count, 4, 2, sums);
    else if (job->bits == 4) tile_rows(job, output, first, count, 4, 1, sums);
    else if (planes == 2) tile_rows(job, output, first, count, 8, 2, sums);
    else tile_rows(job, output, first, count, 8, 1, sums);
}
#endif
