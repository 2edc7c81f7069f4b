/* Attention of one token over the prefix and the cache, in spans of tokens: each is read once, for all query heads that
 * share a key head, and threads can take the spans of one sequence. https://arxiv.org/abs/2205.14135, section 3 */
#pragma once

#include "dense.h"
#include "layouts.h"
#include "team.h"

enum { TILE_TOKENS = 64 };      /* tokens processed at a time; a span starts at a multiple of it */
enum { AT_ONCE = 8 };           /* sums in registers */
enum { FEW_HEADS = 3 };         /* up to so many query heads of a key head, a lane is a dim of a head; else it is a head */
enum { SPAN_TOKENS = 256, SPANS = 4 };  /* the fewest tokens in one of several spans; spans per thread */

/* Tokens from..to of a row for up to LANES query heads that share a key head. */
typedef struct {
    i64 row, kv_head, from, to;
    int heads;
    const float *query;                 /* the first of these heads */
    float *result;                      /* for each head: the context times its sum, the sum, the largest score */
} Span;

INLINE i64 result_floats(const Block *block) { return block->head_dim + 2; }

typedef struct { const void *keys, *values; i64 start; int width; } Tile;

/* The tile that starts at `token`; it ends with the prefix, if it begins there. */
INLINE Tile tile_at(const Tokens *tokens, const Block *block, const Span *span, i64 token) {
    const int before = token < tokens->prefix;
    const i64 size = block->head_dim, end = before && tokens->prefix < span->to ? tokens->prefix : span->to;
    Tile tile = {before ? block->prefix_keys : block->keys, before ? block->prefix_values : block->values, 0, 0};
    tile.start = before ? (span->kv_head * tokens->prefix + token) * size
        : span->row * block->cache_row + span->kv_head * block->cache_step + (token - tokens->prefix) * size;
    tile.width = end - token < TILE_TOKENS ? (int)(end - token) : TILE_TOKENS;
    return tile;
}

INLINE void load_rows(const void *from, int type, const Tile *tile, int size, int step, float *restrict to) {
    for (int t = 0; t < tile->width; t++) load_numbers(from, type, tile->start + t * size, size, to + t * step);
}

