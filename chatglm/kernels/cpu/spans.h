/* Attention of one token over the prefix and the cache, in spans of tokens: each is read once, for all query heads that
 * share a key head, and threads can take the spans of one sequence. https://arxiv.org/abs/2205.14135, section 3 */
#pragma once

#include "spans_avx512.h"
#include "spans_int8.h"

enum { SPAN_TOKENS = 256, SPANS = 4 };  /* the fewest tokens in one of several spans; spans per thread */

/* context (head_dim) of one head = what its spans found, the results of which are `step` floats apart. */
INLINE void merge_spans(const Block *block, const float *result, i64 count, i64 step, float *restrict context) {
    const i64 size = block->head_dim;
    float most = -INFINITY, sum = 0;
    for (i64 s = 0; s < count; s++) most = result[s * step + size + 1] > most ? result[s * step + size + 1] : most;
    memset(context, 0, (size_t)size * sizeof(float));
    for (i64 s = 0; s < count; s++) {
        const float *from = result + s * step, factor = exponential(from[size + 1] - most);
        sum += from[size] * factor;
        for (i64 i = 0; i < size; i++) context[i] += from[i] * factor;
    }
    for (i64 i = 0; i < size; i++) context[i] /= sum;
}

/* The spans of all rows. A row has the same number of them for each group of query heads. */
typedef struct { i64 sharing, groups, length; } SpanPlan;

static SpanPlan plan_spans(const Tokens *tokens, const Block *block, int threads) {
    SpanPlan plan = {.sharing = block->heads / block->kv_heads};
    i64 work = 0;
    plan.groups = block->kv_heads * ((plan.sharing + LANES - 1) / LANES);
    for (i64 r = 0; r < tokens->rows; r++) work += (tokens->prefix[r] + tokens->past[r] + 1) * plan.groups;
    plan.length = work / (threads * SPANS) + 1;
    if (plan.length < SPAN_TOKENS) plan.length = SPAN_TOKENS;
    plan.length = (plan.length + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
    return plan;
}

INLINE i64 spans_of(const SpanPlan *plan, const Tokens *tokens, i64 row) {
    return (tokens->prefix[row] + tokens->past[row] + plan->length) / plan->length;
}

static i64 count_spans(const SpanPlan *plan, const Tokens *tokens) {
    i64 count = 0;
    for (i64 r = 0; r < tokens->rows; r++) count += spans_of(plan, tokens, r) * plan->groups;
    return count;
}

/* Called by all threads of a team: context (rows, heads * head_dim) of all rows; fused (rows, fused_step) has the
 * queries. */
static void attend_cached(int isa, const SpanPlan *plan, const Tokens *tokens, const Block *block, const float *fused,
                          i64 fused_step, float *context, float *memory, Member *me) {
    const i64 floats = result_floats(block), step = LANES * floats, per_head = plan->groups / block->kv_heads;
    void (*few)(const Tokens *, const Block *, const Span *) = CHOOSE_AVX512(isa, few);
    void (*many)(const Tokens *, const Block *, const Span *) = CHOOSE_AVX512(isa, many);
#ifdef BF16
    const int fits = block->cache_type == BFLOAT16 && block->head_dim % BF16_DIMS == 0;
    if (isa == VNNI && fits && has_bf16()) many = many_bf16;
#endif
#if X86
    if (isa == VNNI && block->cache_type == SCALED_INT8) few = few_int8, many = many_int8;
#endif
    const i64 count = count_spans(plan, tokens);
    for (i64 chunk; (chunk = next_chunk(me, count, AGAIN)) >= 0;) {
        i64 row = 0, at = chunk;
        while (at >= spans_of(plan, tokens, row) * plan->groups) at -= spans_of(plan, tokens, row++) * plan->groups;
        const i64 spans = spans_of(plan, tokens, row), group = at / spans, from = at % spans * plan->length;
        const i64 all = tokens->prefix[row] + tokens->past[row] + 1, kv_head = group / per_head;
        const i64 skipped = group % per_head * LANES, left = plan->sharing - skipped;
        const Span span = {.row = row, .kv_head = kv_head, .from = from,
                           .to = from + plan->length < all ? from + plan->length : all,
                           .heads = left < LANES ? (int)left : LANES,
                           .query = fused + row * fused_step + (kv_head * plan->sharing + skipped) * block->query_step,
                           .result = (float *)me->memory};
        (span.heads > FEW_HEADS ? many : few)(tokens, block, &span);
        if (claim(me)) memcpy(memory + chunk * step, me->memory, (size_t)(span.heads * floats) * sizeof(float));
    }
    SHARE_OUT(me, tokens->rows * block->heads, i) {
        const i64 row = i / block->heads, head = i % block->heads, own = head % plan->sharing;
        const i64 spans = spans_of(plan, tokens, row);
        i64 first = (head / plan->sharing * per_head + own / LANES) * spans;
        for (i64 r = 0; r < row; r++) first += spans_of(plan, tokens, r) * plan->groups;
        merge_spans(block, memory + first * step + own % LANES * floats, spans, step, context + i * block->head_dim);
    }
}
