/* Dot products with AVX-512 along one linear stream of weights, for up to DOT_ROWS rows of x.
 *
 * VNNI multiplies unsigned by signed bytes. So an offset (8 or 128) makes weights unsigned, and its share of the sum
 * follows from the activations; 16-bit activations are split into two planes of bytes, q = 256 * high + low. */
#pragma once

#include "product.h"

enum { DOT_ROWS = 4, DOT_BYTES = 32768 };  /* limits of x for one call: it has to stay in the L1 cache */

#if X86
/* One group of activations as floats. */
AVX512 INLINE void load_group(const Job *job, i64 group, i64 row, __m512 *x) {
    const i64 start = group * GROUP, left = job->in - start, from = row * job->in + start;
    for (int v = 0; v < GROUP / 16; v++) {
        __mmask16 mask = left >= v * 16 + 16 ? 0xffff : left <= v * 16 ? 0 : (__mmask16)((1u << (left - v * 16)) - 1);
        if (job->x_type == FLOAT32) x[v] = _mm512_maskz_loadu_ps(mask, (const float *)job->x + from + v * 16);
        else x[v] = load_floats((const uint16_t *)job->x + from + v * 16, job->x_type, mask);
    }
}

/* Reads a run of `share` groups of activations and writes their blocks of byte planes: low bytes last; for INT4 even
 * columns before odd ones. The groups get the same step if that costs at most one bit of precision. */
AVX512 static void prepare_vnni(const Job *job, i64 run, i64 row) {
    enum { VECTORS = GROUP / 16 };
    enum { NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    const i64 first = run * job->share, left = job->groups - first, count = left < job->share ? left : job->share;
    uint32_t magnitudes[SHARE], largest = 0, smallest = UINT32_MAX;
    __m512i words[VECTORS / 2];
    __m512 x[VECTORS];
    for (i64 g = 0; g < count; g++) {
        __m512i magnitude = _mm512_setzero_si512();
        load_group(job, first + g, row, x);
        for (int v = 0; v < VECTORS; v++)
            magnitude = _mm512_max_epu32(magnitude, _mm512_castps_si512(_mm512_abs_ps(x[v])));
        magnitudes[g] = _mm512_reduce_max_epu32(magnitude);
        largest = magnitudes[g] > largest ? magnitudes[g] : largest;
        smallest = magnitudes[g] < smallest ? magnitudes[g] : smallest;
    }
    const int even = can_share(largest, smallest);
    for (i64 g = 0; g < count; g++) {
        const Step step = find_step(even ? largest : magnitudes[g], job->levels);
        const __m512 inverse = _mm512_set1_ps(step.inverse);
        const i64 index = (first + g) * job->rows + row;
        __m512i total = _mm512_setzero_si512();
        if (count > 1) load_group(job, first + g, row, x);
        for (int v = 0; v < VECTORS; v += 2) {
            const __m512i q = _mm512_cvt_roundps_epi32(_mm512_mul_ps(x[v], inverse), NEAREST);
            const __m512i r = _mm512_cvt_roundps_epi32(_mm512_mul_ps(x[v + 1], inverse), NEAREST);
            total = _mm512_add_epi32(total, _mm512_add_epi32(q, r));
            words[v / 2] = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(q));
            words[v / 2] = _mm512_inserti64x4(words[v / 2], _mm512_cvtepi32_epi16(r), 1);
        }
        job->step[index] = step.size;
        job->total[index] = _mm512_reduce_add_epi32(total) * (job->bits == 4 ? 8 : 128);
        char *to = block_of(job, first + g, row);
        for (int plane = job->levels == LEVELS16 ? 0 : 1; plane < 2; plane++, to += GROUP)
            for (int v = 0; v < VECTORS / 2; v++) {
                __m512i w = plane ? words[v] : _mm512_srai_epi16(_mm512_add_epi16(words[v], _mm512_set1_epi16(128)), 8);
                if (job->bits == 4) {
                    _mm_storeu_si128((__m128i *)(to + v * 16), _mm512_cvtepi32_epi8(w));
                    w = _mm512_srli_epi32(w, 16);
                    _mm_storeu_si128((__m128i *)(to + v * 16 + GROUP / 2), _mm512_cvtepi32_epi8(w));
                } else {
                    _mm256_storeu_si256((__m256i *)(to + v * 32), _mm512_cvtepi16_epi8(w));
                }
            }
    }
}

