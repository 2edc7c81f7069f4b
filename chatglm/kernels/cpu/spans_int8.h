/* Attention of one token over a span of a cache of scaled bytes, with integer dot products (AVX-512 VNNI).
 *
 * Many heads: arithmetic limits, so queries become bytes with a step for each head; and so do the weights of a tile,
 * times the scales of their values. Few heads: memory limits, so both have 16 bits, as two planes of bytes. */
#pragma once

#include "spans_avx512.h"

#if X86
enum { QUERY_LEVELS16 = 32512, WEIGHT_LEVELS8 = 255, WEIGHT_LEVELS16 = 65535 };

/* Bytes of the tile in use. Values: four tokens of a dim are adjacent, dims are in the order of `dim_at`. */
typedef struct {
    _Alignas(64) char keys[TILE_TOKENS * MAX_HEAD];  /* with 128 added; only for many heads */
    char values[TILE_TOKENS * MAX_HEAD];
    float key_scales[TILE_TOKENS], value_scales[TILE_TOKENS];
    char rows[TILE_TOKENS * (MAX_HEAD + SCALE_BYTES)];  /* of a prefix */
} Bytes;

INLINE int dim_at(int place) { return (place & ~63) + (place >> 2 & 3) * 16 + (place >> 4 & 3) * 4 + (place & 3); }

INLINE __mmask64 bytes_left(int left) { return left < 64 ? (1ull << left) - 1 : ~0ull; }

/* The rows of a tile: those of the cache, or those of a prefix as scaled bytes. */
AVX512 INLINE const char *byte_rows(const void *from, const Tile *tile, int size, char *rows) {
    if (tile->type == SCALED_INT8) return (const char *)from + tile->start;
    for (int t = 0; t < tile->width; t++) {
        float row[MAX_HEAD];
        load_numbers(from, tile->type, tile->start + t * size, size, row);
        store_scaled(rows + t * (size + SCALE_BYTES), size, row);
    }
    return rows;
}

/* 64 bytes of a row with 128 added; zeros (that is, 128) past its end. */
AVX512 INLINE __m512i load_key(const char *row, int from, int size) {
    return make_unsigned(_mm512_maskz_loadu_epi8(bytes_left(size - from), row + from));
}

AVX512 INLINE void load_keys(const char *rows, int width, int size, int step, Bytes *to) {
    for (int t = 0; t < width; t++) {
        const char *row = rows + t * (size + SCALE_BYTES);
        to->key_scales[t] = scale_of(row, size);
        for (int i = 0; i < size; i += 64) {
            _mm512_store_si512(to->keys + t * step + i, load_key(row, i, size));
        }
    }
}

/* Returns 0, or NaN if a scale is. */
AVX512 INLINE float load_values(const char *rows, int width, int size, int step, Bytes *to) {
    float poison = 0;
    memset(to->value_scales, 0, sizeof to->value_scales);
    for (int t = 0; t < width; t += 4)
        for (int i = 0; i < size; i += 64) {
            __m512i four[4];
            for (int k = 0; k < 4; k++) {
                const char *row = rows + (t + k) * (size + SCALE_BYTES);
                four[k] = _mm512_setzero_si512();
                if (t + k < width) four[k] = _mm512_maskz_loadu_epi8(bytes_left(size - i), row + i);
                if (t + k >= width || i) continue;
                to->value_scales[t + k] = scale_of(row, size);
                poison += 0 * scale_of(row, size);
            }
            const __m512i low_a = _mm512_unpacklo_epi8(four[0], four[1]);
            const __m512i low_b = _mm512_unpacklo_epi8(four[2], four[3]);
            const __m512i high_a = _mm512_unpackhi_epi8(four[0], four[1]);
            const __m512i high_b = _mm512_unpackhi_epi8(four[2], four[3]);
            char *at = to->values + t * step + i * 4;
            _mm512_store_si512(at, _mm512_unpacklo_epi16(low_a, low_b));
            _mm512_store_si512(at + 64, _mm512_unpackhi_epi16(low_a, low_b));
            _mm512_store_si512(at + 128, _mm512_unpacklo_epi16(high_a, high_b));
            _mm512_store_si512(at + 192, _mm512_unpackhi_epi16(high_a, high_b));
        }
    return poison;
}

/* sum + four products of the unsigned bytes of each lane and four signed ones. */
AVX512 INLINE __m512i dot4_each(__m512i sum, __m512i many, const char *four) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(many), "m"(*(const int32_t (*)[1])four));
    return sum;
}

