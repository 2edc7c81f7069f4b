/* Products with INT4 / INT8 weights (and with fp16 / bf16 ones) on a CPU. Built and called by cpu.py; knows no model.
 * Further down is what networks need around them where torch is slow: tokens through whole blocks, prompt attention.
 *
 * Weights are read as they are published: `out` rows of in * bits / 8 bytes, one scale a row. INT4: byte j holds column
 * 2j in its high nibble and column 2j + 1 in its low one, both two's complement.
 *
 * Activations are brought to fixed point, one scale (here: step) for every GROUP columns of a row, so that the inner
 * products are integer ones, exact until the group is done: 16 bits (`default`: +-32512, relative error some 3e-5) or 8
 * (`int8`). `exact` keeps them in fp32. Two families of kernels:
 *
 *   portable  plain C in loops that compilers turn into SIMD; compiled a second time for AVX2. 16-bit activations.
 *   VNNI      AVX-512 intrinsics. Its instruction multiplies unsigned with signed bytes: weights become unsigned by an
 *             offset (8 or 128) whose part of the sum is known from the activations, and 16-bit activations are split
 *             into two planes of bytes, q = 256 * high + low.
 *             1 or 2 rows (INT8 weights or activations: 4): dot products along one linear stream of weights, which is
 *             what memory serves fastest. Up to 8 of 16 bits: dot products of two outputs with four rows at a time.
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
#if defined(__clang__) || __GNUC__ >= 10
#define BF16 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif
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
enum { SHARE = 8 };                                    /* groups of a few rows that may share a step */
enum { FEW_ROWS = 8, FOUR = 4, FEW_OUTS = 64 };       /* rows of x that go four at a time, and outputs of a run */
enum { MOST_RUNS = 64 };                               /* of SHARE groups, in a few rows: up to 65536 columns */
enum { CHUNK = 32 };                                   /* blocks of four rows that stay in the L1 cache */
enum { RUN = 16 };                                     /* outputs whose half-precision weights stay in the L2 cache */
enum { PORTABLE_ROWS = 8 };                            /* rows of x one pass of the portable kernel takes */
enum { TILE = 64, TILE_ROWS = 512, MICRO_ROWS = 6 };   /* outputs a tile; rows of x it meets; rows in registers */
enum { AHEAD = 8192 };                                 /* bytes the weights are asked for before they are needed */

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
    i64 share;                              /* groups of a row that may have the same step */
    i64 pass;                               /* rows that the kernels take at a time */
    int tiles, few;                         /* whether they are those of tiles, or of a few rows */
    const void *x, *scale;
    const uint8_t *weight;
    void *y;
    i64 block_bytes;                        /* of one row and group in `blocks` */
    char *blocks;                           /* floats, int16 or byte planes, in the order in which weights unpack */
    float *step;                            /* what one unit of a fixed-point activation is worth */
    int32_t *correction;                    /* minus the offset of unsigned weights times the sum of activations */
    float *sums;                            /* of a tile, for each thread */
} Job;

INLINE char *block_of(const Job *job, i64 group, i64 row) {
    i64 first = 0, count = job->rows;
    if (job->few) {  /* each FOUR rows by themselves: taken apart, they would share their places in the L1 cache */
        first = row / FOUR * FOUR;
        count = count - first < FOUR ? count - first : FOUR;
    }
    return job->blocks + (first * job->groups + group * count + row - first) * job->block_bytes;
}

/* Runs of groups that are prepared together. */
INLINE i64 runs_of(const Job *job) { return (job->groups + job->share - 1) / job->share; }

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

/* One group of activations as floats. */
AVX512 INLINE void load_group(const Job *job, i64 group, i64 row, __m512 *x) {
    const i64 start = group * GROUP, left = job->in - start, from = row * job->in + start;
    for (int v = 0; v < GROUP / 16; v++) {
        __mmask16 mask = left >= v * 16 + 16 ? 0xffff : left <= v * 16 ? 0 : (__mmask16)((1u << (left - v * 16)) - 1);
        if (job->x_type == FLOAT32) x[v] = _mm512_maskz_loadu_ps(mask, (const float *)job->x + from + v * 16);
        else x[v] = load_floats((const uint16_t *)job->x + from + v * 16, job->x_type, mask);
    }
}

