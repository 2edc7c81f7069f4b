/* Products with AVX2 for one row of x: one linear stream through the weights, or through parts of their rows.
 *
 * INT4: as with VNNI (products_dots.h), weights become unsigned and 16-bit activations two planes of bytes; but the
 * products of bytes are first summed in 16 bits, which hold those of two groups. INT8: products of 16-bit numbers. */
#pragma once

#include "product.h"

#if X86
/* Reads a run of `share` groups of activations and writes their blocks of byte planes, as prepare_vnni does. */
AVX2 static void prepare_planes(const Job *job, i64 run, i64 row) {
    const i64 first = run * job->share, left = job->groups - first, count = left < job->share ? left : job->share;
    float x[SHARE][GROUP] = {0};
    uint32_t magnitudes[SHARE], largest = 0, smallest = UINT32_MAX;
    for (i64 g = 0; g < count; g++) {
        const i64 start = (first + g) * GROUP, rest = job->in - start;
        load_numbers(job->x, job->x_type, row * job->in + start, rest < GROUP ? (int)rest : GROUP, x[g]);
        magnitudes[g] = largest_magnitude(x[g]);
        largest = magnitudes[g] > largest ? magnitudes[g] : largest;
        smallest = magnitudes[g] < smallest ? magnitudes[g] : smallest;
    }
    const int even = can_share(largest, smallest);
    for (i64 g = 0; g < count; g++) {
        const Step step = find_step(even ? largest : magnitudes[g], job->levels);
        const i64 index = (first + g) * job->rows + row;
        int16_t q[GROUP];
        int32_t total = 0;
        round_group(x[g], step, q);
        for (int i = 0; i < GROUP; i++) total += q[i];
        job->step[index] = step.size;
        job->total[index] = total * 8;
        char *to = block_of(job, first + g, row);
        if (job->levels == LEVELS16) {
            FOR_COLUMNS(2, p, c) to[p] = (char)((q[c] + 128) >> 8);
            to += GROUP;
        }
        FOR_COLUMNS(2, p, c) to[p] = (char)q[c];
    }
}

/* sum += `groups` <= 2 groups, from `weight` and `x` on, of INT4 weights. */
AVX2 INLINE __m256i add_bytes(__m256i sum, const uint8_t *weight, const char *x, int groups, int planes,
                               const Stream *stream) {
    const __m256i offset = _mm256_set1_epi8((char)0x88), nibble = _mm256_set1_epi8(15);
    __m256i low = _mm256_setzero_si256(), high = low;
    for (int g = 0; g < groups; g++, weight += 64) {
        fetch(weight, 64, stream->place, stream->ahead, stream->every);
        for (int half = 0; half < 64; half += 32) {
            const __m256i packed = _mm256_xor_si256(_mm256_loadu_si256((const void *)(weight + half)), offset);
            const __m256i even = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
            const __m256i odd = _mm256_and_si256(packed, nibble);
            #define PRODUCTS(part, at) _mm256_maddubs_epi16(part, _mm256_loadu_si256((const void *)(at)))
            if (planes == 2) {
                high = _mm256_add_epi16(high, PRODUCTS(even, x + half));
                high = _mm256_add_epi16(high, PRODUCTS(odd, x + half + 64));
            }
            low = _mm256_add_epi16(low, PRODUCTS(even, x + half + GROUP * (planes - 1)));
            low = _mm256_add_epi16(low, PRODUCTS(odd, x + half + GROUP * (planes - 1) + 64));
            #undef PRODUCTS
        }
        x += GROUP * planes;
    }
    if (planes == 2) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(256)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
}

/* sum += one group of INT8 weights. */
AVX2 INLINE __m256i add_words(__m256i sum, const uint8_t *weight, const char *x, const Stream *stream) {
    __m256i other = _mm256_setzero_si256();
    fetch(weight, GROUP, stream->place, stream->ahead, stream->every);
    for (int i = 0; i < GROUP; i += 32) {
        const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(weight + i)));
        const __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(weight + i + 16)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(first, _mm256_loadu_si256((const void *)(x + 2 * i))));
        other = _mm256_add_epi32(other, _mm256_madd_epi16(second, _mm256_loadu_si256((const void *)(x + 2 * i + 32))));
    }
    return _mm256_add_epi32(sum, other);
}

AVX2 INLINE float add_lanes(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* Outputs from..to of one row of x. */
AVX2 INLINE void one_row(const Job *job, i64 from, i64 to, int bits, int planes) {
    const i64 size = GROUP * bits / 8, whole = job->row_bytes / size;
    const Stream stream = plan_stream(job);
    const i64 sharing = planes == 2 && job->share == SHARE ? whole / SHARE * SHARE : 0;  /* groups in whole runs */
    double excess = 0;
    uint8_t even[MOST_RUNS];
    for (i64 g = 0; g < sharing; g += SHARE) even[g / SHARE] = (uint8_t)is_even(job, g / SHARE, 0, 1);
    if (bits == 4) find_excess(job, &excess);
    for (; from < to; from += PART_OUTS) {
        const i64 outs = to - from < PART_OUTS ? to - from : PART_OUTS;
        float y[PART_OUTS] = {0};
        for (i64 first = 0; first < job->groups; first += stream.part) {
            const i64 last = first + stream.part < job->groups ? first + stream.part : job->groups;
            for (i64 o = 0; o < outs; o++) {
                const uint8_t *weight = job->weight + (from + o) * job->row_bytes + first * size;
                const char *x = job->blocks + first * job->block_bytes;
                uint8_t padded[GROUP] = {0};
                __m256 total = _mm256_setzero_ps();
                for (i64 g = first, groups; g < last; g += groups) {
                    __m256i sum = _mm256_setzero_si256();
                    groups = g < sharing && g % SHARE == 0 && even[g / SHARE] ? SHARE : 1;
                    if (g == whole) weight = memcpy(padded, weight, (size_t)bytes_in_group(job, g));
                    if (bits == 8) sum = add_words(sum, weight, x, &stream);
                    else if (groups == 1) sum = add_bytes(sum, weight, x, 1, planes, &stream);
                    else for (int i = 0; i < SHARE; i += 2)
                        sum = add_bytes(sum, weight + i * size, x + i * GROUP * planes, 2, planes, &stream);
                    total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(job->step[g]), total);
                    weight += groups * size, x += groups * job->block_bytes;
                }
                y[o] += add_lanes(total);
            }
        }
        for (i64 o = 0; o < outs; o++) {
            const float scale = load_number(job->scale, job->scale_type, from + o);
            store_number(job->y, job->x_type, from + o, (float)((double)y[o] - excess) * scale);
        }
    }
}

AVX2 static void one_avx2(const Job *job, i64 from, i64 to) {
    if (job->bits == 8) one_row(job, from, to, 8, 1);
    else if (job->levels == LEVELS16) one_row(job, from, to, 4, 2);
    else one_row(job, from, to, 4, 1);
}
#endif