/* A lane is a dim. `keys` heads' scores by dot products; sums of values in registers. */
INLINE void span_of_few(const Tokens *tokens, const Block *block, const Span *span) {
    enum { SUMS = 4, STEP = SUMS * LANES / 2 };
    const int size = (int)block->head_dim, step = (size + STEP - 1) / STEP * STEP;
    _Alignas(64) float tile[TILE_TOKENS * MAX_HEAD], sums[FEW_HEADS][MAX_HEAD] = {{0}};
    float weights[FEW_HEADS][TILE_TOKENS], largest[FEW_HEADS], sum[FEW_HEADS];
    for (int r = 0; r < span->heads; r++) largest[r] = -INFINITY, sum[r] = 0;
    for (i64 token = span->from; token < span->to;) {
        const Tile here = tile_at(tokens, block, span, token);
        const int width = here.width;
        load_rows(here.keys, block->cache_type, &here, size, step, tile);
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
        load_rows(here.values, block->cache_type, &here, size, step, tile);
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

#if X86
/* As span_of_few, without a tile of floats in between. */
AVX512 INLINE void stream_few(const Tokens *tokens, const Block *block, const Span *span, int type) {
    enum { SUMS = 4 };
    const int size = (int)block->head_dim, vectors = (size + LANES - 1) / LANES, bytes = type == FLOAT32 ? 4 : 2;
    const __mmask16 last = (__mmask16)(0xffff >> (vectors * LANES - size));
    _Alignas(64) float sums[FEW_HEADS][MAX_HEAD] = {{0}}, weights[TILE_TOKENS + SUMS];
    float largest[FEW_HEADS], sum[FEW_HEADS];
    #define LOAD(data, t, v) \
        load_any((data) + ((t) * size + (v) * LANES) * bytes, type, (v) == vectors - 1 ? last : (__mmask16)0xffff)
    for (int r = 0; r < span->heads; r++) largest[r] = -INFINITY, sum[r] = 0;
    for (i64 token = span->from; token < span->to;) {
        const Tile here = tile_at(tokens, block, span, token);
        const char *keys = (const char *)here.keys + here.start * bytes;
        const char *values = (const char *)here.values + here.start * bytes;
        for (int r = 0; r < span->heads; r++) {
            const float *query = span->query + r * block->query_step;
            __m512 most = _mm512_set1_ps(largest[r]), total = _mm512_setzero_ps();
            for (int t = 0; t < here.width; t += SUMS) {
                __m512 part[SUMS] = {most, most, most, most};
                const int end = here.width - 1;
                const int at[SUMS] = {t, t + 1 < end ? t + 1 : end, t + 2 < end ? t + 2 : end, t + 3 < end ? t + 3 : end};
                for (int k = 0; k < SUMS; k++) part[k] = _mm512_setzero_ps();
                for (int b = 0; b < SUMS * size * bytes && !r; b += 64) {
                    _mm_prefetch(keys + (t + TILE_TOKENS) * size * bytes + b, _MM_HINT_T1);
                    _mm_prefetch(values + (t + SUMS) * size * bytes + b, _MM_HINT_T1);
                }
                for (int v = 0; v < vectors; v++) {
                    const __mmask16 mask = v == vectors - 1 ? last : (__mmask16)0xffff;
                    const __m512 q = _mm512_maskz_loadu_ps(mask, query + v * LANES);
                    #pragma GCC unroll 4
                    for (int k = 0; k < SUMS; k++) part[k] = _mm512_fmadd_ps(q, LOAD(keys, at[k], v), part[k]);
                }
                const __m256 four = add_across(part[0], part[1], part[2], part[3]);
                const __m128 scores = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
                _mm_storeu_ps(weights + t, _mm_mul_ps(scores, _mm_set1_ps(block->scaling)));
            }
            for (int t = here.width; t < TILE_TOKENS; t++) weights[t] = -INFINITY;
            for (int t = 0; t < TILE_TOKENS; t += LANES) most = _mm512_max_ps(_mm512_load_ps(weights + t), most);
            const float top = _mm512_reduce_max_ps(most), factor = exponential(largest[r] - top);
            for (int t = 0; t < TILE_TOKENS; t++) weights[t] = exponential(weights[t] - top);
            for (int t = here.width; t < TILE_TOKENS; t++) weights[t] = 0;
            for (int t = 0; t < TILE_TOKENS; t += LANES) total = _mm512_add_ps(_mm512_load_ps(weights + t), total);
            sum[r] = sum[r] * factor + _mm512_reduce_add_ps(total);
            largest[r] = top;
            for (int v = 0; v < vectors; v += SUMS) {
                const int count = vectors - v < SUMS ? vectors - v : SUMS;
                __m512 part[SUMS];
                for (int k = 0; k < SUMS; k++)
                    part[k] = _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_load_ps(sums[r] + (v + k) * LANES));
                if (count == SUMS)
                    for (int t = 0; t < here.width; t++) {
                        const __m512 weight = _mm512_set1_ps(weights[t]);
                        #pragma GCC unroll 4
                        for (int k = 0; k < SUMS; k++)
                            part[k] = _mm512_fmadd_ps(weight, LOAD(values, t, v + k), part[k]);
                    }
                else
                    for (int t = 0; t < here.width; t++)
                        for (int k = 0; k < count; k++)
                            part[k] = _mm512_fmadd_ps(_mm512_set1_ps(weights[t]), LOAD(values, t, v + k), part[k]);
                for (int k = 0; k < count; k++) _mm512_store_ps(sums[r] + (v + k) * LANES, part[k]);
            }
        }
        token += here.width;
    }
    #undef LOAD
    for (int r = 0; r < span->heads; r++) {
        float *to = span->result + r * result_floats(block);
        memcpy(to, sums[r], (size_t)size * sizeof(float));
        to[size] = sum[r], to[size + 1] = largest[r];
    }
}
#endif

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
        load_rows(here.keys, block->cache_type, &here, size, step, tile);
        for (int t = 0; t < here.width; t += AT_ONCE)  /* past the end: tokens of the last tile, which get no weight */
            multiply(size, query, tile + t * step, 1, step, lanes.scores + t, 0);
        weigh(&lanes, here.width, step, block->scaling);
        for (int t = 0; t < here.width; t++)
            for (int l = 0; l < LANES; l++) lanes.sum[l] += lanes.scores[t][l];
        load_rows(here.values, block->cache_type, &here, size, step, tile);
        for (int i = 0; i < step; i += AT_ONCE) multiply(here.width, lanes.scores, tile + i, step, 1, lanes.sums + i, 1);
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

AVX512 static void many_avx512(const Tokens *tokens, const Block *block, const Span *span) {
    span_of_many(tokens, block, span, lanes_avx512);
}

/* As span_of_few, without a tile of floats in between. */
AVX512 static void few_avx512(const Tokens *tokens, const Block *block, const Span *span) {
    switch (block->cache_type) {
        case FLOAT16: stream_few(tokens, block, span, FLOAT16); break;
        case BFLOAT16: stream_few(tokens, block, span, BFLOAT16); break;
        default: stream_few(tokens, block, span, FLOAT32);
    }
}
#endif

#ifdef BF16
enum { BF16_DIMS = 32 };  /* head_dim is a multiple of it */

BF16 INLINE __m512 add_pairs(__m512 sum, __m512i many, const void *pair) {
    int32_t one;
    memcpy(&one, pair, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)many, (__m512bh)_mm512_set1_epi32(one));
}

