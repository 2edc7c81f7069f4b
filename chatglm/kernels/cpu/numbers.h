/* Conversion between half precision and floats, rounding to nearest even as torch does; and e^x. */
#pragma once

#include "targets.h"

enum { FLOAT32, FLOAT16, BFLOAT16 };  /* element types in memory */

/* Rows of a KV cache may also be scaled bytes: `size` signed bytes, then a float that is the value of one unit. */
enum { SCALED_INT8 = 3, SCALE_BYTES = 4, BYTE_LEVELS = 127 };

enum { LANES = 16 };                   /* floats per vector; smaller registers hold a part of it */
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quarter __attribute__((vector_size(16), aligned(4), may_alias));

INLINE i64 bytes_of(int type) { return type == FLOAT32 ? 4 : 2; }

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

INLINE float scale_of(const char *row, i64 size) { float scale; memcpy(&scale, row + size, SCALE_BYTES); return scale; }

INLINE void load_scaled(const char *row, i64 size, float *restrict to) {
    const float scale = scale_of(row, size);
    for (i64 i = 0; i < size; i++) to[i] = (float)(signed char)row[i] * scale;
}

/* If a number is NaN or infinite, the whole row becomes NaN. */
INLINE void store_scaled(char *restrict row, i64 size, const float *restrict from) {
    uint32_t largest = 0;  /* the bits of a magnitude: compared as integers, NaN is the largest */
    for (i64 i = 0; i < size; i++) {
        const uint32_t magnitude = float_to_bits(from[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = 0, inverse = 0;
    if (largest >= 0x7f800000u) scale = NAN;
    else if (bits_to_float(largest) > 1e-33f)
        scale = bits_to_float(largest) / BYTE_LEVELS, inverse = BYTE_LEVELS / bits_to_float(largest);
    for (i64 i = 0; i < size; i++)  /* adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits */
        row[i] = (char)float_to_bits(from[i] * inverse + 12582912.0f);
    memcpy(row + size, &scale, SCALE_BYTES);
}

/* e^x with x clamped to -87..88, relative error 1e-7; plain arithmetic, so that compilers turn it into SIMD. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;  /* in this order, NaN stays NaN */
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

#if X86
/* Loads 16 half-precision values as floats; zeros where the mask is 0. */
AVX512 INLINE __m512 load_floats(const uint16_t *from, int type, __mmask16 mask) {
    __m256i bits = mask == 0xffff ? _mm256_loadu_si256((const void *)from) : _mm256_maskz_loadu_epi16(mask, from);
    if (type == FLOAT16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* The same from numbers of any type. */
AVX512 INLINE __m512 load_any(const void *from, int type, __mmask16 mask) {
    return type == FLOAT32 ? _mm512_maskz_loadu_ps(mask, from) : load_floats(from, type, mask);
}
#endif
