/* Products with INT4 / INT8 weights (and with fp16 / bf16 ones) on a CPU. Built and called by cpu.py; knows no model.
 * Further down is what networks need around them where torch is slow: a token through whole blocks, prompt attention.
 *
 * Weights are read as they are published: `out` rows of in * bits / 8 bytes, one scale a row. INT4: byte j holds column
 * 2j in its high nibble and column 2j + 1 in its low one, both two's complement.
 *
 * Activations are brought to fixed point, one scale for every GROUP columns of a row, so that the inner products are
 * integer ones, exact until the group is done: 16 bits (`default`: +-32512, relative error some 3e-5) or 8 (`int8`).
 * `exact` keeps them in fp32. Two families of kernels:
 *
 *   portable  plain C in loops that compilers turn into SIMD; compiled a second time for AVX2. 16-bit activations.
 *   VNNI      AVX-512 intrinsics. Its instruction multiplies unsigned with signed bytes: weights become unsigned by an
 *             offset (8 or 128) whose part of the sum is known from the activations, and 16-bit activations are split
 *             into two planes of bytes, q = 256 * high + low.
 *             1 to 4 rows: dot products along one linear stream of weights, which is what memory serves fastest.
 *             More rows: 64 outputs x GROUP columns are unpacked into the L1 cache and multiplied with all rows.
 *
 * Products with zero pad the last group, so every number of columns takes the same path. Not-a-number or infinite
 * activations give not-a-number; activations under 1e-33 count as zero.
 */
#include <math.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define thread_number() omp_get_thread_num()
#define team_size() omp_get_num_threads()
#else
#define thread_number() 0
#define team_size() 1
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#else
#define X86 0
#endif
#define INLINE static inline __attribute__((always_inline))

enum { GROUP = 128 };                                  /* columns that share a scale of the activations */
enum { LEVELS16 = 32512, LEVELS8 = 127 };              /* 32512 = 127 * 256: its high byte stays within +-127 */
enum { FLOAT32, FLOAT16, BFLOAT16 };                   /* the codes of cpu.py */
enum { PORTABLE, PORTABLE_AVX2, VNNI };
enum { EXACT, DEFAULT, INT8 };
enum { DOT_ROWS = 4, DOT_BYTES = 32768 };              /* of x, what a dot kernel takes: it has to stay in L1 cache */
enum { PORTABLE_ROWS = 8 };                            /* rows of x one pass of the portable kernel takes */
enum { TILE = 64, TILE_ROWS = 512, MICRO_ROWS = 6 };   /* outputs a tile; rows of x it meets; rows in registers */
enum { AHEAD = 4096 };                                 /* bytes the weights are asked for before they are needed */

typedef int64_t i64;

/* ------------------------------------------------------------------------------------------------ number formats */

INLINE float bits_to_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t float_to_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

INLINE float half_to_float(uint16_t half) {
    uint32_t magnitude = half & 0x7fffu, sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t value = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);  /* also right for subnormal halves */
    return bits_to_float(sign | value | (magnitude >= 0x7c00u ? 0x7f800000u : 0));
}

INLINE uint16_t float_to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  /* 65520 and more round to infinity */
    if (magnitude < 0x38800000u)                                      /* subnormal: the sum aligns and rounds */
        return (uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}

INLINE float bfloat_to_float(uint16_t value) { return bits_to_float((uint32_t)value << 16); }

