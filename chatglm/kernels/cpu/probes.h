/* The speed of memory and of arithmetic, with which benchmarks compare the kernels. No model needs this. */
#pragma once

#include "products_dots.h"

static uint64_t read_plain(const char *data, i64 bytes) {
    uint64_t sum = 0, word;
    for (i64 i = 0; i + 8 <= bytes; i += 8) memcpy(&word, data + i, 8), sum += word;
    return sum;
}

#if X86
AVX512 static uint64_t read_avx512(const char *data, i64 bytes) {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (i64 i = 0; i + 256 <= bytes; i += 256) {
        for (int p = 0; p < 256; p += 64) _mm_prefetch(data + i + 8192 + p, _MM_HINT_T0);
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

/* Reads memory and does nothing else. Returns a sum, so that the compiler keeps the reads. */
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

/* Integer products of registers: `count` instructions of 64 products in each thread. Returns a sum, so that the
 * compiler keeps them; 0 if this CPU has no such instruction. */
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
