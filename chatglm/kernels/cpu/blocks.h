/* Decoder blocks, for one token of each of a few rows: everything between the products, in float32. */
#pragma once

#include "layouts.h"
#include "products.h"
#include "spans.h"

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

/* The residual stream: hidden = residual_scale * (`normed` or hidden itself) + the matrix's result. */
INLINE void add_residual(const Block *block, const Matrix *matrix, const float *normed, float *result, float *hidden) {
    add_bias(matrix, 0, block->hidden, result);
    const float *residual = block->residual_normed ? normed : hidden;
    for (i64 i = 0; i < block->hidden; i++) hidden[i] = residual[i] * block->residual_scale + result[i];
}

/* Rotates one head in place. */
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

/* One head of a row: a query head or, from `heads` on, a key and a value head. Bias, rotation, writing to the cache. */
INLINE void place_head(const Tokens *tokens, const Block *block, i64 row, i64 head, float *fused) {
    const i64 size = block->head_dim, own = head - block->heads;
    if (own < 0) {
        add_bias(&block->fused, head * block->query_step, size, fused + head * block->query_step);
        rotate(tokens, row, block->distance, fused + head * block->query_step);
        return;
    }
    const i64 key = block->key_start + own * block->key_step, value = block->value_start + own * block->key_step;
    const i64 at = tokens->past[row] * row_numbers(block->cache_type, size);
    const i64 to = tokens->lines[row] * block->cache_row + own * block->cache_step + at;
    add_bias(&block->fused, key, size, fused + key);
    add_bias(&block->fused, value, size, fused + value);
    rotate(tokens, row, block->distance, fused + key);
    if (block->cache_type == SCALED_INT8) {
        store_scaled((char *)block->keys + to, size, fused + key);
        store_scaled((char *)block->values + to, size, fused + value);
        return;
    }
    store_numbers(block->keys, block->cache_type, to, (int)size, fused + key);
    store_numbers(block->values, block->cache_type, to, (int)size, fused + value);
}