INLINE uint16_t float_to_bfloat(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

INLINE float load_number(const void *data, int type, i64 index) {
    if (type == FLOAT32) return ((const float *)data)[index];
    uint16_t bits = ((const uint16_t *)data)[index];
    return type == FLOAT16 ? half_to_float(bits) : bfloat_to_float(bits);
}

INLINE void store_number(void *data, int type, i64 index, float value) {
    if (type == FLOAT32) ((float *)data)[index] = value;
    else ((uint16_t *)data)[index] = type == FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
}

INLINE void load_numbers(const void *data, int type, i64 index, int count, float *restrict to) {
    const uint16_t *from = (const uint16_t *)data + index;
    if (type == FLOAT32) memcpy(to, (const float *)data + index, (size_t)count * 4);
    else if (type == FLOAT16) for (int i = 0; i < count; i++) to[i] = half_to_float(from[i]);
    else for (int i = 0; i < count; i++) to[i] = bfloat_to_float(from[i]);
}

INLINE void store_numbers(void *data, int type, i64 index, int count, const float *restrict from) {
    uint16_t *restrict to = (uint16_t *)data + index;
    if (type == FLOAT32) memcpy((float *)data + index, from, (size_t)count * 4);
    else if (type == FLOAT16) for (int i = 0; i < count; i++) to[i] = float_to_half(from[i]);
    else for (int i = 0; i < count; i++) to[i] = float_to_bfloat(from[i]);
}

/* ---------------------------------------------------------------------------------------------------- the request */

/* A product and its scratch memory. Blocks of activations are [groups][rows]. */
typedef struct {
    int isa, bits, levels, x_type, scale_type;   /* levels: 0 for exact */
    i64 rows, in, out, groups, row_bytes, group_bytes;
    const void *x, *scale;
    const uint8_t *weight;
    void *y;
    i64 block_bytes;                        /* of one row and group in `blocks` */
    char *blocks;                           /* floats, int16 or byte planes, in the order in which weights unpack */
    float *step;                            /* what one unit of a fixed-point activation is worth */
    int32_t *correction;                    /* minus the offset of unsigned weights times the sum of activations */
} Job;

INLINE char *block_of(const Job *job, i64 group, i64 row) {
    return job->blocks + (group * job->rows + row) * job->block_bytes;
}

/* Bytes of this group that exist; the last group of a row can be short. */
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

/* The unit of fixed-point numbers whose largest has the magnitude with these bits. */
INLINE Step find_step(uint32_t magnitude, int levels) {
    const float largest = bits_to_float(magnitude);
    Step step = {0, 0};
    if (magnitude >= 0x7f800000u) step.size = NAN;
    else if (largest > 1e-33f) step.size = largest / (float)levels, step.inverse = (float)levels / largest;
    return step;
}

/* Reads one group of activations and writes its block, integers of 16 bits or (exact) floats. */
INLINE void prepare_group(const Job *job, i64 group, i64 row, int streams) {
    float x[GROUP] = {0};
    i64 start = group * GROUP, left = job->in - start, index = group * job->rows + row;
    load_numbers(job->x, job->x_type, row * job->in + start, left < GROUP ? (int)left : GROUP, x);
    if (!job->levels) {
        float *to = (float *)block_of(job, group, row);
        FOR_COLUMNS(streams, p, c) to[p] = x[c];
        return;
    }
    uint32_t largest = 0;  /* magnitudes compared as integers, so that a not-a-number wins */
    for (int i = 0; i < GROUP; i++) {
        uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    const Step step = find_step(largest, job->levels);
    int16_t q[GROUP], *to = (int16_t *)block_of(job, group, row);
    for (int i = 0; i < GROUP; i++)  /* adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits */
        q[i] = (int16_t)float_to_bits(x[i] * step.inverse + 12582912.0f);
    FOR_COLUMNS(streams, p, c) to[p] = q[c];
    job->step[index] = step.size;
}

/* ------------------------------------------------------------------------------------------------ portable kernels */

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

INLINE float dot_dense(const uint16_t *restrict weight, int type, const float *restrict x, i64 count) {
    float sum = 0;
    if (type == FLOAT16) {
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < count; i++) sum += half_to_float(weight[i]) * x[i];
    } else {
        #pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < count; i++) sum += bfloat_to_float(weight[i]) * x[i];
    }
    return sum;
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
    target static float dense_##suffix(const uint16_t *weight, int type, const float *x, i64 count) { \
        return type == FLOAT16 ? dot_dense(weight, FLOAT16, x, count) : dot_dense(weight, BFLOAT16, x, count); \
    } \
    target static void floats_##suffix(const Job *job, i64 output, float *to) { to_floats(job, output, to); }

PORTABLE_KERNELS(plain, )
#if X86
PORTABLE_KERNELS(avx2, AVX2)
#define CHOOSE(isa, name) ((isa) == PORTABLE ? name##_plain : name##_avx2)
#else
#define CHOOSE(isa, name) name##_plain
#endif

/* ----------------------------------------------------------------------------------------------------- VNNI kernels */

#if X86
AVX512 INLINE __m512 load_floats(const uint16_t *from, int type, __mmask16 mask) {
    __m256i bits = mask == 0xffff ? _mm256_loadu_si256((const void *)from) : _mm256_maskz_loadu_epi16(mask, from);
    if (type == FLOAT16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* Reads a group of activations as a block of byte planes: low bytes last, even columns before odd ones if INT4. */
AVX512 static void prepare_vnni(const Job *job, i64 group, i64 row) {
    enum { VECTORS = GROUP / 16 };
    enum { NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    const i64 start = group * GROUP, left = job->in - start, from = row * job->in + start;
    const i64 index = group * job->rows + row;
    __m512i magnitude = _mm512_setzero_si512(), total = magnitude, words[VECTORS / 2];
    __m512 x[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        __mmask16 mask = left >= v * 16 + 16 ? 0xffff : left <= v * 16 ? 0 : (__mmask16)((1u << (left - v * 16)) - 1);
        if (job->x_type == FLOAT32) x[v] = _mm512_maskz_loadu_ps(mask, (const float *)job->x + from + v * 16);
        else x[v] = load_floats((const uint16_t *)job->x + from + v * 16, job->x_type, mask);
        magnitude = _mm512_max_epu32(magnitude, _mm512_castps_si512(_mm512_abs_ps(x[v])));
    }
    const Step step = find_step(_mm512_reduce_max_epu32(magnitude), job->levels);
    for (int v = 0; v < VECTORS; v += 2) {
        const __m512 inverse = _mm512_set1_ps(step.inverse);
        const __m512i q = _mm512_cvt_roundps_epi32(_mm512_mul_ps(x[v], inverse), NEAREST);
        const __m512i r = _mm512_cvt_roundps_epi32(_mm512_mul_ps(x[v + 1], inverse), NEAREST);
        total = _mm512_add_epi32(total, _mm512_add_epi32(q, r));
        words[v / 2] = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(q));
        words[v / 2] = _mm512_inserti64x4(words[v / 2], _mm512_cvtepi32_epi16(r), 1);
    }
    job->step[index] = step.size;
    job->correction[index] = -_mm512_reduce_add_epi32(total) * (job->bits == 4 ? 8 : 128);
    char *to = block_of(job, group, row);
    for (int plane = job->levels == LEVELS16 ? 0 : 1; plane < 2; plane++, to += GROUP)
        for (int v = 0; v < VECTORS / 2; v++) {
            __m512i w = plane ? words[v] : _mm512_srai_epi16(_mm512_add_epi16(words[v], _mm512_set1_epi16(128)), 8);
            if (job->bits == 4) {
                _mm_storeu_si128((__m128i *)(to + v * 16), _mm512_cvtepi32_epi8(w));
                _mm_storeu_si128((__m128i *)(to + v * 16 + GROUP / 2), _mm512_cvtepi32_epi8(_mm512_srli_epi32(w, 16)));
            } else {
                _mm256_storeu_si256((__m256i *)(to + v * 32), _mm512_cvtepi16_epi8(w));
            }
        }
}

/* sum + four products of unsigned and signed bytes in each lane. The intrinsic makes GCC 12 copy all sums around. */
AVX512 INLINE __m512i dot4(__m512i sum, __m512i weight, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "vm"(x));
    return sum;
}

/* Weights as unsigned bytes, an offset of 8 (INT4) or 128 (INT8) added. 0x78: offset ^ (packed & low). */
AVX512 INLINE __m512i odd_columns(__m512i packed) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(8), packed, _mm512_set1_epi8(15), 0x78);
}

AVX512 INLINE __m512i even_columns(__m512i packed) { return odd_columns(_mm512_srli_epi16(packed, 4)); }

AVX512 INLINE __m512i make_unsigned(__m512i weight) { return _mm512_xor_si512(weight, _mm512_set1_epi8(-128)); }

AVX512 INLINE void dot_group(const Job *job, const uint8_t *weight, i64 group, int count, int bits, int planes,
                             __m512 *sums) {
    const __m512i packed = _mm512_loadu_si512(weight);
    const __m512i before = bits == 4 ? even_columns(packed) : make_unsigned(packed);
    const __m512i after = bits == 4 ? odd_columns(packed) : make_unsigned(_mm512_loadu_si512(weight + 64));
    i64 index = group * count;
    const char *x = job->blocks + index * (GROUP * planes);
    for (int r = 0; r < count; r++, index++, x += GROUP * planes) {
        __m512i sum = _mm512_maskz_set1_epi32(1, job->correction[index]);
        const char *low = x + GROUP * (planes - 1);
        sum = dot4(sum, before, _mm512_loadu_si512(low));
        sum = dot4(sum, after, _mm512_loadu_si512(low + 64));
        if (planes == 2) {
            __m512i high = dot4(_mm512_setzero_si512(), before, _mm512_loadu_si512(x));
            high = dot4(high, after, _mm512_loadu_si512(x + 64));
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high, 8));
        }
        sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(job->step[index]), sums[r]);
    }
}