/* Two rows of floats as pairs of bfloat16: the first in the lower halves of the lanes. */
BF16 INLINE __m512i make_pairs(__m512 first, __m512 second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* As span_of_many, with a cache in bfloat16 and an instruction that multiplies pairs of such numbers and adds them.
 * Queries and weights are rounded to bfloat16, as torch does. */
BF16 INLINE void many_pairs(const Tokens *tokens, const Block *block, const Span *span, int size) {
    enum { SUMS = 16 };  /* more than AT_ONCE: the instruction takes longer */
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    _Alignas(64) uint32_t query[MAX_HEAD / 2][LANES], weights[TILE_TOKENS / 2][LANES];
    _Alignas(64) uint32_t values[TILE_TOKENS / 2 * MAX_HEAD];  /* pairs of tokens */
    Lanes lanes;
    begin_lanes(&lanes, size);
    for (int i = 0; i < size; i += 2)
        for (int l = 0; l < LANES; l++) {
            const float *from = span->query + l * block->query_step + i;
            const int used = l < span->heads;
            query[i / 2][l] = used ? float_to_bfloat(from[0]) | (uint32_t)float_to_bfloat(from[1]) << 16 : 0;
        }
    __m512i low_pairs, high_pairs;  /* which of 32 numbers of one token and 32 of the next make up pairs */
    {
        uint16_t low[32], high[32];
        for (int i = 0; i < 32; i++) low[i] = (uint16_t)(i / 2 + i % 2 * 32), high[i] = (uint16_t)(low[i] + 16);
        low_pairs = _mm512_loadu_si512(low), high_pairs = _mm512_loadu_si512(high);
    }
    for (i64 token = span->from; token < span->to;) {
        const Tile here = tile_at(tokens, block, span, token);
        const int width = here.width, pairs = (width + 1) / 2;
        const uint16_t *keys = (const uint16_t *)here.keys + here.start;
        const uint16_t *rows = (const uint16_t *)here.values + here.start;
        for (int t = 0; t < width; t += SUMS) {
            const uint16_t *key[SUMS];
            __m512 sums[SUMS];
            for (int k = 0; k < SUMS; k++) {
                key[k] = keys + (t + k < width ? t + k : width - 1) * size;
                sums[k] = _mm512_setzero_ps();
                for (int i = 0; i < size; i += 32) {
                    _mm_prefetch((const char *)(key[k] + TILE_TOKENS * size + i), _MM_HINT_T1);
                    _mm_prefetch((const char *)(rows + (t + k + SUMS) * size + i), _MM_HINT_T1);
                }
            }
            for (int i = 0; i < size; i += 2) {
                const __m512i q = _mm512_load_si512(query[i / 2]);
                #pragma GCC unroll 16
                for (int k = 0; k < SUMS; k++) sums[k] = add_pairs(sums[k], q, key[k] + i);
            }
            for (int k = 0; k < SUMS; k++) _mm512_store_ps(lanes.scores[t + k], sums[k]);
        }
        weigh(&lanes, width, size, block->scaling);
        __m512 sum = _mm512_loadu_ps(lanes.sum);
        for (int p = 0; p < pairs; p++) {
            const float *scores = lanes.scores[2 * p];
            const __m512i made = make_pairs(_mm512_load_ps(scores), _mm512_load_ps(scores + LANES));
            _mm512_store_si512(weights[p], made);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)made, (__m512bh)ones);  /* of what multiplies the values */
            const uint16_t *first = rows + 2 * p * size, *second = 2 * p + 1 < width ? first + size : first;
            for (int i = 0; i < size; i += 32) {
                const __m512i a = _mm512_loadu_si512(first + i), b = _mm512_loadu_si512(second + i);
                _mm512_store_si512(values + p * size + i, _mm512_permutex2var_epi16(a, low_pairs, b));
                _mm512_store_si512(values + p * size + i + 16, _mm512_permutex2var_epi16(a, high_pairs, b));
            }
        }
        _mm512_storeu_ps(lanes.sum, sum);
        for (int i = 0; i < size; i += SUMS) {
            __m512 sums[SUMS];
            for (int k = 0; k < SUMS; k++) sums[k] = _mm512_load_ps(lanes.sums[i + k]);
            for (int p = 0; p < pairs; p++) {
                const __m512i weight = _mm512_load_si512(weights[p]);
                #pragma GCC unroll 16
                for (int k = 0; k < SUMS; k++) sums[k] = add_pairs(sums[k], weight, values + p * size + i + k);
            }
            for (int k = 0; k < SUMS; k++) _mm512_store_ps(lanes.sums[i + k], sums[k]);
        }
        token += width;
    }
    end_lanes(&lanes, block, span);
}

