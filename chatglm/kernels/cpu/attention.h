/* Attention of many tokens at once, for prompts. */
#pragma once

#include "layouts.h"
#include "team.h"

enum { WIDE = HEAD_MULTIPLE };              /* keys per tile */
enum { QUERIES = 252, SIX = 6 };            /* queries per job, and per multiplication */

/* to (6, 32) = or += a (6, count) . b (count, 32); a step is the distance between two rows. */
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

static i64 attention_floats(const Attention *job) { return (2 * QUERIES + 2 * WIDE) * job->head_dim + QUERIES * WIDE; }

/* Queries first..first + count of one head, over tiles of keys with an online softmax. */
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
        const i64 hidden = job->mask ? 0 : from - past - first;  /* this many queries come before all of these keys */
        const int begin = hidden > 0 ? (int)(hidden / SIX * SIX) : 0;
        load_numbers(job->key, job->type, kv_head * job->key_step + from * size, (int)(width * size), value);
        for (i64 i = 0; i < size; i++)  /* keys become columns; `value` is scratch space here */
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

/* Attention with head_dim a multiple of HEAD_MULTIPLE. Returns 0, or 1 if memory runs out. */
int chatglm_attention(int isa, int threads, const Attention *job) {
    const i64 floats = attention_floats(job), runs = (job->tokens + QUERIES - 1) / QUERIES;
    float *memory = malloc((size_t)(threads * floats) * sizeof(float) + 64);
    if (!memory) return 1;
    float *scratch = aligned((char *)memory);
    void (*look)(const Attention *, i64, i64, int, float *) = CHOOSE_AVX512(isa, attend_many);
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (i64 i = runs * job->heads - 1; i >= 0; i--) {  /* the longest first */
        const i64 first = i / job->heads * QUERIES, left = job->tokens - first;
        look(job, i % job->heads, first, left < QUERIES ? (int)left : QUERIES, scratch + thread_number() * floats);
    }
    free(memory);
    return 0;
}