/* sum + four products of unsigned and signed bytes in each lane. With the intrinsic, GCC 12 keeps copying the sums; where
 * a register or memory may be given, Clang stores the register first. */
AVX512 INLINE __m512i dot4(__m512i sum, __m512i weight, __m512i x) {
#ifdef __clang__
    return _mm512_dpbusd_epi32(sum, weight, x);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "vm"(x));
    return sum;
#endif
}

/* 64 bytes of weights, loaded once: GCC would load them a second time rather than keep them. */
AVX512 INLINE __m512i load_weights(const void *weight) {
    __m512i packed = _mm512_loadu_si512(weight);
    __asm__("" : "+v"(packed));
    return packed;
}

/* Weights as unsigned bytes, an offset of 8 (INT4) or 128 (INT8) added. 0x6c: (packed & low) ^ offset. */
AVX512 INLINE __m512i odd_columns(__m512i packed) {
    return _mm512_ternarylogic_epi32(packed, _mm512_set1_epi8(8), _mm512_set1_epi8(15), 0x6c);
}

AVX512 INLINE __m512i even_columns(__m512i packed) { return odd_columns(_mm512_srli_epi16(packed, 4)); }

AVX512 INLINE __m512i make_unsigned(__m512i weight) { return _mm512_xor_si512(weight, _mm512_set1_epi8(-128)); }

/* sums (count) += one group of an output. */
AVX512 INLINE void dot_group(const Job *job, const uint8_t *weight, i64 group, int count, int bits, int planes,
                             __m512 *sums) {
    const __m512i packed = load_weights(weight);
    const __m512i before = bits == 4 ? even_columns(packed) : make_unsigned(packed);
    const __m512i after = bits == 4 ? odd_columns(packed) : make_unsigned(load_weights(weight + 64));
    i64 index = group * count;
    const char *x = job->blocks + index * (GROUP * planes);
    for (int r = 0; r < count; r++, index++, x += GROUP * planes) {
        __m512i sum = dot4(_mm512_setzero_si512(), before, _mm512_loadu_si512(x));
        sum = dot4(sum, after, _mm512_loadu_si512(x + 64));
        if (planes == 2) {
            __m512i low = dot4(_mm512_setzero_si512(), before, _mm512_loadu_si512(x + GROUP));
            low = dot4(low, after, _mm512_loadu_si512(x + GROUP + 64));
            sum = _mm512_add_epi32(low, _mm512_slli_epi32(sum, 8));
        }
        sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(job->step[index]), sums[r]);
    }
}

/* Outputs from..to of all `count` rows of x: a linear stream through the weights, or through parts of their rows. */
AVX512 INLINE void dot_rows(const Job *job, i64 from, i64 to, int count, int bits, int planes) {
    const i64 size = GROUP * bits / 8, whole = job->row_bytes / size;
    const Stream stream = plan_stream(job);
    double excess[DOT_ROWS];
    find_excess(job, excess);
    for (; from < to; from += PART_OUTS) {
        const i64 outs = to - from < PART_OUTS ? to - from : PART_OUTS;
        float y[PART_OUTS][DOT_ROWS] = {0};
        for (i64 first = 0; first < job->groups; first += stream.part) {
            const i64 last = first + stream.part < job->groups ? first + stream.part : job->groups;
            for (i64 o = 0; o < outs; o++) {
                const uint8_t *weight = job->weight + (from + o) * job->row_bytes + first * size;
                __m512 sums[DOT_ROWS];
                for (int r = 0; r < count; r++) sums[r] = _mm512_setzero_ps();
                for (i64 g = first; g < (last < whole ? last : whole); g++, weight += size) {
                    fetch(weight, size, stream.place, stream.ahead, stream.every);
                    dot_group(job, weight, g, count, bits, planes, sums);
                }
                if (whole < last) {
                    uint8_t padded[GROUP] = {0};
                    memcpy(padded, weight, (size_t)bytes_in_group(job, whole));
                    dot_group(job, padded, whole, count, bits, planes, sums);
                }
                for (int r = 0; r < count; r++) y[o][r] += _mm512_reduce_add_ps(sums[r]);
            }
        }
        for (i64 o = 0; o < outs; o++) {
            const float scale = load_number(job->scale, job->scale_type, from + o);
            for (int r = 0; r < count; r++)
                store_number(job->y, job->x_type, r * job->out + from + o,
                             (float)((double)y[o][r] - excess[r]) * scale);
        }
    }
}