BF16 static void many_bf16(const Tokens *tokens, const Block *block, const Span *span) {
    if (block->head_dim == 128) many_pairs(tokens, block, span, 128);  /* as in all models of this family */
    else many_pairs(tokens, block, span, (int)block->head_dim);
}
#endif

/* context (head_dim) of one head = what its spans found, the results of which are `step` floats apart. */
INLINE void merge_spans(const Block *block, const float *result, i64 count, i64 step, float *restrict context) {
    const i64 size = block->head_dim;
    float most = -INFINITY, sum = 0;
    for (i64 s = 0; s < count; s++) most = result[s * step + size + 1] > most ? result[s * step + size + 1] : most;
    memset(context, 0, (size_t)size * sizeof(float));
    for (i64 s = 0; s < count; s++) {
        const float *from = result + s * step, factor = exponential(from[size + 1] - most);
        sum += from[size] * factor;
        for (i64 i = 0; i < size; i++) context[i] += from[i] * factor;
    }
    for (i64 i = 0; i < size; i++) context[i] /= sum;
}

/* The spans of all rows. A row has the same number of them for each group of query heads. */
typedef struct { i64 sharing, groups, length; } SpanPlan;

static SpanPlan plan_spans(const Tokens *tokens, const Block *block, int threads) {
    SpanPlan plan = {.sharing = block->heads / block->kv_heads};
    i64 work = 0;
    plan.groups = block->kv_heads * ((plan.sharing + LANES - 1) / LANES);
    for (i64 r = 0; r < tokens->rows; r++) work += (tokens->prefix + tokens->past[r] + 1) * plan.groups;
    plan.length = work / (threads * SPANS) + 1;
    if (plan.length < SPAN_TOKENS) plan.length = SPAN_TOKENS;
    plan.length = (plan.length + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
    return plan;
}

INLINE i64 spans_of(const SpanPlan *plan, const Tokens *tokens, i64 row) {
    return (tokens->prefix + tokens->past[row] + plan->length) / plan->length;
}

static i64 count_spans(const SpanPlan *plan, const Tokens *tokens) {
    i64 count = 0;
    for (i64 r = 0; r < tokens->rows; r++) count += spans_of(plan, tokens, r) * plan->groups;
    return count;
}

/* Bytes of memory for the results of all spans. */
static i64 span_memory(const Tokens *tokens, const Block *block, int threads) {
    const SpanPlan plan = plan_spans(tokens, block, threads);
    return padded(count_spans(&plan, tokens) * LANES * result_floats(block) * (i64)sizeof(float));
}

/* Called by all threads of a team: context (rows, heads * head_dim) of all rows; fused (rows, fused_step) has the
 * queries. There is no barrier at the end. */
static void attend_cached(int isa, int threads, const Tokens *tokens, const Block *block, const float *fused,
                          i64 fused_step, float *context, float *memory, Meeting *meeting) {
    const SpanPlan plan = plan_spans(tokens, block, threads);
    const i64 step = LANES * result_floats(block), per_head = plan.groups / block->kv_heads;
    void (*few)(const Tokens *, const Block *, const Span *) = CHOOSE_AVX512(isa, few);
    void (*many)(const Tokens *, const Block *, const Span *) = CHOOSE_AVX512(isa, many);
#ifdef BF16
    const int fits = block->cache_type == BFLOAT16 && block->head_dim % BF16_DIMS == 0;
    if (isa == VNNI && fits && has_bf16()) many = many_bf16;
#endif
    #pragma omp for schedule(dynamic) nowait
    for (i64 i = 0; i < count_spans(&plan, tokens); i++) {
        i64 row = 0, at = i;
        while (at >= spans_of(&plan, tokens, row) * plan.groups) at -= spans_of(&plan, tokens, row++) * plan.groups;
        const i64 spans = spans_of(&plan, tokens, row), group = at / spans, from = at % spans * plan.length;
        const i64 all = tokens->prefix + tokens->past[row] + 1, kv_head = group / per_head;
        const i64 skipped = group % per_head * LANES, left = plan.sharing - skipped;
        const Span span = {.row = row, .kv_head = kv_head, .from = from,
                           .to = from + plan.length < all ? from + plan.length : all,
                           .heads = left < LANES ? (int)left : LANES,
                           .query = fused + row * fused_step + (kv_head * plan.sharing + skipped) * block->query_step,
                           .result = memory + i * step};
        (span.heads > FEW_HEADS ? many : few)(tokens, block, &span);
    }
    meet(meeting);
    #pragma omp for schedule(static) nowait
    for (i64 i = 0; i < tokens->rows * block->heads; i++) {
        const i64 row = i / block->heads, head = i % block->heads, own = head % plan.sharing;
        const i64 spans = spans_of(&plan, tokens, row);
        i64 first = (head / plan.sharing * per_head + own / LANES) * spans;
        for (i64 r = 0; r < row; r++) first += spans_of(&plan, tokens, r) * plan.groups;
        merge_spans(block, memory + first * step + own % LANES * result_floats(block), spans, step,
                    context + i * block->head_dim);
    }
}