/* Reads a run of `share` groups of activations as blocks of byte planes: low bytes last, even columns before odd ones
 * if INT4. They get the same step where that costs no more than a bit. */
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
    const int even = largest >= 0x7f800000u || bits_to_float(largest) <= 2 * bits_to_float(smallest);
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
        job->correction[index] = -_mm512_reduce_add_epi32(total) * (job->bits == 4 ? 8 : 128);
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

/* Sums of the lanes of four vectors, the lower half of each in the first four lanes, the other in the last. */
AVX512 INLINE __m256 add_across(__m512 a, __m512 b, __m512 c, __m512 d) {
    #define HALVES(v) _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1))
    return _mm256_hadd_ps(_mm256_hadd_ps(HALVES(a), HALVES(b)), _mm256_hadd_ps(HALVES(c), HALVES(d)));
    #undef HALVES
}

/* Rows of x by name: GCC keeps an array of so many sums in memory. */
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3)

/* y (FOUR, 2) += groups from..to of an output, and of that `stride` bytes further on, for rows first..first + count. An
 * activation serves both once it is loaded. `even`: for each run, whether its groups have the same step: their products
 * are summed as integers then. */
AVX512 INLINE void dot_pair(const Job *job, i64 out, i64 stride, i64 from, i64 to, i64 first, int count, int bits,
                            const uint8_t *even, float *y) {
    const i64 size = GROUP * bits / 8, whole = job->row_bytes / size;
    const uint8_t *weight = job->weight + out * job->row_bytes + from * size;
    const char *x = block_of(job, from, first);
    const float *steps = job->step + from * job->rows + first;
    #define DECLARE(r) __m512 sum_a##r = _mm512_setzero_ps(), sum_b##r = sum_a##r;
    #define BEGIN(r) __m512i low_a##r = _mm512_setzero_si512(), low_b##r = low_a##r, high_a##r = low_a##r, \
        high_b##r = low_a##r;
    #define ADD(r) if (r < count) { \
        const __m512i *at = (const __m512i *)(x + r * GROUP * 2); \
        __m512i one = at[0], two = at[1], three = at[2], four = at[3]; \
        __asm__("" : "+v"(one), "+v"(two), "+v"(three), "+v"(four));  /* loaded once, not with each product */ \
        high_a##r = dot4(dot4(high_a##r, before_a, one), after_a, two); \
        high_b##r = dot4(dot4(high_b##r, before_b, one), after_b, two); \
        low_a##r = dot4(dot4(low_a##r, before_a, three), after_a, four); \
        low_b##r = dot4(dot4(low_b##r, before_b, three), after_b, four); \
    }
    #define END(r) if (r < count) { \
        const __m512 step = _mm512_set1_ps(steps[r]); \
        low_a##r = _mm512_add_epi32(low_a##r, _mm512_slli_epi32(high_a##r, 8)); \
        low_b##r = _mm512_add_epi32(low_b##r, _mm512_slli_epi32(high_b##r, 8)); \
        sum_a##r = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_a##r), step, sum_a##r); \
        sum_b##r = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low_b##r), step, sum_b##r); \
    }
    EACH_ROW(DECLARE)
    for (i64 g = from, end; g < to; g = end) {
        end = !even[g / SHARE] ? g + 1 : g / SHARE * SHARE + SHARE < to ? g / SHARE * SHARE + SHARE : to;
        EACH_ROW(BEGIN)
        for (i64 i = g; i < end; i++, weight += size, x += count * GROUP * 2) {
            uint8_t padded[2][GROUP];
            const uint8_t *a = weight, *b = weight + stride;
            if (i == whole) {
                memset(padded, 0, sizeof padded);
                a = memcpy(padded[0], a, (size_t)bytes_in_group(job, i));
                b = memcpy(padded[1], b, (size_t)bytes_in_group(job, i));
            }
            for (i64 p = 0; p < size && !first; p += 64) {  /* the pair after the next */
                _mm_prefetch((const char *)weight + 4 * job->row_bytes + p, _MM_HINT_T0);
                _mm_prefetch((const char *)weight + 5 * job->row_bytes + p, _MM_HINT_T0);
            }
            const __m512i packed_a = _mm512_loadu_si512(a), packed_b = _mm512_loadu_si512(b);
            const __m512i before_a = bits == 4 ? even_columns(packed_a) : make_unsigned(packed_a);
            const __m512i before_b = bits == 4 ? even_columns(packed_b) : make_unsigned(packed_b);
            const __m512i after_a = bits == 4 ? odd_columns(packed_a) : make_unsigned(_mm512_loadu_si512(a + 64));
            const __m512i after_b = bits == 4 ? odd_columns(packed_b) : make_unsigned(_mm512_loadu_si512(b + 64));
            EACH_ROW(ADD)
        }
        EACH_ROW(END)
        steps += (end - g) * job->rows;
    }
    #undef DECLARE
    #undef BEGIN
    #undef ADD
    #undef END
    const __m256 first_rows = add_across(sum_a0, sum_b0, sum_a1, sum_b1);
    const __m256 other_rows = add_across(sum_a2, sum_b2, sum_a3, sum_b3);
    const __m256 low = _mm256_permute2f128_ps(first_rows, other_rows, 0x20);
    const __m256 high = _mm256_permute2f128_ps(first_rows, other_rows, 0x31);
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), _mm256_add_ps(low, high)));
}