/* Outputs from..to of all `count` rows of x: one linear stream through the weights. */
AVX512 INLINE void dot_rows(const Job *job, i64 from, i64 to, int count, int bits, int planes) {
    const i64 size = GROUP * bits / 8, whole = job->row_bytes / size;
    for (i64 o = from; o < to; o++) {
        const uint8_t *weight = job->weight + o * job->row_bytes;
        __m512 sums[DOT_ROWS];
        for (int r = 0; r < count; r++) sums[r] = _mm512_setzero_ps();
        for (i64 g = 0; g < whole; g++, weight += size) {
            for (i64 b = 0; b < size; b += 64) _mm_prefetch((const char *)weight + AHEAD + b, _MM_HINT_T0);
            dot_group(job, weight, g, count, bits, planes, sums);
        }
        if (whole < job->groups) {
            uint8_t padded[GROUP] = {0};
            memcpy(padded, weight, (size_t)bytes_in_group(job, whole));
            dot_group(job, padded, whole, count, bits, planes, sums);
        }
        float scale = load_number(job->scale, job->scale_type, o);
        for (int r = 0; r < count; r++)
            store_number(job->y, job->x_type, r * job->out + o, _mm512_reduce_add_ps(sums[r]) * scale);
    }
}

AVX512 static void dot_vnni(const Job *job, i64 from, i64 to) {
    int planes = job->levels == LEVELS16 ? 2 : 1;
    #define CASE(c) case c: \
        if (job->bits == 4 && planes == 2) dot_rows(job, from, to, c, 4, 2); \
        else if (job->bits == 4) dot_rows(job, from, to, c, 4, 1); \
        else if (planes == 2) dot_rows(job, from, to, c, 8, 2); \
        else dot_rows(job, from, to, c, 8, 1); \
        break;
    switch (job->rows) { CASE(1) CASE(2) CASE(3) CASE(4) }
    #undef CASE
}

/* The same with floats, for `exact`: a nibble of each 32-bit word at a time is looked up in a table of its values. */
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
    for (i64 o = from; o < to; o++) {
        const uint8_t *weight = job->weight + o * job->row_bytes;
        __m512 sums[DOT_ROWS][2];
        for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (i64 g = 0; g < whole; g++, weight += size) {
            for (i64 b = 0; b < size; b += 64) _mm_prefetch((const char *)weight + AHEAD + b, _MM_HINT_T0);
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

/* The words of one group of 16 outputs, from `offset` of their rows, into a tile, which has TILE / 16 vectors a word.
 * `next` is what to ask memory for meanwhile, in one piece; or NULL: what follows in each row. */
AVX512 INLINE void fill_tile(const uint8_t *const *rows, i64 offset, i64 bytes, int bits, const uint8_t *next,
                             __m512i *tile) {
    uint8_t padded[16][GROUP];
    const uint8_t *inside[16];
    for (int i = 0; i < 16; i++) {
        if (!next) _mm_prefetch((const char *)rows[i] + offset + 256, _MM_HINT_T0);
        if (!next && bits == 8) _mm_prefetch((const char *)rows[i] + offset + 320, _MM_HINT_T0);
        inside[i] = rows[i] + offset;
    }
    for (int i = 0; i < bits * 4 && next; i++) _mm_prefetch((const char *)next + i * 64, _MM_HINT_T0);
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
    for (int i = 0; i < count * planes * 2; i++)  /* the rows that come next: all of x does not fit into the cache */
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
        __m512i correction = _mm512_set1_epi32(job->correction[index + r]);
        __m512 step = _mm512_set1_ps(job->step[index + r]);
        for (int v = 0; v < VECTORS; v++) {
            float *to = sums + r * TILE + v * 16;
            __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[r][v], correction));
            _mm512_store_ps(to, _mm512_fmadd_ps(value, step, _mm512_load_ps(to)));
        }
    }
}

/* Outputs output..output + TILE of `count` <= TILE_ROWS rows of x. */
AVX512 INLINE void tile_rows(const Job *job, i64 output, i64 first, int count, int bits, int planes, float *sums) {
    __m512i tile[GROUP / 4 * TILE / 16];  /* half of it if INT4 */
    const int blocks = (count + MICRO_ROWS - 1) / MICRO_ROWS;
    const uint8_t *rows[TILE];
    for (i64 i = 0; i < TILE; i++)  /* the last row stands in for rows past the end */
        rows[i] = job->weight + (output + i < job->out ? output + i : job->out - 1) * job->row_bytes;
    /* Short rows are often a power of two long, a stride memory dislikes: the next tile is asked for in one run. */
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
/* Outputs from..to of `count` rows of x with half-precision weights: one linear stream, as above. */
AVX512 INLINE void dense_rows(const uint16_t *weight, int type, const float *x, i64 in, i64 from, i64 to, int count,
                              void *y, int y_type, i64 out) {
    enum { STEP = 32 };
    for (i64 o = from; o < to; o++) {
        const uint16_t *row = weight + o * in;
        __m512 even[DOT_ROWS], odd[DOT_ROWS];
        for (int r = 0; r < count; r++) even[r] = odd[r] = _mm512_setzero_ps();
        i64 i = 0;
        for (; i + STEP <= in; i += STEP) {
            _mm_prefetch((const char *)(row + i) + AHEAD, _MM_HINT_T0);
            __m512 first = load_floats(row + i, type, 0xffff), second = load_floats(row + i + 16, type, 0xffff);
            for (int r = 0; r < count; r++) {
                even[r] = _mm512_fmadd_ps(first, _mm512_loadu_ps(x + r * in + i), even[r]);
                odd[r] = _mm512_fmadd_ps(second, _mm512_loadu_ps(x + r * in + i + 16), odd[r]);
            }
        }
        for (; i < in; i += 16) {
            __mmask16 mask = in - i < 16 ? (__mmask16)((1u << (in - i)) - 1) : 0xffff;
            __m512 last = load_floats(row + i, type, mask);
            for (int r = 0; r < count; r++)
                even[r] = _mm512_fmadd_ps(last, _mm512_maskz_loadu_ps(mask, x + r * in + i), even[r]);
        }
        for (int r = 0; r < count; r++)
            store_number(y, y_type, r * out + o, _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r])));
    }
}

