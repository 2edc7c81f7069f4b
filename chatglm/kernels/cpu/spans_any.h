/* Attention of one token over a span of cached tokens, for any CPU. */
#pragma once

#include "dense.h"
#include "layouts.h"
#include "team.h"

enum { TILE_TOKENS = 64 };      /* tokens processed at a time; a span starts at a multiple of it */
enum { AT_ONCE = 8 };           /* sums in registers */
enum { FEW_HEADS = 3 };         /* up to so many query heads of a key head, lanes are dims; else they are heads */

/* Tokens from..to of a row for up to LANES query heads that share a key head. */
typedef struct {
    i64 row, kv_head, from, to;
    int heads;
    const float *query;                 /* the first of these heads */
    float *result;                      /* for each head: the context times its sum, the sum, the largest score */
} Span;

INLINE i64 result_floats(const Block *block) { return block->head_dim + 2; }

/* Numbers from one token of a cache to the next; of SCALED_INT8: bytes. */
INLINE i64 row_numbers(int type, i64 size) { return type == SCALED_INT8 ? size + SCALE_BYTES : size; }

typedef struct { const void *keys, *values; i64 start; int width, type; } Tile;

/* The tile that starts at `token`; it ends with the prefix, if it begins there. */
INLINE Tile tile_at(const Tokens *tokens, const Block *block, const Span *span, i64 token) {
    const i64 prefix = tokens->prefix[span->row], size = block->head_dim;
    const int before = token < prefix;
    const i64 end = before && prefix < span->to ? prefix : span->to;
    Tile tile = {before ? block->prefix_keys[span->row] : block->keys,
                 before ? block->prefix_values[span->row] : block->values, 0, 0,
                 before ? block->prefix_type : block->cache_type};
    tile.start = before ? (span->kv_head * prefix + token) * row_numbers(block->prefix_type, size)
        : tokens->lines[span->row] * block->cache_row + span->kv_head * block->cache_step
            + (token - prefix) * row_numbers(block->cache_type, size);
    tile.width = end - token < TILE_TOKENS ? (int)(end - token) : TILE_TOKENS;
    return tile;
}

INLINE void load_rows(const void *from, const Tile *tile, int size, int step, float *restrict to) {
    if (tile->type == SCALED_INT8)
        for (int t = 0; t < tile->width; t++)
            load_scaled((const char *)from + tile->start + t * (size + SCALE_BYTES), size, to + t * step);
    else
        for (int t = 0; t < tile->width; t++)
            load_numbers(from, tile->type, tile->start + t * size, size, to + t * step);
}

/* A lane is a dim: scores are dot products. */
INLINE void span_of_few(const Tokens *tokens, const Block *block, const Span *span) {
    enum { SUMS = 4, STEP = SUMS * LANES / 2 };
    const int size = (int)block->head_dim, step = (size + STEP - 1) / STEP * STEP;
    _Alignas(64) float tile[TILE_TOKENS * MAX_HEAD], sums[FEW_HEADS][MAX_HEAD] = {{0}};
    float weights[FEW_HEADS][TILE_TOKENS], largest[FEW_HEADS], sum[FEW_HEADS];
    for (int r = 0; r < span->heads; r++) largest[r] = -INFINITY, sum[r] = 0;
    for (i64 token = span->from; token < span->to;) {
        const Tile here = tile_at(tokens, block, span, token);
        const int width = here.width;
        load_rows(here.keys, &here, size, step, tile);
        for (int r = 0; r < span->heads; r++) {
            const float *query = span->query + r * block->query_step;
            float most = largest[r];
            for (int t = 0; t < width; t++) {
                float score = 0;
                #pragma omp simd reduction(+ : score)
                for (int i = 0; i < size; i++) score += query[i] * tile[t * step + i];
                weights[r][t] = score * block->scaling;
                most = weights[r][t] > most ? weights[r][t] : most;
            }
            for (int t = width; t < TILE_TOKENS; t++) weights[r][t] = -INFINITY;
            const float factor = exponential(largest[r] - most);
            sum[r] *= factor;
            for (int t = 0; t < TILE_TOKENS; t++) weights[r][t] = exponential(weights[r][t] - most);
            for (int t = 0; t < width; t++) sum[r] += weights[r][t];
            for (int i = 0; i < size; i++) sums[r][i] *= factor;
            largest[r] = most;
        }
        load_rows(here.values, &here, size, step, tile);
        for (int r = 0; r < span->heads; r++)
            for (int i = 0; i < step; i += STEP) {
                Half *to = (Half *)(sums[r] + i), a = to[0], b = to[1], c = to[2], d = to[3];
                for (int t = 0; t < width; t++) {
                    const Half *value = (const Half *)(tile + t * step + i);
                    const float weight = weights[r][t];
                    a += weight * value[0], b += weight * value[1], c += weight * value[2], d += weight * value[3];
                }
                to[0] = a, to[1] = b, to[2] = c, to[3] = d;
            }
        token += width;
    }
    for (int r = 0; r < span->heads; r++) {
        float *to = span->result + r * result_floats(block);
        memcpy(to, sums[r], (size_t)size * sizeof(float));
        to[size] = sum[r], to[size + 1] = largest[r];
    }
}

/* What the spans whose lanes are heads have in common: an online softmax of each lane. */
typedef struct {
    _Alignas(64) float sums[MAX_HEAD][LANES];          /* of values, by dims */
    float scores[TILE_TOKENS][LANES];
    float largest[LANES], sum[LANES];
} Lanes;