AVX512 INLINE __m512i broadcast4(const void *four) {
    int32_t one;
    memcpy(&one, four, 4);
    return _mm512_set1_epi32(one);
}

/* A lane is a query head. Scores are logarithms to base 2. */
AVX512 INLINE void many_bytes(const Tokens *tokens, const Block *block, const Span *span, const int size) {
    enum { SUMS = 16 };
    const int step = (size + 63) / 64 * 64, tile_bytes = TILE_TOKENS * (size + SCALE_BYTES);
    const int fetched = (tile_bytes + size - 1) / size;  /* in each loop, of the next tile: a burst would wait */
    _Alignas(64) char query[MAX_HEAD / 4][LANES][4] = {{{0}}}, weights[TILE_TOKENS / 4][LANES][4];
    _Alignas(64) float units[LANES] = {0};
    _Alignas(64) int32_t offsets[LANES] = {0};
    Bytes bytes;
    Lanes lanes;
    begin_lanes(&lanes, step);
    memset(bytes.keys, 0, (size_t)(TILE_TOKENS * step));
    memset(bytes.key_scales, 0, sizeof bytes.key_scales);
    for (int l = 0; l < span->heads; l++) {
        char row[MAX_HEAD + SCALE_BYTES];
        store_scaled(row, size, span->query + l * block->query_step);
        for (int i = 0; i < size; i++) offsets[l] -= 128 * (signed char)row[i];
        for (int i = 0; i < size; i += 4) memcpy(query[i / 4][l], row + i, 4);
        units[l] = scale_of(row, size) * block->scaling * LOG2_E;
    }
    const __m512i offset = _mm512_load_si512(offsets);
    const __m512 unit = _mm512_load_ps(units), none = _mm512_set1_ps(-INFINITY);
    __m512 largest = none, sum = _mm512_setzero_ps();
    for (i64 token = span->from; token < span->to;) {
        const Tile here = tile_at(tokens, block, span, token);
        const int width = here.width, quads = (width + 3) / 4;
        __m512 top = largest, most = _mm512_set1_ps(1e-30f);
        const char *rows = byte_rows(here.keys, &here, size, bytes.rows), *ahead = rows + tile_bytes;
        load_keys(rows, width, size, step, &bytes);
        for (int t = 0; t < width; t += SUMS) {
            __m512i sums[SUMS];
            const char *keys = bytes.keys + t * step;
            for (int k = 0; k < SUMS; k++) sums[k] = offset;
            for (int i = 0; i < size; i += 4) {
                const __m512i q = _mm512_load_si512(query[i / 4]);
                _mm_prefetch(ahead, _MM_HINT_T0);
                ahead += fetched;
                #pragma GCC unroll 16
                for (int k = 0; k < SUMS; k++) sums[k] = dot4(sums[k], broadcast4(keys + k * step + i), q);
            }
            #pragma GCC unroll 16
            for (int k = 0; k < SUMS; k++) {
                const __m512 scale = _mm512_mul_ps(unit, _mm512_set1_ps(bytes.key_scales[t + k]));
                const __m512 score = t + k < width ? _mm512_mul_ps(_mm512_cvtepi32_ps(sums[k]), scale) : none;
                top = _mm512_max_ps(score, top);
                _mm512_store_ps(lanes.scores[t + k], score);
            }
        }
        rows = byte_rows(here.values, &here, size, bytes.rows), ahead = rows + tile_bytes;
        const float poison = load_values(rows, width, size, step, &bytes);
        const __m512 factor = power_of_two(_mm512_sub_ps(largest, top));
        largest = top;
        sum = _mm512_fmadd_ps(sum, factor, _mm512_set1_ps(poison));
        for (int t = 0; t < 4 * quads; t++) {
            __m512 weight = power_of_two(_mm512_sub_ps(_mm512_load_ps(lanes.scores[t]), top));
            sum = _mm512_add_ps(sum, weight);
            weight = _mm512_mul_ps(weight, _mm512_set1_ps(bytes.value_scales[t]));
            most = _mm512_max_ps(weight, most);
            _mm512_store_ps(lanes.scores[t], weight);
        }
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(WEIGHT_LEVELS8), most);
        const __m512 worth = _mm512_mul_ps(most, _mm512_set1_ps(1.0f / WEIGHT_LEVELS8));
        for (int q = 0; q < quads; q++) {
            __m512i made = _mm512_setzero_si512();
            for (int k = 3; k >= 0; k--) {
                const __m512 weight = _mm512_mul_ps(_mm512_load_ps(lanes.scores[4 * q + k]), inverse);
                made = _mm512_or_si512(_mm512_slli_epi32(made, 8), _mm512_cvtps_epi32(weight));
            }
            _mm512_store_si512(weights[q], made);
        }
        for (int i = 0; i < step; i += SUMS) {
            __m512i sums[SUMS];
            for (int k = 0; k < SUMS; k++) sums[k] = _mm512_setzero_si512();
            for (int q = 0; q < quads; q++) {
                const __m512i weight = _mm512_load_si512(weights[q]);
                _mm_prefetch(ahead, _MM_HINT_T0);
                ahead += fetched;
                #pragma GCC unroll 16
                for (int k = 0; k < SUMS; k++)
                    sums[k] = dot4_each(sums[k], weight, bytes.values + (q * step + i + k) * 4);
            }
            for (int k = 0; k < SUMS; k++) {
                const __m512 before = _mm512_mul_ps(_mm512_load_ps(lanes.sums[i + k]), factor);
                _mm512_store_ps(lanes.sums[i + k], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[k]), worth, before));
            }
        }
        token += width;
    }
    _mm512_storeu_ps(lanes.sum, sum);
    _mm512_storeu_ps(lanes.largest, _mm512_mul_ps(largest, _mm512_set1_ps(LN_2)));
    for (int r = 0; r < span->heads; r++) {
        float *to = span->result + r * result_floats(block);
        for (int i = 0; i < step; i++)
            if (dim_at(i) < size) to[dim_at(i)] = lanes.sums[i][r];
        to[size] = lanes.sum[r], to[size + 1] = lanes.largest[r];
    }
}