AVX512 static void dense_vnni(const uint16_t *weight, int type, const float *x, i64 in, i64 from, i64 to, int count,
                              void *y, int y_type, i64 out) {
    #define CASE(c) case c: \
        if (type == FLOAT16) dense_rows(weight, FLOAT16, x, in, from, to, c, y, y_type, out); \
        else dense_rows(weight, BFLOAT16, x, in, from, to, c, y, y_type, out); \
        break;
    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) }
    #undef CASE
}
#endif

/* -------------------------------------------------------------------------------------------------------- the calls */

/* The best family of kernels that this CPU (and its operating system) can run. */
int chatglm_best(void) {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) return VNNI;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return PORTABLE_AVX2;
#endif
    return PORTABLE;
}

/* Where the threads of a team wait for each other; all zero to begin with. */
typedef struct { int arrived, times; } Meeting;

/* OpenMP's own barrier puts threads to sleep at once where the process has more of them than the machine has CPUs, as
 * when several of its threads use torch; with hundreds of barriers a token, a small model then took twice as long. And
 * where it has not, they spin for milliseconds beside a busy neighbour. Here they stay awake, and let others run. */
static void meet(Meeting *meeting) {
    enum { SPINS = 200 };
    const int times = __atomic_load_n(&meeting->times, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == team_size()) {
        __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&meeting->times, times + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spin = 0; __atomic_load_n(&meeting->times, __ATOMIC_ACQUIRE) == times; spin += spin < SPINS) {
#if X86
        __builtin_ia32_pause();
#endif
        if (spin == SPINS) sched_yield();
    }
}

static void *aligned(char *memory) { return (void *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); }

/* Fills in what follows from isa, bits, in and precision. */
static void plan(Job *job, int precision) {
    job->groups = (job->in + GROUP - 1) / GROUP;
    job->row_bytes = job->in * job->bits / 8;
    job->group_bytes = GROUP * job->bits / 8;
    job->levels = precision == EXACT ? 0 : precision == INT8 && job->isa == VNNI ? LEVELS8 : LEVELS16;
    job->block_bytes = !job->levels ? GROUP * 4 : job->levels == LEVELS8 ? GROUP : GROUP * 2;
}

/* Bytes of the blocks of activations with their steps and corrections; and where these are in `memory`. */
static i64 block_memory(const Job *job) { return job->groups * job->rows * (job->block_bytes + 8); }

static void take_block_memory(Job *job, char *memory) {
    job->blocks = memory;
    job->step = (float *)(memory + job->groups * job->rows * job->block_bytes);
    job->correction = (int32_t *)(job->step + job->groups * job->rows);
}

/* For all threads of a team: the blocks of activations. The same thread does the same groups of a row every time. */
static void prepare_blocks(const Job *job, Meeting *meeting) {
    void (*prepare)(const Job *, i64, i64) = CHOOSE(job->isa, prepare);
#if X86
    if (job->isa == VNNI) prepare = job->levels ? prepare_vnni : prepare_floats;
#endif
    #pragma omp for schedule(static) nowait
    for (i64 b = 0; b < job->groups * job->rows; b++) prepare(job, b / job->rows, b % job->rows);
    meet(meeting);
}

/* For all threads of a team: the outputs, where weights are read once for all rows (or, portable, for a few). Threads
 * do not wait for each other here. */
static void multiply_rows(const Job *job, int threads) {
#if X86
    if (job->isa == VNNI) {
        #pragma omp for schedule(static) nowait
        for (i64 part = 0; part < threads; part++) {
            const i64 from = job->out * part / threads, to = job->out * (part + 1) / threads;
            (job->levels ? dot_vnni : dot_floats_avx512)(job, from, to);
        }
        return;
    }
#endif
    void (*output)(const Job *, i64, i64, int) = CHOOSE(job->isa, output);
    #pragma omp for schedule(static) nowait
    for (i64 o = 0; o < job->out; o++)
        for (i64 first = 0; first < job->rows; first += PORTABLE_ROWS)
            output(job, o, first, job->rows - first < PORTABLE_ROWS ? (int)(job->rows - first) : PORTABLE_ROWS);
}

/* y (rows, out) = x (rows, in) . weight * scale, y in x's type. Returns 0, or 1 if there is no memory. */
int chatglm_linear(int isa, int threads, int precision, int bits, const void *x, int x_type, const void *weight,
                   const void *scale, int scale_type, void *y, i64 rows, i64 in, i64 out) {
    Job job = {.isa = isa, .bits = bits, .x_type = x_type, .scale_type = scale_type, .rows = rows, .in = in, .out = out,
               .x = x, .scale = scale, .weight = weight, .y = y};
    plan(&job, precision);
    const i64 fitting = DOT_BYTES / (job.groups * job.block_bytes);
    const i64 most = isa != VNNI ? rows : fitting < 1 ? 1 : fitting > DOT_ROWS ? DOT_ROWS : fitting;
    const int tiles = isa == VNNI && job.levels && rows > most;
    if (rows > most && !tiles) {  /* several passes, each with its activations in one piece */
        const i64 bytes = x_type == FLOAT32 ? 4 : 2;
        int failed = 0;
        for (i64 r = 0; r < rows && !failed; r += most) {
            const char *from = (const char *)x + r * in * bytes;
            char *to = (char *)y + r * out * bytes;
            failed = chatglm_linear(isa, threads, precision, bits, from, x_type, weight, scale, scale_type, to,
                                    rows - r < most ? rows - r : most, in, out);
        }
        return failed;
    }
    const i64 tile_floats = tiles ? (i64)TILE_ROWS * TILE : 0;
    char *memory = malloc((size_t)(block_memory(&job) + threads * tile_floats * 4 + 64));
    if (!memory) return 1;
    float *sums = aligned(memory);
    take_block_memory(&job, (char *)(sums + threads * tile_floats));
    Meeting meeting = {0};

    #pragma omp parallel num_threads(threads)
    {
        prepare_blocks(&job, &meeting);
        if (!tiles) multiply_rows(&job, threads);
#if X86
        else {
            /* Few rows wait for memory, which likes one run a thread; of many, a thread held up should do less. */
            const i64 across = (out + TILE - 1) / TILE, all = across * ((rows + TILE_ROWS - 1) / TILE_ROWS);
            const i64 parts = rows > TILE ? threads * 4 : threads;
            #pragma omp for schedule(dynamic)
            for (i64 part = 0; part < parts; part++)
                for (i64 t = all * part / parts; t < all * (part + 1) / parts; t++) {
                    i64 first = t / across * TILE_ROWS;
                    int count = rows - first < TILE_ROWS ? (int)(rows - first) : TILE_ROWS;
                    tile_vnni(&job, t % across * TILE, first, count, sums + thread_number() * tile_floats);
                }
        }
#endif
    }
    free(memory);
    return 0;
}