/* The activation of the MLP, for one group of columns: SwiGLU, gate * sigmoid(gate) * up; or GELU. */
INLINE void activate(const Block *block, i64 from, i64 count, float *restrict up, float *restrict to) {
    if (block->gated) {
        float *restrict gate = up, *restrict linear = up + block->down.columns;
        add_bias(&block->up, from, count, gate + from);
        add_bias(&block->up, block->down.columns + from, count, linear + from);
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
    target static void activate_##suffix(const Block *block, i64 from, i64 count, float *up, float *to) { \
        activate(block, from, count, up, to); \
    }

BLOCK_KERNELS(plain, )
#if X86
BLOCK_KERNELS(avx2, AVX2)
BLOCK_KERNELS(avx512, AVX512)
#endif

enum { FUSED, DENSE, UP, DOWN, JOBS };                              /* the products of a block */
enum { NORMED, RESULT, PROJECTED, CONTEXT, INNER, ACTIVE, PARTS };  /* the arrays of floats between them */

/* Lists the products of a block, and the arrays in `memory` that they read and write, each for all rows. Returns the
 * bytes of memory that this takes; with `memory` NULL it only counts them. */
static i64 list_jobs(const Block *block, int isa, int threads, i64 rows, char *memory, Job *jobs, float **parts) {
    const Matrix *matrices[JOBS] = {&block->fused, &block->dense, &block->up, &block->down};
    const int from[JOBS] = {NORMED, CONTEXT, NORMED, ACTIVE}, to[JOBS] = {PROJECTED, RESULT, INNER, RESULT};
    i64 sizes[PARTS], bytes = 0, most = 0;
    for (int i = 0; i < JOBS; i++) sizes[from[i]] = matrices[i]->columns, sizes[to[i]] = matrices[i]->outputs;
    for (int i = 0; i < PARTS; i++) {
        parts[i] = memory ? (float *)(memory + bytes) : NULL;
        bytes += padded(rows * sizes[i] * 4);
    }
    for (int i = 0; i < JOBS; i++) {
        const Matrix *one = matrices[i];
        jobs[i] = (Job){.isa = isa, .bits = one->bits, .x_type = FLOAT32, .scale_type = one->scale_type, .rows = rows,
                        .in = one->columns, .out = one->outputs, .scale = one->scale, .weight = one->weight,
                        .x = parts[from[i]], .y = parts[to[i]]};
        plan(jobs + i, one->precision, threads);
        if (memory) take_memory(jobs + i, memory + bytes);  /* shared: they run one after another */
        most = larger(most, job_memory(jobs + i));
    }
    return bytes + padded(most);
}

/* Called by all threads of a team: runs one block, which updates the floats `hidden` of all rows. */
static void run_block(int isa, int threads, const Tokens *tokens, const Block *block, float *hidden, float *spans,
                      char *memory, Member *me) {
    Job jobs[JOBS];
    float *parts[PARTS];
    list_jobs(block, isa, threads, tokens->rows, memory, jobs, parts);
    float *normed = parts[NORMED], *result = parts[RESULT], *fused = parts[PROJECTED], *context = parts[CONTEXT];
    float *up = parts[INNER], *active = parts[ACTIVE];
    void (*norm)(const Block *, int, const float *, float *) = CHOOSE_AVX512(isa, normalise);
    void (*act)(const Block *, i64, i64, float *, float *) = CHOOSE_AVX512(isa, activate);
    const i64 rows = tokens->rows, size = block->hidden;
    const SpanPlan plan = plan_spans(tokens, block, threads);

    SHARE_OUT(me, rows, r) norm(block, 0, hidden + r * size, normed + r * size);
    multiply(&jobs[FUSED], me);
    SHARE_OUT(me, rows * (block->heads + block->kv_heads), i)
        place_head(tokens, block, i % rows, i / rows, fused + i % rows * jobs[FUSED].out);
    attend_cached(isa, &plan, tokens, block, fused, jobs[FUSED].out, context, spans, me);
    multiply(&jobs[DENSE], me);
    SHARE_OUT(me, rows, r) {
        add_residual(block, &block->dense, normed + r * size, result + r * size, hidden + r * size);
        norm(block, 1, hidden + r * size, normed + r * size);
    }
    multiply(&jobs[UP], me);
    SHARE_OUT(me, jobs[DOWN].groups * rows, i) {
        const i64 from = i / rows * GROUP, left = block->down.columns - from;
        act(block, from, left < GROUP ? left : GROUP, up + i % rows * jobs[UP].out, active + i % rows * jobs[DOWN].in);
    }
    multiply(&jobs[DOWN], me);
    SHARE_OUT(me, rows, r)
        add_residual(block, &block->down, normed + r * size, result + r * size, hidden + r * size);
}

/* Runs one token of each row through `count` blocks, from x to y (rows, hidden). Norms, products, rotation, attention
 * over prefix and cache, and residuals are all in float32, and no thread has to wait for the Python interpreter.
 * Returns 0, or 1 if memory runs out. */
int chatglm_blocks(int isa, int threads, const Tokens *tokens, const Block *blocks, i64 count) {
    const i64 hidden_bytes = padded(tokens->rows * blocks->hidden * 4);
    Job jobs[JOBS];
    float *parts[PARTS];
    i64 bytes = 0, span_bytes = 0, chunks = 0, result = 0;
    for (i64 i = 0; i < count; i++) {
        const SpanPlan plan = plan_spans(tokens, blocks + i, threads);
        const i64 one = LANES * result_floats(blocks + i) * (i64)sizeof(float), spans = count_spans(&plan, tokens);
        bytes = larger(bytes, list_jobs(blocks + i, isa, threads, tokens->rows, NULL, jobs, parts));
        span_bytes = larger(span_bytes, padded(spans * one));
        chunks = larger(chunks, spans), result = larger(result, one);
        for (int j = 0; j < JOBS; j++) {
            chunks = larger(chunks, count_chunks(jobs + j));
            result = larger(result, chunk_bytes(jobs + j));
        }
    }
    const i64 team_bytes = team_memory(threads, chunks, result);
    char *memory = malloc((size_t)(hidden_bytes + span_bytes + bytes + team_bytes + 64));
    if (!memory) return 1;
    float *hidden = aligned(memory), *spans = (float *)((char *)hidden + hidden_bytes);
    char *scratch = (char *)spans + span_bytes;
    Team team = make_team(threads, chunks, scratch + bytes);
    load_numbers(tokens->x, tokens->type, 0, (int)(tokens->rows * blocks->hidden), hidden);
    #pragma omp parallel num_threads(threads)
    {
        Member me = join_team(&team, chunks, result);
        for (i64 i = 0; i < count; i++) run_block(isa, threads, tokens, blocks + i, hidden, spans, scratch, &me);
    }
    store_numbers(tokens->y, tokens->type, 0, (int)(tokens->rows * blocks->hidden), hidden);
    free(memory);
    return 0;
}