/* Sums of the lanes of four vectors: of their lower halves in the first four lanes, of the upper ones in the last. */
AVX512 INLINE __m256 add_across(__m512 a, __m512 b, __m512 c, __m512 d) {
    #define HALVES(v) _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))
    return _mm256_hadd_ps(_mm256_hadd_ps(HALVES(a), HALVES(b)), _mm256_hadd_ps(HALVES(c), HALVES(d)));
    #undef HALVES
}

/* sums (outs) += one group of `outs` outputs of INT4 weights: activations are loaded once for all of them. */
AVX512 INLINE void dot_group_outputs(const Job *job, const uint8_t *const *weight, i64 group, const int outs,
                                     const int planes, i64 ahead, __m512 *sums) {
    const __m512i *x = (const __m512i *)(job->blocks + group * GROUP * planes);
    __m512i one = x[0], two = x[1], three = x[2 * planes - 2], four = x[2 * planes - 1];
    __asm__("" : "+v"(one), "+v"(two), "+v"(three), "+v"(four));  /* loaded here, not by each product */
    const __m512 step = _mm512_set1_ps(job->step[group]);
    #pragma GCC unroll 8
    for (int o = 0; o < outs; o++) {
        _mm_prefetch((const char *)weight[o] + ahead, _MM_HINT_T1);
        const __m512i packed = load_weights(weight[o]), even = even_columns(packed), odd = odd_columns(packed);
        __m512i sum = dot4(dot4(_mm512_setzero_si512(), even, one), odd, two);
        if (planes == 2) {
            const __m512i low = dot4(dot4(_mm512_setzero_si512(), even, three), odd, four);
            sum = _mm512_add_epi32(low, _mm512_slli_epi32(sum, 8));
        }
        sums[o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, sums[o]);
    }
}

enum { MOST_OUTS = 8 };

/* Outputs from..to of one row of x with INT4 weights, `most` at a time: if the activations fill the L1 cache, loading
 * them once for several outputs is faster than one linear stream. */
AVX512 INLINE void dot_outputs(const Job *job, i64 from, i64 to, const int most, const int planes) {
    enum { SIZE = GROUP / 2 };
    const i64 whole = job->row_bytes / SIZE, rows = most * job->row_bytes;
    const i64 ahead = (AHEAD + rows - 1) / rows * rows;
    double excess;
    find_excess(job, &excess);
    for (; from < to; from += most) {
        const i64 outs = to - from < most ? to - from : most;
        const uint8_t *weight[MOST_OUTS];
        __m512 sums[MOST_OUTS];
        for (int o = 0; o < most; o++) weight[o] = job->weight + (from + (o < outs ? o : 0)) * job->row_bytes;
        for (int o = 0; o < most; o++) sums[o] = _mm512_setzero_ps();
        for (i64 g = 0; g < whole; g++) {
            dot_group_outputs(job, weight, g, most, planes, ahead, sums);
            #pragma GCC unroll 8
            for (int o = 0; o < most; o++) weight[o] += SIZE;
        }
        if (whole < job->groups) {
            uint8_t padded[MOST_OUTS][SIZE] = {0};
            for (int o = 0; o < most; o++)
                weight[o] = memcpy(padded[o], weight[o], (size_t)bytes_in_group(job, whole));
            dot_group_outputs(job, weight, whole, most, planes, 0, sums);
        }
        for (i64 o = 0; o < outs; o++) {
            const float scale = load_number(job->scale, job->scale_type, from + o);
            const double sum = _mm512_reduce_add_ps(sums[o]);
            store_number(job->y, job->x_type, from + o, (float)(sum - excess) * scale);
        }
    }
}