AVX512 static void many_int8(const Tokens *tokens, const Block *block, const Span *span) {
    if (block->head_dim == 128) many_bytes(tokens, block, span, 128);  /* as in all models of this family */
    else many_bytes(tokens, block, span, (int)block->head_dim);
}

/* The sums of the lanes of four vectors. */
AVX512 INLINE __m128i add_integers(__m512i a, __m512i b, __m512i c, __m512i d) {
    #define HALVES(v) _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1))
    const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(HALVES(a), HALVES(b)),
                                           _mm256_hadd_epi32(HALVES(c), HALVES(d)));
    #undef HALVES
    return _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}

/* A lane is a dim, or a token. */
AVX512 static void few_int8(const Tokens *tokens, const Block *block, const Span *span) {
    const int size = (int)block->head_dim, step = (size + 63) / 64 * 64;
    _Alignas(64) char query[FEW_HEADS][2][MAX_HEAD] = {{{0}}}, weights[2][TILE_TOKENS];
    _Alignas(64) float sums[FEW_HEADS][MAX_HEAD] = {{0}}, scores[TILE_TOKENS];
    float unit[FEW_HEADS], largest[FEW_HEADS], sum[FEW_HEADS];
    int32_t offset[FEW_HEADS];
    Bytes bytes;
    for (int r = 0; r < span->heads; r++) {
        const float *from = span->query + r * block->query_step;
        float most = 0;
        int32_t total = 0;
        for (int i = 0; i < size; i++) most = fabsf(from[i]) > most ? fabsf(from[i]) : most;
        const float inverse = most > 1e-33f ? QUERY_LEVELS16 / most : 0;
        for (int i = 0; i < size; i++) {
            const int32_t q = (int16_t)float_to_bits(from[i] * inverse + 12582912.0f), high = (q + 128) >> 8;
            query[r][0][i] = (char)high, query[r][1][i] = (char)(q - 256 * high);
            total += q;
        }
        offset[r] = 128 * total;
        unit[r] = most / QUERY_LEVELS16 * block->scaling * LOG2_E;
        for (int i = 0; i < size; i++) unit[r] += 0 * from[i];  /* NaN stays NaN */
        largest[r] = -INFINITY, sum[r] = 0;
    }
    for (i64 token = span->from; token < span->to;) {
        const Tile here = tile_at(tokens, block, span, token);
        const int width = here.width, quads = (width + 3) / 4, row_bytes = size + SCALE_BYTES;
        __m512 results[FEW_HEADS][TILE_TOKENS / LANES];
        const char *keys = byte_rows(here.keys, &here, size, bytes.rows);
        const char *values = (const char *)here.values + here.start;  /* to prefetch */
        memset(bytes.key_scales, 0, sizeof bytes.key_scales);
        for (int t = 0; t < width; t++) bytes.key_scales[t] = scale_of(keys + t * row_bytes, size);
        for (int r = 0; r < span->heads; r++) {
            for (int t = 0; t < width; t += 4) {
                __m512i four[4];
                for (int k = 0; k < 4; k++) {
                    const char *row = keys + (t + k < width ? t + k : width - 1) * row_bytes;
                    __m512i high = _mm512_setzero_si512(), low = high;
                    for (int i = 0; i < size; i += 64) {
                        if (!r) _mm_prefetch(row + TILE_TOKENS * row_bytes + i, _MM_HINT_T1);
                        if (!r) _mm_prefetch(values + (t + k) * row_bytes + i, _MM_HINT_T1);
                        const __m512i key = load_key(row, i, size);
                        high = dot4(high, key, _mm512_load_si512(query[r][0] + i));
                        low = dot4(low, key, _mm512_load_si512(query[r][1] + i));
                    }
                    four[k] = _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
                }
                const __m128i whole = _mm_sub_epi32(add_integers(four[0], four[1], four[2], four[3]),
                                                    _mm_set1_epi32(offset[r]));
                _mm_store_ps(scores + t, _mm_mul_ps(_mm_cvtepi32_ps(whole), _mm_set1_ps(unit[r])));
            }
            for (int v = 0; v < TILE_TOKENS / LANES; v++) {
                const int left = width - v * LANES;
                const __mmask16 used = left >= LANES ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
                const __m512 scales = _mm512_loadu_ps(bytes.key_scales + v * LANES);
                results[r][v] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), used,
                                                   _mm512_load_ps(scores + v * LANES), scales);
            }
        }
        const float poison = load_values(byte_rows(here.values, &here, size, bytes.rows), width, size, step, &bytes);
        for (int r = 0; r < span->heads; r++) {
            __m512 top = _mm512_set1_ps(largest[r]), total = _mm512_setzero_ps(), most = _mm512_set1_ps(1e-30f);
            for (int v = 0; v < TILE_TOKENS / LANES; v++) top = _mm512_max_ps(results[r][v], top);
            top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
            for (int v = 0; v < TILE_TOKENS / LANES; v++) {
                const __m512 weight = power_of_two(_mm512_sub_ps(results[r][v], top));
                total = _mm512_add_ps(total, weight);
                results[r][v] = _mm512_mul_ps(weight, _mm512_loadu_ps(bytes.value_scales + v * LANES));
                most = _mm512_max_ps(results[r][v], most);
            }
            const float largest_weight = _mm512_reduce_max_ps(most);
            const __m512 factor = power_of_two(_mm512_sub_ps(_mm512_set1_ps(largest[r]), top));
            const __m512 worth = _mm512_set1_ps(largest_weight / WEIGHT_LEVELS16);
            for (int v = 0; v < TILE_TOKENS / LANES; v++) {
                const __m512 inverse = _mm512_set1_ps(WEIGHT_LEVELS16 / largest_weight);
                const __m512i made = _mm512_cvtps_epi32(_mm512_mul_ps(results[r][v], inverse));
                _mm_store_si128((__m128i *)(weights[0] + v * LANES), _mm512_cvtepi32_epi8(_mm512_srli_epi32(made, 8)));
                _mm_store_si128((__m128i *)(weights[1] + v * LANES), _mm512_cvtepi32_epi8(made));
            }
            sum[r] = sum[r] * _mm512_cvtss_f32(factor) + _mm512_reduce_add_ps(total) + poison;
            largest[r] = _mm512_cvtss_f32(top);
            for (int i = 0; i < step; i += 64) {
                __m512i high[4], low[4];
                for (int k = 0; k < 4; k++) high[k] = low[k] = _mm512_setzero_si512();
                for (int q = 0; q < quads; q++) {
                    const __m512i first = broadcast4(weights[0] + 4 * q), second = broadcast4(weights[1] + 4 * q);
                    #pragma GCC unroll 4
                    for (int k = 0; k < 4; k++) {
                        const __m512i value = _mm512_load_si512(bytes.values + (q * step + i + k * LANES) * 4);
                        high[k] = dot4(high[k], first, value), low[k] = dot4(low[k], second, value);
                    }
                }
                for (int k = 0; k < 4; k++) {
                    const __m512i whole = _mm512_add_epi32(low[k], _mm512_slli_epi32(high[k], 8));
                    float *to = sums[r] + i + k * LANES;
                    const __m512 before = _mm512_mul_ps(_mm512_load_ps(to), factor);
                    _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), worth, before));
                }
            }
        }
        token += width;
    }
    for (int r = 0; r < span->heads; r++) {
        float *to = span->result + r * result_floats(block);
        for (int i = 0; i < step; i++)
            if (dim_at(i) < size) to[dim_at(i)] = sums[r][i];
        to[size] = sum[r], to[size + 1] = largest[r] * LN_2;
    }
}
#endif