/* y (out, in) = weight * scale, rounded once to y's type. Returns 0, or 1 if there is no memory. */
int chatglm_dequantize(int isa, int threads, int bits, const void *weight, const void *scale, int scale_type,
                       void *y, int y_type, i64 in, i64 out) {
    Job job = {.bits = bits, .scale_type = scale_type, .in = in, .out = out, .row_bytes = in * bits / 8,
               .scale = scale, .weight = weight};
    void (*floats)(const Job *, i64, float *) = CHOOSE(isa, floats);
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 o = 0; o < out; o++) {
        if (y_type == FLOAT32) {
            floats(&job, o, (float *)y + o * in);
            continue;
        }
        /* A row has as many values as a weight can have: look them up. */
        const float scale_value = load_number(scale, scale_type, o);
        uint16_t values[256], *to = (uint16_t *)y + o * in;
        const uint8_t *from = job.weight + o * job.row_bytes;
        if (bits == 8) {
            for (int i = 0; i < 256; i++) store_number(values, y_type, i, (float)(int8_t)i * scale_value);
            for (i64 i = 0; i < in; i++) to[i] = values[from[i]];
        } else {
            for (int i = 0; i < 16; i++) store_number(values, y_type, i, (float)((i ^ 8) - 8) * scale_value);
            for (i64 i = 0; i < job.row_bytes; i++) {
                to[2 * i] = values[from[i] >> 4];
                to[2 * i + 1] = values[from[i] & 15];
            }
        }
    }
    return 0;
}

/* y (rows, out) = x (rows, in) . weight, a few rows, weight in fp16 or bf16, y in x's type. Returns 0, or 1. */
int chatglm_dense(int isa, int threads, const void *x, int x_type, const void *weight, int weight_type, void *y,
                  i64 rows, i64 in, i64 out) {
    float *floats = malloc((size_t)(rows * in) * 4 + 64);
    if (!floats) return 1;
    for (i64 r = 0; r < rows; r++) load_numbers(x, x_type, r * in, (int)in, floats + r * in);
    float (*dot)(const uint16_t *, int, const float *, i64) = CHOOSE(isa, dense);
    #pragma omp parallel num_threads(threads)
    {
#if X86
        if (isa == VNNI) {
            #pragma omp for schedule(static)
            for (i64 part = 0; part < threads; part++) {
                const i64 from = out * part / threads, to = out * (part + 1) / threads;
                for (i64 r = 0; r < rows; r += DOT_ROWS)
                    dense_vnni(weight, weight_type, floats + r * in, in, from, to,
                               rows - r < DOT_ROWS ? (int)(rows - r) : DOT_ROWS,
                               (char *)y + r * out * (x_type == FLOAT32 ? 4 : 2), x_type, out);
            }
        } else
#endif
        {
            #pragma omp for schedule(static)
            for (i64 o = 0; o < out; o++)
                for (i64 r = 0; r < rows; r++) {
                    float value = dot((const uint16_t *)weight + o * in, weight_type, floats + r * in, in);
                    store_number(y, x_type, r * out + o, value);
                }
        }
    }
    free(floats);
    return 0;
}

/* ------------------------------------------------------------------------------ a decoder block, for a single token */

enum { TOKENS = 16, HEADS = 4, MAX_HEAD = 256 };  /* of the cache, and query heads of a group, that are met at a time */

/* The layouts of these three are those of cpu.py. */
typedef struct {
    const void *weight, *scale, *bias;      /* bias: or NULL */
    i64 in, out;
    int bits, precision, scale_type, bias_type;
} Matrix;

typedef struct {
    const void *norm_weight[2], *norm_bias[2];  /* norm_bias: or NULL */
    void *keys, *values;                        /* the cache has room for this token behind the `past` it holds */
    i64 past, cache_step;                       /* numbers from one head to the next */
    Matrix fused, dense, up, down;
    i64 hidden, heads, kv_heads, head_dim;
    i64 query_step, key_start, value_start, key_step;  /* where heads are in the fused projection */
    i64 distance;                                      /* between the two dims of a head that turn together */
    float eps, residual_scale, scaling;
    int norm_type, cache_type, rms, gated, residual_normed;
} Block;

typedef struct {
    const void *x, *cos[2], *sin[2];
    void *y;
    i64 turns, angles, angle_step;              /* `turns` tables of `angles`, which stand `angle_step` apart */
    int type, angle_type;
} Token;

/* e^x for -87 <= x <= 88, other x as these, with a relative error of 1e-7; plain arithmetic that turns into SIMD. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;  /* in this order a not-a-number stays one */
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float power = 1.3888889e-3f;
    power = power * rest + 8.3333333e-3f;
    power = power * rest + 4.1666667e-2f;
    power = power * rest + 1.6666667e-1f;
    power = power * rest + 0.5f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    return power * bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
}

/* to = norm of `from`; the first or the second norm of the block. */
INLINE void normalise(const Block *block, int which, const float *restrict from, float *restrict to) {
    const i64 size = block->hidden;
    float mean = 0, square = 0;
    if (!block->rms) {
        #pragma omp simd reduction(+ : mean)
        for (i64 i = 0; i < size; i++) mean += from[i];
        mean /= (float)size;
    }
    #pragma omp simd reduction(+ : square)
    for (i64 i = 0; i < size; i++) square += (from[i] - mean) * (from[i] - mean);
    const float inverse = 1.0f / sqrtf(square / (float)size + block->eps);
    load_numbers(block->norm_weight[which], block->norm_type, 0, (int)size, to);
    for (i64 i = 0; i < size; i++) to[i] *= (from[i] - mean) * inverse;
    if (block->norm_bias[which])
        for (i64 i = 0; i < size; i++) to[i] += load_number(block->norm_bias[which], block->norm_type, i);
}

INLINE void add_bias(const Matrix *matrix, i64 from, i64 count, float *to) {
    if (matrix->bias)
        for (i64 i = 0; i < count; i++) to[i] += load_number(matrix->bias, matrix->bias_type, from + i);
}

/* The residual stream goes on: hidden = what `normed` or hidden itself is worth + the matrix's result. */
INLINE void add_residual(const Block *block, const Matrix *matrix, const float *normed, float *result, float *hidden) {
    add_bias(matrix, 0, block->hidden, result);
    const float *residual = block->residual_normed ? normed : hidden;
    for (i64 i = 0; i < block->hidden; i++) hidden[i] = residual[i] * block->residual_scale + result[i];
}