/* In numbers for Zen 4: with 8-bit activations, a row of 4096 is faster as a linear stream, a row of 13696 is not. */
enum { OUTPUTS_BYTES = 8192 };

AVX512 static void dot_vnni(const Job *job, i64 from, i64 to) {
    int planes = job->levels == LEVELS16 ? 2 : 1;
    if (job->rows == 1 && job->bits == 4 && fetching == TO_L2 && job->groups * GROUP > OUTPUTS_BYTES) {
        if (planes == 2) dot_outputs(job, from, to, 4, 2);
        else dot_outputs(job, from, to, 8, 1);
        return;
    }
    #define CASE(c) case c: \
        if (job->bits == 4 && planes == 2) dot_rows(job, from, to, c, 4, 2); \
        else if (job->bits == 4) dot_rows(job, from, to, c, 4, 1); \
        else if (planes == 2) dot_rows(job, from, to, c, 8, 2); \
        else dot_rows(job, from, to, c, 8, 1); \
        break;
    switch (job->rows) { CASE(1) CASE(2) CASE(3) CASE(4) }
    #undef CASE
}

/* The same with floats, for `exact`. INT4: a table has the value of each nibble. */
AVX512 static void prepare_floats(const Job *job, i64 group, i64 row) {
    if (job->bits == 4) prepare_group(job, group, row, 8);
    else prepare_group(job, group, row, 1);
}

AVX512 INLINE void dot_group_floats(const Job *job, const uint8_t *weight, i64 group, int count, int bits,
                                    __m512 (*sums)[2]) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m512i packed = _mm512_loadu_si512(weight);
    const float *x = (const float *)block_of(job, group, 0);
    for (int i = 0; i < GROUP / 16; i++) {
        __m512 w;
        if (bits == 4) w = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, i * 4 ^ 4), values);  /* high nibble first */
        else w = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(weight + i * 16))));
        for (int r = 0; r < count; r++)
            sums[r][i & 1] = _mm512_fmadd_ps(w, _mm512_load_ps(x + r * GROUP + i * 16), sums[r][i & 1]);
    }
}

AVX512 INLINE void dot_rows_floats(const Job *job, i64 from, i64 to, int count, int bits) {
    const i64 size = GROUP * bits / 8, whole = job->row_bytes / size;
    const int place = fetching;
    for (i64 o = from; o < to; o++) {
        const uint8_t *weight = job->weight + o * job->row_bytes;
        __m512 sums[DOT_ROWS][2];
        for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (i64 g = 0; g < whole; g++, weight += size) {
            fetch(weight, size, place, AHEAD, 1);
            dot_group_floats(job, weight, g, count, bits, sums);
        }
        if (whole < job->groups) {
            uint8_t padded[GROUP] = {0};
            memcpy(padded, weight, (size_t)bytes_in_group(job, whole));
            dot_group_floats(job, padded, whole, count, bits, sums);
        }
        float scale = load_number(job->scale, job->scale_type, o);
        for (int r = 0; r < count; r++)
            store_number(job->y, job->x_type, r * job->out + o,
                         _mm512_reduce_add_ps(_mm512_add_ps(sums[r][0], sums[r][1])) * scale);
    }
}

AVX512 static void dot_floats_avx512(const Job *job, i64 from, i64 to) {
    #define CASE(c) case c: \
        if (job->bits == 4) dot_rows_floats(job, from, to, c, 4); \
        else dot_rows_floats(job, from, to, c, 8); \
        break;
    switch (job->rows) { CASE(1) CASE(2) CASE(3) CASE(4) }
    #undef CASE
}
#endif