/* Whether all groups of a run have the same step (or not-a-number), in each of rows first..first + FOUR. */
static int is_even(const Job *job, i64 run, i64 first) {
    const i64 end = (run + 1) * SHARE < job->groups ? (run + 1) * SHARE : job->groups;
    for (i64 r = first; r < first + FOUR && r < job->rows; r++)
        for (i64 g = run * SHARE + 1; g < end; g++)
            if (memcmp(job->step + g * job->rows + r, job->step + (g - 1) * job->rows + r, 4)) return 0;
    return 1;
}

/* Outputs from..to of a few rows of x in two planes: a run of outputs with some groups of all rows at a time. */
AVX512 INLINE void few_rows(const Job *job, i64 from, i64 to, int bits) {
    float excess[FEW_ROWS] = {0};  /* of weights that count as unsigned */
    for (i64 g = 0; g < job->groups; g++)
        for (i64 r = 0; r < job->rows; r++)
            excess[r] -= (float)job->correction[g * job->rows + r] * job->step[g * job->rows + r];
    const i64 fours = (job->rows + FOUR - 1) / FOUR, chunk = CHUNK / fours / SHARE * SHARE;
    uint8_t even[FEW_ROWS / FOUR][MOST_RUNS];
    for (i64 f = 0; f < fours; f++)
        for (i64 run = 0; run < runs_of(job); run++) even[f][run] = (uint8_t)is_even(job, run, f * FOUR);
    for (; from < to; from += FEW_OUTS) {
        const i64 outs = to - from < FEW_OUTS ? to - from : FEW_OUTS;
        float y[FEW_OUTS / 2][FEW_ROWS / FOUR][FOUR][2] = {0};
        for (i64 g = 0; g < job->groups; g += chunk) {
            const i64 end = g + chunk < job->groups ? g + chunk : job->groups;
            for (i64 o = 0; o < outs; o += 2)
                for (i64 first = 0; first < job->rows; first += FOUR) {
                    const i64 stride = o + 1 < outs ? job->row_bytes : 0;
                    const uint8_t *same = even[first / FOUR];
                    float *sums = y[o / 2][first / FOUR][0];
                    #define CASE(c) case c: dot_pair(job, from + o, stride, g, end, first, c, bits, same, sums); break;
                    switch (job->rows - first) { CASE(1) CASE(2) CASE(3) default: CASE(4) }
                    #undef CASE
                }
        }
        for (i64 o = 0; o < outs; o++) {
            const float scale = load_number(job->scale, job->scale_type, from + o);
            for (i64 r = 0; r < job->rows; r++)
                store_number(job->y, job->x_type, r * job->out + from + o,
                             (y[o / 2][r / FOUR][r % FOUR][o % 2] - excess[r]) * scale);
        }
    }
}