/* Rotates one head where it stands. */
INLINE void rotate(const Token *token, i64 distance, float *head) {
    for (i64 t = 0, pair = 0; t < token->turns; t++)
        for (i64 i = 0; i < token->angles; i++, pair++) {
            const float cosine = load_number(token->cos[t], token->angle_type, i * token->angle_step);
            const float sine = load_number(token->sin[t], token->angle_type, i * token->angle_step);
            const i64 place = pair / distance * 2 * distance + pair % distance;
            const float first = head[place], second = head[place + distance];
            head[place] = first * cosine - second * sine;
            head[place + distance] = second * cosine + first * sine;
        }
}

/* Head `head` of the queries, or (from `heads` on) of the keys and values: bias, rotation, a place in the cache. */
INLINE void place_head(const Token *token, const Block *block, i64 head, float *fused) {
    const i64 size = block->head_dim, own = head - block->heads;
    if (own < 0) {
        add_bias(&block->fused, head * block->query_step, size, fused + head * block->query_step);
        rotate(token, block->distance, fused + head * block->query_step);
        return;
    }
    const i64 key = block->key_start + own * block->key_step, value = block->value_start + own * block->key_step;
    const i64 to = own * block->cache_step + block->past * size;
    add_bias(&block->fused, key, size, fused + key);
    add_bias(&block->fused, value, size, fused + value);
    rotate(token, block->distance, fused + key);
    store_numbers(block->keys, block->cache_type, to, (int)size, fused + key);
    store_numbers(block->values, block->cache_type, to, (int)size, fused + value);
}

/* Attention of query heads first..first + count, which share a key head, over the cache; a run of tokens at a time. */
INLINE void attend(const Block *block, i64 first, int count, const float *restrict fused, float *restrict context) {
    float tile[TOKENS * MAX_HEAD], weights[HEADS][TOKENS], largest[HEADS], sum[HEADS];
    const int size = (int)block->head_dim;
    const i64 all = block->past + 1, start = first * block->kv_heads / block->heads * block->cache_step;
    for (int r = 0; r < count; r++) largest[r] = -INFINITY, sum[r] = 0;
    memset(context + first * size, 0, (size_t)(count * size) * sizeof(float));
    for (i64 token = 0; token < all; token += TOKENS) {
        const int tokens = all - token < TOKENS ? (int)(all - token) : TOKENS;
        load_numbers(block->keys, block->cache_type, start + token * size, tokens * size, tile);
        for (int r = 0; r < count; r++) {
            const float *query = fused + (first + r) * block->query_step;
            float most = largest[r], factor;
            for (int t = 0; t < tokens; t++) {
                float score = 0;
                #pragma omp simd reduction(+ : score)
                for (int i = 0; i < size; i++) score += query[i] * tile[t * size + i];
                weights[r][t] = score * block->scaling;
                most = weights[r][t] > most ? weights[r][t] : most;
            }
            for (int t = tokens; t < TOKENS; t++) weights[r][t] = -INFINITY;
            factor = exponential(largest[r] - most);
            sum[r] *= factor;
            for (int t = 0; t < TOKENS; t++) weights[r][t] = exponential(weights[r][t] - most);
            for (int t = 0; t < tokens; t++) sum[r] += weights[r][t];
            float *to = context + (first + r) * size;
            for (int i = 0; i < size; i++) to[i] *= factor;
            largest[r] = most;
        }
        load_numbers(block->values, block->cache_type, start + token * size, tokens * size, tile);
        for (int r = 0; r < count; r++) {
            float *restrict to = context + (first + r) * size;
            for (int t = 0; t < tokens; t++)
                for (int i = 0; i < size; i++) to[i] += weights[r][t] * tile[t * size + i];
        }
    }
    for (int r = 0; r < count; r++)
        for (int i = 0; i < size; i++) context[(first + r) * size + i] /= sum[r];
}

/* What the second half of the network's MLP gets, for one group of its columns: gate * sigmoid(gate) * up, or GELU. */
INLINE void activate(const Block *block, i64 from, i64 count, float *restrict up, float *restrict to) {
    if (block->gated) {
        float *restrict gate = up, *restrict linear = up + block->down.in;
        add_bias(&block->up, from, count, gate + from);
        add_bias(&block->up, block->down.in + from, count, linear + from);
        for (i64 i = from; i < from + count; i++)
            to[i] = gate[i] / (1.0f + exponential(-gate[i])) * linear[i];
        return;
    }
    add_bias(&block->up, from, count, up + from);
    for (i64 i = from; i < from + count; i++) {
        const float u = 1.59576912f * (up[i] + 0.044715f * up[i] * up[i] * up[i]);  /* 2 sqrt(2 / pi) */
        to[i] = up[i] / (1.0f + exponential(-u));
    }
}

#define BLOCK_KERNELS(suffix, target) \
    target static void normalise_##suffix(const Block *block, int which, const float *from, float *to) { \
        normalise(block, which, from, to); \
    } \
    target static void attend_##suffix(const Block *block, i64 first, int count, const float *fused, float *context) { \
        attend(block, first, count, fused, context); \
    } \
    target static void activate_##suffix(const Block *block, i64 from, i64 count, float *up, float *to) { \
        activate(block, from, count, up, to); \
    }

BLOCK_KERNELS(plain, )
#if X86
BLOCK_KERNELS(avx2, AVX2)
BLOCK_KERNELS(avx512, AVX512)
#define CHOOSE_BLOCK(isa, name) ((isa) == VNNI ? name##_avx512 : CHOOSE(isa, name))
#else
#define CHOOSE_BLOCK(isa, name) name##_plain
#endif

static Job job_of(const Matrix *matrix, int isa) {
    Job job = {.isa = isa, .bits = matrix->bits, .x_type = FLOAT32, .scale_type = matrix->scale_type, .rows = 1,
               .in = matrix->in, .out = matrix->out, .scale = matrix->scale, .weight = matrix->weight};
    plan(&job, matrix->precision);
    return job;
}

enum { JOBS = 4, PARTS = 6 };  /* products of a block, and arrays of floats between them */

/* The products of a block, whose activations come and go in `parts` (they may be NULL), and the sizes of these. */
static void list_jobs(const Block *block, int isa, float *const *parts, Job *jobs, i64 *sizes) {
    const Matrix *matrices[JOBS] = {&block->fused, &block->dense, &block->up, &block->down};
    const int from[JOBS] = {0, 3, 0, 5}, to[JOBS] = {2, 1, 4, 1};
    for (int i = 0; i < JOBS; i++) {
        jobs[i] = job_of(matrices[i], isa);
        if (parts) jobs[i].x = parts[from[i]], jobs[i].y = parts[to[i]];
        sizes[from[i]] = matrices[i]->in, sizes[to[i]] = matrices[i]->out;
    }
}

