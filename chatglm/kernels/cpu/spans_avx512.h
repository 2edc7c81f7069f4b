/* Attention of one token over a span of cached tokens, with AVX-512. */
#pragma once

#include "spans_any.h"

#if X86
/* 2^x, for x up to 0, relative error 5e-5; NaN stays NaN. */
AVX512 INLINE __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 power = _mm512_set1_ps(9.6181291e-3f);
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(5.5504109e-2f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.4022651e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.9314718e-1f));
    power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
}

static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

/* As span_of_few, without a tile of floats in between. Each loop prefetches a part of the next tile: the CPU has few
 * places for lines that are on their way, and a burst waits for them. */
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
                __m512 part[SUMS];
                const int end = here.width - 1;
                int at[SUMS];
                for (int k = 0; k < SUMS; k++) at[k] = t + k < end ? t + k : end, part[k] = _mm512_setzero_ps();
                for (int v = 0; v < vectors; v++) {
                    const __mmask16 mask = v == vectors - 1 ? last : (__mmask16)0xffff;
                    const __m512 q = _mm512_maskz_loadu_ps(mask, query + v * LANES);
                    for (int b = 0; b < SUMS * LANES * bytes && !r; b += 64)
                        _mm_prefetch(keys + ((t + TILE_TOKENS) * size + v * SUMS * LANES) * bytes + b, _MM_HINT_T1);
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
                        const int at = (v * TILE_TOKENS + t * SUMS) * LANES;
                        for (int b = 0; b < SUMS * LANES * bytes && !r; b += 64)
                            _mm_prefetch(values + (TILE_TOKENS * size + at) * bytes + b, _MM_HINT_T1);
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
    const __m512 unit = _mm512_set1_ps(block->scaling * LOG2_E);
    __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
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
        __m512 top = largest;
        for (int t = 0; t < width; t += SUMS) {
            const uint16_t *key[SUMS];
            __m512 sums[SUMS];
            for (int k = 0; k < SUMS; k++) {
                key[k] = keys + (t + k < width ? t + k : width - 1) * size;
                sums[k] = _mm512_setzero_ps();
            }
            for (int i = 0; i < size; i += 2) {
                const __m512i q = _mm512_load_si512(query[i / 2]);
                _mm_prefetch((const char *)(keys + (t + TILE_TOKENS) * size + i * LANES), _MM_HINT_T1);
                #pragma GCC unroll 16
                for (int k = 0; k < SUMS; k++) sums[k] = add_pairs(sums[k], q, key[k] + i);
            }
            #pragma GCC unroll 16
            for (int k = 0; k < SUMS; k++) {
                const __m512 score = _mm512_mul_ps(sums[k], unit);
                top = _mm512_max_ps(score, top);
                _mm512_store_ps(lanes.scores[t + k], score);
            }
        }
        const __m512 factor = power_of_two(_mm512_sub_ps(largest, top));
        largest = top;
        sum = _mm512_mul_ps(sum, factor);
        for (int p = 0; p < pairs; p++) {
            const float *scores = lanes.scores[2 * p];
            const __m512 even = power_of_two(_mm512_sub_ps(_mm512_load_ps(scores), top));
            __m512 odd = power_of_two(_mm512_sub_ps(_mm512_load_ps(scores + LANES), top));
            if (2 * p + 1 == width) odd = _mm512_setzero_ps();
            const __m512i made = make_pairs(even, odd);
            _mm512_store_si512(weights[p], made);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)made, (__m512bh)ones);  /* of what multiplies the values */
            const uint16_t *first = rows + 2 * p * size, *second = 2 * p + 1 < width ? first + size : first;
            for (int i = 0; i < size; i += 32) {
                const __m512i a = _mm512_loadu_si512(first + i), b = _mm512_loadu_si512(second + i);
                _mm512_store_si512(values + p * size + i, _mm512_permutex2var_epi16(a, low_pairs, b));
                _mm512_store_si512(values + p * size + i + 16, _mm512_permutex2var_epi16(a, high_pairs, b));
            }
        }
        for (int i = 0; i < size; i += SUMS) {
            const char *ahead = (const char *)(rows + (TILE_TOKENS * size + i * TILE_TOKENS));
            __m512 sums[SUMS];
            for (int k = 0; k < SUMS; k++) sums[k] = _mm512_mul_ps(_mm512_load_ps(lanes.sums[i + k]), factor);
            for (int p = 0; p < pairs; p++) {
                const __m512i weight = _mm512_load_si512(weights[p]);
                _mm_prefetch(ahead + p * 64, _MM_HINT_T1);
                #pragma GCC unroll 16
                for (int k = 0; k < SUMS; k++) sums[k] = add_pairs(sums[k], weight, values + p * size + i + k);
            }
            for (int k = 0; k < SUMS; k++) _mm512_store_ps(lanes.sums[i + k], sums[k]);
        }
        token += width;
    }
    _mm512_storeu_ps(lanes.sum, sum);
    _mm512_storeu_ps(lanes.largest, _mm512_mul_ps(largest, _mm512_set1_ps(LN_2)));
    end_lanes(&lanes, block, span);
}

BF16 static void many_bf16(const Tokens *tokens, const Block *block, const Span *span) {
    if (block->head_dim == 128) many_pairs(tokens, block, span, 128);  /* as in all models of this family */
    else many_pairs(tokens, block, span, (int)block->head_dim);
}
#endif