AVX512 static void few_vnni(const Job *job, i64 from, i64 to) {
    if (job->bits == 4) few_rows(job, from, to, 4);
    else few_rows(job, from, to, 8);
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

#ifdef BF16
/* The same where x is bfloat16 as well, pairs of which the CPU multiplies and adds. */
BF16 INLINE void dense_pairs(const uint16_t *weight, const uint16_t *x, i64 in, i64 from, i64 to, int count,
                             uint16_t *y, i64 out) {
    enum { STEP = 64 };
    for (i64 o = from; o < to; o++) {
        const uint16_t *row = weight + o * in;
        __m512 sums[DOT_ROWS][2];
        for (int r = 0; r < count; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        for (i64 i = 0; i < in; i += STEP) {
            for (int half = 0; half < 2; half++) {
                const i64 at = i + half * 32, left = in - at;
                const __mmask32 mask = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
                _mm_prefetch((const char *)(row + at) + AHEAD, _MM_HINT_T0);
                const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(mask, row + at);
                for (int r = 0; r < count; r++) {
                    const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * in + at);
                    sums[r][half] = _mm512_dpbf16_ps(sums[r][half], w, v);
                }
            }
        }
        for (int r = 0; r < count; r++)
            y[r * out + o] = float_to_bfloat(_mm512_reduce_add_ps(_mm512_add_ps(sums[r][0], sums[r][1])));
    }
}

BF16 static void dense_bf16(const uint16_t *weight, const uint16_t *x, i64 in, i64 from, i64 to, int count,
                            uint16_t *y, i64 out) {
    #define CASE(c) case c: dense_pairs(weight, x, in, from, to, c, y, out); break;
    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) }
    #undef CASE
}

static int has_bf16(void) { return __builtin_cpu_supports("avx512bf16") != 0; }
#elif X86
#define dense_bf16(...)
static int has_bf16(void) { return 0; }
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

static i64 padded(i64 bytes) { return (bytes + 63) / 64 * 64; }

/* Fills in what follows from isa, bits, rows, in and precision. */
static void plan(Job *job, int precision) {
    job->groups = (job->in + GROUP - 1) / GROUP;
    job->row_bytes = job->in * job->bits / 8;
    job->group_bytes = GROUP * job->bits / 8;
    job->levels = precision == EXACT ? 0 : precision == INT8 && job->isa == VNNI ? LEVELS8 : LEVELS16;
    job->block_bytes = !job->levels ? GROUP * 4 : job->levels == LEVELS8 ? GROUP : GROUP * 2;
    const i64 fitting = DOT_BYTES / (job->groups * job->block_bytes);
    const i64 most = fitting < 1 ? 1 : fitting > DOT_ROWS ? DOT_ROWS : fitting;
    job->few = job->isa == VNNI && job->levels == LEVELS16 && job->groups <= MOST_RUNS * SHARE &&
        job->rows <= FEW_ROWS && job->rows > (job->bits == 4 ? 2 : DOT_ROWS);
    job->share = job->few ? SHARE : 1;
    job->tiles = job->isa == VNNI && job->levels && job->rows > most && !job->few;
    job->pass = job->isa != VNNI || job->tiles || job->few || job->rows < most ? job->rows : most;
}

/* Bytes of the blocks of activations with their steps and corrections, and of sums; and where these are in `memory`. */
static i64 job_memory(const Job *job, int threads) {
    const i64 sums = job->tiles ? (i64)threads * TILE_ROWS * TILE * 4 : 0;
    return sums + job->groups * job->pass * (job->block_bytes + 8);
}

static void take_memory(Job *job, int threads, char *memory) {
    job->sums = (float *)memory;
    job->blocks = memory + (job->tiles ? (i64)threads * TILE_ROWS * TILE * 4 : 0);
    job->step = (float *)(job->blocks + job->groups * job->pass * job->block_bytes);
    job->correction = (int32_t *)(job->step + job->groups * job->pass);
}

/* For all threads of a team: the blocks of activations. The same thread does the same groups of a row every time. */
static void prepare_blocks(const Job *job, Meeting *meeting) {
    void (*prepare)(const Job *, i64, i64) = CHOOSE(job->isa, prepare);
#if X86
    if (job->isa == VNNI) prepare = job->levels ? prepare_vnni : prepare_floats;
#endif
    #pragma omp for schedule(static) nowait
    for (i64 b = 0; b < runs_of(job) * job->rows; b++) prepare(job, b / job->rows, b % job->rows);
    meet(meeting);
}

/* For all threads of a team: the outputs, where weights are read once for all rows (or, portable, for a few). Threads
 * do not wait for each other here. */