static i64 padded(i64 bytes) { return (bytes + 63) / 64 * 64; }

/* Bytes that run_block needs. */
static i64 scratch_memory(const Block *block, int isa) {
    Job jobs[JOBS];
    i64 sizes[PARTS], bytes = 0, most = 0;
    list_jobs(block, isa, NULL, jobs, sizes);
    for (int i = 0; i < PARTS; i++) bytes += padded(sizes[i] * 4);
    for (int i = 0; i < JOBS; i++) most = block_memory(jobs + i) > most ? block_memory(jobs + i) : most;
    return bytes + most;
}

/* For all threads of a team: the token's floats `hidden`, which thread 0 has at the end, through one block. */
static void run_block(int isa, int threads, const Token *token, const Block *block, float *hidden, char *memory,
                      Meeting *meeting) {
    Job jobs[JOBS];
    i64 sizes[PARTS];
    float *parts[PARTS];
    list_jobs(block, isa, NULL, jobs, sizes);
    for (int i = 0; i < PARTS; i++) parts[i] = (float *)memory, memory += padded(sizes[i] * 4);
    list_jobs(block, isa, parts, jobs, sizes);
    for (int i = 0; i < JOBS; i++) take_block_memory(jobs + i, memory);
    float *normed = parts[0], *result = parts[1], *fused = parts[2], *context = parts[3], *up = parts[4];
    float *active = parts[5];
    void (*norm)(const Block *, int, const float *, float *) = CHOOSE_BLOCK(isa, normalise);
    void (*look)(const Block *, i64, int, const float *, float *) = CHOOSE_BLOCK(isa, attend);
    void (*act)(const Block *, i64, i64, float *, float *) = CHOOSE_BLOCK(isa, activate);
    const i64 sharing = block->heads / block->kv_heads;
    const int together = sharing % HEADS == 0 ? HEADS : sharing % 2 == 0 ? 2 : 1, first = thread_number() == 0;

    if (first) norm(block, 0, hidden, normed);
    meet(meeting);
    prepare_blocks(&jobs[0], meeting);
    multiply_rows(&jobs[0], threads);
    meet(meeting);
    #pragma omp for schedule(static) nowait
    for (i64 head = 0; head < block->heads + block->kv_heads; head++) place_head(token, block, head, fused);
    meet(meeting);
    #pragma omp for schedule(static) nowait
    for (i64 head = 0; head < block->heads; head += together) look(block, head, together, fused, context);
    meet(meeting);
    prepare_blocks(&jobs[1], meeting);
    multiply_rows(&jobs[1], threads);
    meet(meeting);
    if (first) {
        add_residual(block, &block->dense, normed, result, hidden);
        norm(block, 1, hidden, normed);
    }
    meet(meeting);
    prepare_blocks(&jobs[2], meeting);
    multiply_rows(&jobs[2], threads);
    meet(meeting);
    #pragma omp for schedule(static) nowait  /* prepare_blocks gives each thread the same groups */
    for (i64 g = 0; g < jobs[3].groups; g++) {
        const i64 left = block->down.in - g * GROUP;
        act(block, g * GROUP, left < GROUP ? left : GROUP, up, active);
    }
    prepare_blocks(&jobs[3], meeting);
    multiply_rows(&jobs[3], threads);
    meet(meeting);
    if (first) add_residual(block, &block->down, normed, result, hidden);
}

/* One token through blocks, one after the other: y = what becomes of x. All in between is floats: norms, products,
 * rotation, attention over the cache, residuals; and no thread has to wait for an interpreter. Returns 0, or 1. */
int chatglm_blocks(int isa, int threads, const Token *token, const Block *blocks, i64 count) {
    const int size = (int)blocks->hidden;
    i64 most = 0;
    for (i64 i = 0; i < count; i++) {
        const i64 bytes = scratch_memory(blocks + i, isa);
        most = bytes > most ? bytes : most;
    }
    char *memory = malloc((size_t)(most + padded(size * 4) + 64));
    if (!memory) return 1;
    float *hidden = aligned(memory);
    char *scratch = (char *)hidden + padded(size * 4);
    Meeting meeting = {0};
    load_numbers(token->x, token->type, 0, size, hidden);
    #pragma omp parallel num_threads(threads)
    for (i64 i = 0; i < count; i++) run_block(isa, threads, token, blocks + i, hidden, scratch, &meeting);
    store_numbers(token->y, token->type, 0, size, hidden);
    free(memory);
    return 0;
}

/* --------------------------------------------------------------------------------- attention of many tokens at once */

enum { LANES = 16, WIDE = 32, QUERIES = 252, SIX = 6 };  /* numbers a vector; keys a tile; queries a job, 6 at a time */

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));  /* of LANES */

/* to (6, 32) = or += a (6, count) . b (count, 32); a step is the distance of two rows. */
INLINE void multiply_6x32(i64 count, const float *a, i64 a_step, const float *b, i64 b_step, float *to, i64 to_step,
                          int add) {
    Vector sums[SIX][2];
    for (int r = 0; r < SIX; r++)
        for (int v = 0; v < 2; v++) sums[r][v] = add ? *(const Vector *)(to + r * to_step + v * LANES) : (Vector){0};
    for (i64 i = 0; i < count; i++) {
        const Vector first = *(const Vector *)(b + i * b_step), second = *(const Vector *)(b + i * b_step + LANES);
        for (int r = 0; r < SIX; r++) {
            sums[r][0] += a[r * a_step + i] * first;
            sums[r][1] += a[r * a_step + i] * second;
        }
    }
    for (int r = 0; r < SIX; r++)
        for (int v = 0; v < 2; v++) *(Vector *)(to + r * to_step + v * LANES) = sums[r][v];
}

/* Queries (heads, tokens, head_dim), keys and values (kv_heads, at least `keys`, head_dim), all of one type; the layout
 * is that of cpu.py. */
typedef struct {
    const void *query, *key, *value, *mask;  /* mask: (tokens, keys) to add to the scores, or NULL: causal */
    void *y;                                 /* (tokens, heads, head_dim) */
    i64 heads, kv_heads, head_dim, tokens, keys, key_step, value_step, mask_step;  /* steps: between heads, or rows */
    int type;
    float scaling;
} Attention;