/* Scores of a tile become weights; `sums` and `sum` get smaller where a larger score has come. */
INLINE void weigh(Lanes *lanes, int width, int size, float scaling) {
    float most[LANES], factor[LANES];
    int same = 1;
    for (int l = 0; l < LANES; l++) most[l] = lanes->largest[l];
    for (int t = 0; t < width; t++)
        for (int l = 0; l < LANES; l++) {
            const float score = lanes->scores[t][l] * scaling;
            lanes->scores[t][l] = score;
            most[l] = score > most[l] ? score : most[l];
        }
    for (int l = 0; l < LANES; l++) {
        factor[l] = exponential(lanes->largest[l] - most[l]);
        same &= lanes->largest[l] == most[l];
        lanes->largest[l] = most[l];
        lanes->sum[l] *= factor[l];
    }
    for (int i = 0; i < size && !same; i++)
        for (int l = 0; l < LANES; l++) lanes->sums[i][l] *= factor[l];
    for (int t = 0; t < width; t++)
        for (int l = 0; l < LANES; l++) lanes->scores[t][l] = exponential(lanes->scores[t][l] - most[l]);
    memset(lanes->scores[width], 0, (size_t)(TILE_TOKENS - width) * sizeof *lanes->scores);
}

INLINE void begin_lanes(Lanes *lanes, int size) {
    memset(lanes->sums, 0, (size_t)size * sizeof *lanes->sums);
    for (int l = 0; l < LANES; l++) lanes->largest[l] = -INFINITY, lanes->sum[l] = 0;
}

INLINE void end_lanes(const Lanes *lanes, const Block *block, const Span *span) {
    const i64 size = block->head_dim;
    for (int r = 0; r < span->heads; r++) {
        float *restrict to = span->result + r * result_floats(block);
        for (i64 i = 0; i < size; i++) to[i] = lanes->sums[i][r];
        to[size] = lanes->sum[r], to[size + 1] = lanes->largest[r];
    }
}

/* to[k] (LANES) = or += the sum over i < count of many[i] (LANES) * one[i * step + k * apart], for AT_ONCE of k. */
typedef void LaneProducts(i64 count, const float (*many)[LANES], const float *one, i64 step, i64 apart,
                          float (*to)[LANES], int add);

#define LANE_PRODUCTS(suffix, target, Register) \
    target static void lanes_##suffix(i64 count, const float (*many)[LANES], const float *one, i64 step, i64 apart, \
                                      float (*to)[LANES], int add) { \
        for (int l = 0; l < LANES; l += (int)(sizeof(Register) / sizeof(float))) { \
            Register sums[AT_ONCE]; \
            for (int k = 0; k < AT_ONCE; k++) sums[k] = add ? *(const Register *)(to[k] + l) : (Register){0}; \
            for (i64 i = 0; i < count; i++) { \
                const Register lanes = *(const Register *)(many[i] + l); \
                for (int k = 0; k < AT_ONCE; k++) sums[k] += lanes * one[i * step + k * apart]; \
            } \
            for (int k = 0; k < AT_ONCE; k++) *(Register *)(to[k] + l) = sums[k]; \
        } \
    }

LANE_PRODUCTS(plain, , Quarter)
#if X86
LANE_PRODUCTS(avx2, AVX2, Half)
LANE_PRODUCTS(avx512, AVX512, Vector)
#endif

/* A lane is a query head, so nothing is summed across lanes. */
INLINE void span_of_many(const Tokens *tokens, const Block *block, const Span *span, LaneProducts *multiply) {
    const int size = (int)block->head_dim, step = (size + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
    _Alignas(64) float tile[TILE_TOKENS * MAX_HEAD], query[MAX_HEAD][LANES];
    Lanes lanes;
    begin_lanes(&lanes, step);
    for (int i = 0; i < size; i++)
        for (int l = 0; l < LANES; l++) query[i][l] = l < span->heads ? span->query[l * block->query_step + i] : 0;
    memset(tile, 0, sizeof tile);
    for (i64 token = span->from; token < span->to;) {
        const Tile here = tile_at(tokens, block, span, token);
        load_rows(here.keys, &here, size, step, tile);
        for (int t = 0; t < here.width; t += AT_ONCE)  /* past the end: tokens of the last tile, which get no weight */
            multiply(size, query, tile + t * step, 1, step, lanes.scores + t, 0);
        weigh(&lanes, here.width, step, block->scaling);
        for (int t = 0; t < here.width; t++)
            for (int l = 0; l < LANES; l++) lanes.sum[l] += lanes.scores[t][l];
        load_rows(here.values, &here, size, step, tile);
        for (int i = 0; i < step; i += AT_ONCE)
            multiply(here.width, lanes.scores, tile + i, step, 1, lanes.sums + i, 1);
        token += here.width;
    }
    end_lanes(&lanes, block, span);
}

#define SPAN_KERNELS(suffix, target) \
    target static void few_##suffix(const Tokens *tokens, const Block *block, const Span *span) { \
        span_of_few(tokens, block, span); \
    } \
    target static void many_##suffix(const Tokens *tokens, const Block *block, const Span *span) { \
        span_of_many(tokens, block, span, lanes_##suffix); \
    }

SPAN_KERNELS(plain, )
#if X86
SPAN_KERNELS(avx2, AVX2)
#endif