static void multiply_rows(const Job *job, int threads) {
#if X86
    if (job->tiles) {
        /* Few rows wait for memory, which likes one run a thread; of many, a thread held up should do less. */
        const i64 across = (job->out + TILE - 1) / TILE, all = across * ((job->rows + TILE_ROWS - 1) / TILE_ROWS);
        const i64 parts = job->rows > TILE ? threads * 4 : threads;
        #pragma omp for schedule(dynamic) nowait
        for (i64 part = 0; part < parts; part++)
            for (i64 t = all * part / parts; t < all * (part + 1) / parts; t++) {
                const i64 first = t / across * TILE_ROWS, left = job->rows - first;
                float *sums = job->sums + (i64)thread_number() * TILE_ROWS * TILE;
                tile_vnni(job, t % across * TILE, first, left < TILE_ROWS ? (int)left : TILE_ROWS, sums);
            }
        return;
    }
    if (job->isa == VNNI) {
        #pragma omp for schedule(static) nowait
        for (i64 part = 0; part < threads; part++) {
            const i64 from = job->out * part / threads, to = job->out * (part + 1) / threads;
            (!job->levels ? dot_floats_avx512 : job->few ? few_vnni : dot_vnni)(job, from, to);
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

/* For all threads of a team: the product, in passes. Threads do not wait for each other at the end. */
static void multiply(const Job *job, int threads, Meeting *meeting) {
    const i64 bytes = job->x_type == FLOAT32 ? 4 : 2;
    for (i64 first = 0; first < job->rows; first += job->pass) {
        Job pass = *job;
        pass.rows = job->rows - first < job->pass ? job->rows - first : job->pass;
        pass.x = (const char *)job->x + first * job->in * bytes;
        pass.y = (char *)job->y + first * job->out * bytes;
        if (first) meet(meeting);  /* the blocks of the last pass are read to the end */
        prepare_blocks(&pass, meeting);
        multiply_rows(&pass, threads);
    }
}

/* y (rows, out) = x (rows, in) . weight * scale, y in x's type. Returns 0, or 1 if there is no memory. */
int chatglm_linear(int isa, int threads, int precision, int bits, const void *x, int x_type, const void *weight,
                   const void *scale, int scale_type, void *y, i64 rows, i64 in, i64 out) {
    Job job = {.isa = isa, .bits = bits, .x_type = x_type, .scale_type = scale_type, .rows = rows, .in = in, .out = out,
               .x = x, .scale = scale, .weight = weight, .y = y};
    plan(&job, precision);
    char *memory = malloc((size_t)job_memory(&job, threads) + 64);
    if (!memory) return 1;
    take_memory(&job, threads, aligned(memory));
    Meeting meeting = {0};
    #pragma omp parallel num_threads(threads)
    multiply(&job, threads, &meeting);
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
    int pairs = 0;
#if X86
    pairs = isa == VNNI && x_type == BFLOAT16 && weight_type == BFLOAT16 && has_bf16();
#endif
    float *floats = pairs ? NULL : malloc((size_t)(rows * in) * 4 + 64);
    if (!pairs && !floats) return 1;
    for (i64 r = 0; r < rows && !pairs; r++) load_numbers(x, x_type, r * in, (int)in, floats + r * in);
    float (*dot)(const uint16_t *, int, const float *, i64) = CHOOSE(isa, dense);
    #pragma omp parallel num_threads(threads)
    {
#if X86
        if (isa == VNNI) {
            #pragma omp for schedule(static)
            for (i64 part = 0; part < threads; part++) {
                const i64 end = out * (part + 1) / threads;
                for (i64 from = out * part / threads; from < end; from += RUN)
                    for (i64 r = 0; r < rows; r += DOT_ROWS) {
                        const i64 to = from + RUN < end ? from + RUN : end;
                        const int count = rows - r < DOT_ROWS ? (int)(rows - r) : DOT_ROWS;
                        void *place = (char *)y + r * out * (x_type == FLOAT32 ? 4 : 2);
                        if (pairs) dense_bf16(weight, (const uint16_t *)x + r * in, in, from, to, count, place, out);
                        else dense_vnni(weight, weight_type, floats + r * in, in, from, to, count, place, x_type, out);
                    }
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

/* ------------------------------------------------------------- decoder blocks, for one token of each of a few rows */

enum { TOKENS = 16, HEADS = 4, MAX_HEAD = 256 };  /* of the cache, and query heads of a group, that are met at a time */

/* The layouts of these three are those of cpu.py. */
typedef struct {
    const void *weight, *scale, *bias;      /* bias: or NULL */
    i64 in, out;
    int bits, precision, scale_type, bias_type;
} Matrix;

typedef struct {
    const void *norm_weight[2], *norm_bias[2];  /* norm_bias: or NULL */
    const void *prefix_keys, *prefix_values;    /* (kv_heads, prefix, head_dim), or NULL; of cache_type as well */
    void *keys, *values;                        /* the cache has room for a token behind those that a row holds */
    i64 cache_row, cache_step;                  /* numbers from one row, or head, to the next */
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
    const i64 *past;                            /* for each row, how many tokens the cache holds */
    i64 rows, prefix;                           /* prefix: tokens that every row sees before those */
    i64 turns, angles, angle_row, angle_step;   /* `turns` tables, with distances between rows and between angles */
    int type, angle_type;
} Tokens;

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
INLINE void rotate(const Tokens *tokens, i64 row, i64 distance, float *head) {
    for (i64 t = 0, pair = 0; t < tokens->turns; t++)
        for (i64 i = 0; i < tokens->angles; i++, pair++) {
            const i64 angle = row * tokens->angle_row + i * tokens->angle_step;
            const float cosine = load_number(tokens->cos[t], tokens->angle_type, angle);
            const float sine = load_number(tokens->sin[t], tokens->angle_type, angle);
            const i64 place = pair / distance * 2 * distance + pair % distance;
            const float first = head[place], second = head[place + distance];
            head[place] = first * cosine - second * sine;
            head[place + distance] = second * cosine + first * sine;
        }
}

/* Head `head` of a row's queries, or (from `heads` on) of its keys and values: bias, rotation, a place in the cache. */
INLINE void place_head(const Tokens *tokens, const Block *block, i64 row, i64 head, float *fused) {
    const i64 size = block->head_dim, own = head - block->heads;
    if (own < 0) {
        add_bias(&block->fused, head * block->query_step, size, fused + head * block->query_step);
        rotate(tokens, row, block->distance, fused + head * block->query_step);
        return;
    }
    const i64 key = block->key_start + own * block->key_step, value = block->value_start + own * block->key_step;
    const i64 to = row * block->cache_row + own * block->cache_step + tokens->past[row] * size;
    add_bias(&block->fused, key, size, fused + key);
    add_bias(&block->fused, value, size, fused + value);
    rotate(tokens, row, block->distance, fused + key);
    store_numbers(block->keys, block->cache_type, to, (int)size, fused + key);
    store_numbers(block->values, block->cache_type, to, (int)size, fused + value);
}

/* Attention of a row's query heads first..first + count, which share a key head, over the prefix and then the cache; a
 * run of tokens at a time. */
INLINE void attend(const Tokens *tokens, const Block *block, i64 row, i64 first, int count,
                   const float *restrict fused, float *restrict context) {
    float tile[TOKENS * MAX_HEAD], weights[HEADS][TOKENS], largest[HEADS], sum[HEADS];
    const int size = (int)block->head_dim;
    const i64 kv_head = first * block->kv_heads / block->heads, all = tokens->prefix + tokens->past[row] + 1;
    for (int r = 0; r < count; r++) largest[r] = -INFINITY, sum[r] = 0;
    memset(context + first * size, 0, (size_t)(count * size) * sizeof(float));
    for (i64 token = 0, end; token < all; token = end) {
        const int before = token < tokens->prefix;
        const void *keys = before ? block->prefix_keys : block->keys;
        const void *values = before ? block->prefix_values : block->values;
        const i64 start = before ? (kv_head * tokens->prefix + token) * size
            : row * block->cache_row + kv_head * block->cache_step + (token - tokens->prefix) * size;
        const i64 left = (before ? tokens->prefix : all) - token;
        const int width = left < TOKENS ? (int)left : TOKENS;
        end = token + width;
        load_numbers(keys, block->cache_type, start, width * size, tile);
        for (int r = 0; r < count; r++) {
            const float *query = fused + (first + r) * block->query_step;
            float most = largest[r], factor;
            for (int t = 0; t < width; t++) {
                float score = 0;
                #pragma omp simd reduction(+ : score)
                for (int i = 0; i < size; i++) score += query[i] * tile[t * size + i];
                weights[r][t] = score * block->scaling;
                most = weights[r][t] > most ? weights[r][t] : most;
            }
            for (int t = width; t < TOKENS; t++) weights[r][t] = -INFINITY;
            factor = exponential(largest[r] - most);
            sum[r] *= factor;
            for (int t = 0; t < TOKENS; t++) weights[r][t] = exponential(weights[r][t] - most);
            for (int t = 0; t < width; t++) sum[r] += weights[r][t];
            float *to = context + (first + r) * size;
            for (int i = 0; i < size; i++) to[i] *= factor;
            largest[r] = most;
        }
        load_numbers(values, block->cache_type, start, width * size, tile);
        for (int r = 0; r < count; r++) {
            float *restrict to = context + (first + r) * size;
            for (int t = 0; t < width; t++)
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
    target static void attend_##suffix(const Tokens *tokens, const Block *block, i64 row, i64 first, int count, \
                                       const float *fused, float *context) { \
        attend(tokens, block, row, first, count, fused, context); \
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

enum { JOBS = 4, PARTS = 6 };  /* products of a block, and arrays of floats between them */

/* The products of a block and the arrays that their activations, of all rows, come from and go to, which lie in
 * `memory` (it may be NULL). Returns how many bytes of it are taken. */
static i64 list_jobs(const Block *block, int isa, int threads, i64 rows, char *memory, Job *jobs, float **parts) {
    const Matrix *matrices[JOBS] = {&block->fused, &block->dense, &block->up, &block->down};
    const int from[JOBS] = {0, 3, 0, 5}, to[JOBS] = {2, 1, 4, 1};
    i64 sizes[PARTS], bytes = 0, most = 0;
    for (int i = 0; i < JOBS; i++) sizes[from[i]] = matrices[i]->in, sizes[to[i]] = matrices[i]->out;
    for (int i = 0; i < PARTS; i++) {
        parts[i] = memory ? (float *)(memory + bytes) : NULL;
        bytes += padded(rows * sizes[i] * 4);
    }
    for (int i = 0; i < JOBS; i++) {
        const Matrix *one = matrices[i];
        jobs[i] = (Job){.isa = isa, .bits = one->bits, .x_type = FLOAT32, .scale_type = one->scale_type, .rows = rows,
                        .in = one->in, .out = one->out, .scale = one->scale, .weight = one->weight,
                        .x = parts[from[i]], .y = parts[to[i]]};
        plan(jobs + i, one->precision);
        if (memory) take_memory(jobs + i, threads, memory + bytes);  /* one after the other */
        most = job_memory(jobs + i, threads) > most ? job_memory(jobs + i, threads) : most;
    }
    return bytes + most;
}

/* For all threads of a team: the floats `hidden` of all rows through one block. The same thread has a row before, in
 * between and at the end. */
static void run_block(int isa, int threads, const Tokens *tokens, const Block *block, float *hidden, char *memory,
                      Meeting *meeting) {
    Job jobs[JOBS];
    float *parts[PARTS];
    list_jobs(block, isa, threads, tokens->rows, memory, jobs, parts);
    float *normed = parts[0], *result = parts[1], *fused = parts[2], *context = parts[3], *up = parts[4];
    float *active = parts[5];
    void (*norm)(const Block *, int, const float *, float *) = CHOOSE_BLOCK(isa, normalise);
    void (*look)(const Tokens *, const Block *, i64, i64, int, const float *, float *) = CHOOSE_BLOCK(isa, attend);
    void (*act)(const Block *, i64, i64, float *, float *) = CHOOSE_BLOCK(isa, activate);
    const i64 rows = tokens->rows, size = block->hidden, sharing = block->heads / block->kv_heads;
    const int together = sharing % HEADS == 0 ? HEADS : sharing % 2 == 0 ? 2 : 1;

    #pragma omp for schedule(static) nowait
    for (i64 r = 0; r < rows; r++) norm(block, 0, hidden + r * size, normed + r * size);
    meet(meeting);
    multiply(&jobs[0], threads, meeting);
    meet(meeting);
    #pragma omp for schedule(static) nowait
    for (i64 i = 0; i < rows * (block->heads + block->kv_heads); i++)
        place_head(tokens, block, i % rows, i / rows, fused + i % rows * jobs[0].out);
    meet(meeting);
    #pragma omp for schedule(static) nowait  /* a thread has some heads of all rows: these can differ in length */
    for (i64 i = 0; i < rows * block->heads / together; i++)
        look(tokens, block, i % rows, i / rows * together, together, fused + i % rows * jobs[0].out,
             context + i % rows * jobs[1].in);
    meet(meeting);
    multiply(&jobs[1], threads, meeting);
    meet(meeting);
    #pragma omp for schedule(static) nowait
    for (i64 r = 0; r < rows; r++) {
        add_residual(block, &block->dense, normed + r * size, result + r * size, hidden + r * size);
        norm(block, 1, hidden + r * size, normed + r * size);
    }
    meet(meeting);
    multiply(&jobs[2], threads, meeting);
    meet(meeting);
    #pragma omp for schedule(static) nowait
    for (i64 i = 0; i < runs_of(&jobs[3]) * rows; i++) {
        const i64 most = GROUP * jobs[3].share, from = i / rows * most, left = block->down.in - from;
        act(block, from, left < most ? left : most, up + i % rows * jobs[2].out, active + i % rows * jobs[3].in);
    }
    if (jobs[3].pass < rows) meet(meeting);  /* in one pass, prepare_blocks gives each thread the same groups */
    multiply(&jobs[3], threads, meeting);
    meet(meeting);
    #pragma omp for schedule(static) nowait
    for (i64 r = 0; r < rows; r++)
        add_residual(block, &block->down, normed + r * size, result + r * size, hidden + r * size);
}

/* One token of each row through blocks, one after the other: y (rows, hidden) = what becomes of x. All in between is
 * floats: norms, products, rotation, attention over prefix and cache, residuals; and no thread has to wait for an
 * interpreter. Returns 0, or 1 if there is no memory. */
int chatglm_blocks(int isa, int threads, const Tokens *tokens, const Block *blocks, i64 count) {
    const i64 numbers = tokens->rows * blocks->hidden;
    Job jobs[JOBS];
    float *parts[PARTS];
    i64 most = 0;
    for (i64 i = 0; i < count; i++) {
        const i64 bytes = list_jobs(blocks + i, isa, threads, tokens->rows, NULL, jobs, parts);
        most = bytes > most ? bytes : most;
    }
    char *memory = malloc((size_t)(most + padded(numbers * 4) + 64));
    if (!memory) return 1;
    float *hidden = aligned(memory);
    char *scratch = (char *)hidden + padded(numbers * 4);
    Meeting meeting = {0};
    load_numbers(tokens->x, tokens->type, 0, (int)numbers, hidden);
    #pragma omp parallel num_threads(threads)
    for (i64 i = 0; i < count; i++) run_block(isa, threads, tokens, blocks + i, hidden, scratch, &meeting);
    store_numbers(tokens->y, tokens->type, 0, (int)numbers, hidden);
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

/* ----------------------------------------------------------------------------- the speed of memory and arithmetic */

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

#if X86
AVX512 static uint64_t multiply_avx512(i64 count) {
    enum { SUMS = 12 };
    const __m512i bytes = _mm512_set1_epi8(3);
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
    for (i64 n = 0; n < count; n += SUMS) {
        a = dot4(a, bytes, bytes), b = dot4(b, bytes, bytes), c = dot4(c, bytes, bytes), d = dot4(d, bytes, bytes);
        e = dot4(e, bytes, bytes), f = dot4(f, bytes, bytes), g = dot4(g, bytes, bytes), h = dot4(h, bytes, bytes);
        i = dot4(i, bytes, bytes), j = dot4(j, bytes, bytes), k = dot4(k, bytes, bytes), l = dot4(l, bytes, bytes);
    }
    a = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
    e = _mm512_add_epi32(_mm512_add_epi32(e, f), _mm512_add_epi32(g, h));
    i = _mm512_add_epi32(_mm512_add_epi32(i, j), _mm512_add_epi32(k, l));
    return (uint64_t)_mm512_reduce_add_epi32(_mm512_add_epi32(a, _mm512_add_epi32(e, i)));
}
#endif

/* Integer products of registers, `count` instructions of 64 a thread: what many rows are measured against. Returns a
 * sum, so that it is done; 0 if this CPU has no such instruction. */
uint64_t chatglm_multiply(int isa, int threads, i64 count) {
    uint64_t sum = 0;
#if X86
    if (isa == VNNI) {
        #pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
        for (int part = 0; part < threads; part++) sum += multiply_avx512(count + part);
    }
#endif
    (void)isa, (void)threads, (void)count;
    return sum;
}