static i64 attention_floats(const Attention *job) { return (2 * QUERIES + 2 * WIDE) * job->head_dim + QUERIES * WIDE; }

/* Queries first..first + count of one head: the keys in tiles, softmax as it goes. */
INLINE void attend_many(const Attention *job, i64 head, i64 first, int count, float *memory) {
    const i64 size = job->head_dim, kv_head = head * job->kv_heads / job->heads, past = job->keys - job->tokens;
    float *query = memory, *result = query + QUERIES * size, *key = result + QUERIES * size;
    float *value = key + WIDE * size, *weights = value + WIDE * size, largest[QUERIES], sum[QUERIES];
    memset(memory, 0, (size_t)(2 * QUERIES * size) * sizeof(float));
    load_numbers(job->query, job->type, (head * job->tokens + first) * size, (int)(count * size), query);
    for (i64 i = 0; i < count * size; i++) query[i] *= job->scaling;
    for (int r = 0; r < count; r++) largest[r] = -INFINITY, sum[r] = 0;
    const i64 all = job->mask ? job->keys : past + first + count;
    for (i64 from = 0; from < all; from += WIDE) {
        const int width = all - from < WIDE ? (int)(all - from) : WIDE;
        const i64 hidden = job->mask ? 0 : from - past - first;  /* so many queries come before all of these keys */
        const int begin = hidden > 0 ? (int)(hidden / SIX * SIX) : 0;
        load_numbers(job->key, job->type, kv_head * job->key_step + from * size, (int)(width * size), value);
        for (i64 i = 0; i < size; i++)  /* keys stand in columns; `value` only lends its place */
            for (int t = 0; t < WIDE; t++) key[i * WIDE + t] = t < width ? value[t * size + i] : 0;
        load_numbers(job->value, job->type, kv_head * job->value_step + from * size, (int)(width * size), value);
        memset(value + width * size, 0, (size_t)((WIDE - width) * size) * sizeof(float));
        for (int r = begin; r < count; r += SIX)
            multiply_6x32(size, query + r * size, size, key, WIDE, weights + r * WIDE, WIDE, 0);
        for (int r = begin; r < count; r++) {
            float *row = weights + r * WIDE, most = largest[r], total = 0;
            const i64 left = job->mask ? width : past + first + r + 1 - from, seen = left < width ? left : width;
            if (job->mask) {
                float hiding[WIDE] = {0};
                load_numbers(job->mask, job->type, (first + r) * job->mask_step + from, width, hiding);
                for (int t = 0; t < WIDE; t++) row[t] += hiding[t];
            }
            for (int t = 0; t < WIDE; t++) row[t] = t < seen ? row[t] : -INFINITY;
            for (int t = 0; t < WIDE; t++) most = row[t] > most ? row[t] : most;
            if (most == -INFINITY) most = 0;
            for (int t = 0; t < WIDE; t++) row[t] = t < seen ? exponential(row[t] - most) : 0;
            #pragma omp simd reduction(+ : total)
            for (int t = 0; t < WIDE; t++) total += row[t];
            const float factor = exponential(largest[r] - most);
            sum[r] = sum[r] * factor + total;
            for (i64 i = 0; i < size && factor != 1.0f; i++) result[r * size + i] *= factor;
            largest[r] = most;
        }
        for (i64 i = 0; i < size; i += WIDE)
            for (int r = begin; r < count; r += SIX)
                multiply_6x32(WIDE, weights + r * WIDE, WIDE, value + i, size, result + r * size + i, size, 1);
    }
    for (int r = 0; r < count; r++) {
        for (i64 i = 0; i < size; i++) result[r * size + i] /= sum[r];
        store_numbers(job->y, job->type, ((first + r) * job->heads + head) * size, (int)size, result + r * size);
    }
}

#define ATTEND_MANY(suffix, target) \
    target static void attend_many_##suffix(const Attention *job, i64 head, i64 first, int count, float *memory) { \
        attend_many(job, head, first, count, memory); \
    }

ATTEND_MANY(plain, )
#if X86
ATTEND_MANY(avx2, AVX2)
ATTEND_MANY(avx512, AVX512)
#endif

/* Attention with head_dim a multiple of 32. Returns 0, or 1 if there is no memory. */
int chatglm_attention(int isa, int threads, const Attention *job) {
    const i64 floats = attention_floats(job), runs = (job->tokens + QUERIES - 1) / QUERIES;
    float *memory = malloc((size_t)(threads * floats) * sizeof(float) + 64);
    if (!memory) return 1;
    float *scratch = aligned((char *)memory);
    void (*look)(const Attention *, i64, i64, int, float *) = CHOOSE_BLOCK(isa, attend_many);
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (i64 i = runs * job->heads - 1; i >= 0; i--) {  /* the longest first */
        const i64 first = i / job->heads * QUERIES, left = job->tokens - first;
        look(job, i % job->heads, first, left < QUERIES ? (int)left : QUERIES, scratch + thread_number() * floats);
    }
    free(memory);
    return 0;
}

/* ------------------------------------------------------------------------------------------- the speed of memory */

static uint64_t read_plain(const char *data, i64 bytes) {
    uint64_t sum = 0, word;
    for (i64 i = 0; i + 8 <= bytes; i += 8) memcpy(&word, data + i, 8), sum += word;
    return sum;
}

#if X86
AVX512 static uint64_t read_avx512(const char *data, i64 bytes) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (i64 i = 0; i + 256 <= bytes; i += 256) {
        for (int p = 0; p < 256; p += 64) _mm_prefetch(data + i + AHEAD + p, _MM_HINT_T0);
        a = _mm512_add_epi64(a, _mm512_loadu_si512(data + i));
        b = _mm512_add_epi64(b, _mm512_loadu_si512(data + i + 64));
        c = _mm512_add_epi64(c, _mm512_loadu_si512(data + i + 128));
        d = _mm512_add_epi64(d, _mm512_loadu_si512(data + i + 192));
    }
    return (uint64_t)_mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
}
#else
#define read_avx512 read_plain
#endif

/* Reads memory and does nothing with it: what the kernels are measured against. Returns a sum, so that it is done. */
uint64_t chatglm_read(int isa, int threads, const void *data, i64 bytes) {
    uint64_t (*read)(const char *, i64) = isa == VNNI ? read_avx512 : read_plain;
    uint64_t sum = 0;
    #pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
    for (i64 part = 0; part < threads; part++) {
        i64 from = bytes / 64 * part / threads * 64, to = bytes / 64 * (part + 1) / threads * 64;
        sum += read((const char *)data + from, to - from);
    }
    return sum;
}
