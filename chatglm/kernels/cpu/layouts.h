/* What Python and C share: structs that library.py mirrors, and numbers that stand for types and the like. The table at
 * the end describes them; library.py compares its mirrors with it whenever it opens the library. */
#pragma once

#include "product.h"

enum { MAX_HEAD = 256 };       /* the largest head_dim of a Block */
enum { HEAD_MULTIPLE = 32 };   /* the head_dim of an Attention is a multiple of this */

/* A matrix with its bias: quantised; or, with bits = DENSE_BITS, of numbers of scale_type, without scales. */
typedef struct {
    const void *weight, *scale, *bias;      /* bias may be NULL */
    i64 columns, outputs;
    int bits, precision, scale_type, bias_type;
} Matrix;

/* A decoder block with its prefix and its place in the cache. */
typedef struct {
    const void *norm_weight[2], *norm_bias[2];  /* before attention and before the MLP; norm_bias may be NULL */
    /* For each row (kv_heads, prefix, head_dim) of prefix_type; not read for a row without a prefix. */
    const void *const *prefix_keys, *const *prefix_values;
    void *keys, *values;                        /* the cache, with room for one more token in each row */
    i64 cache_row, cache_step;                  /* elements from one row, or head, to the next */
    Matrix fused, dense, up, down;              /* for query, key and value; after attention; the two of the MLP */
    i64 hidden, heads, kv_heads, head_dim;
    i64 query_step, key_start, value_start, key_step;  /* where heads are in the output of `fused` */
    i64 distance;                                      /* between the two dims of a head that are rotated as a pair */
    float eps, residual_scale, scaling;
    /* A cache of SCALED_INT8 may have a prefix of any type, others one of their own type. */
    int norm_type, prefix_type, cache_type, rms, gated, residual_normed;
} Block;

/* One token of each row, to be run through blocks. */
typedef struct {
    const void *x, *cos[2], *sin[2];            /* x (rows, hidden) */
    void *y;                                    /* (rows, hidden) */
    const i64 *lines;                           /* for each row, the row of the cache that has its tokens */
    const i64 *past;                            /* for each row, how many tokens the cache holds */
    const i64 *prefix;                          /* for each row, how many tokens it sees before those of the cache */
    i64 rows;
    i64 turns, angles, angle_row, angle_step;   /* `turns` tables; steps between rows and between angles */
    int type, angle_type;
} Tokens;

/* Queries (heads, tokens, head_dim), keys and values (kv_heads, at least `keys`, head_dim), all of one type. */
typedef struct {
    const void *query, *key, *value, *mask;  /* mask: (tokens, keys) to add to the scores, or NULL: causal */
    void *y;                                 /* (tokens, heads, head_dim) */
    i64 heads, kv_heads, head_dim, tokens, keys, key_step, value_step, mask_step;  /* steps: between heads, or rows */
    int type;
    float scaling;
} Attention;

/* Describes a struct, a field or a number by its name; the last entry has no name. */
typedef struct {
    const char *name, *kind;
    i64 value;                               /* the offset of a field, the value of a number */
    i64 size;
} Entry;

#define KIND(value) _Generic((value), float: "float", int: "int", i64: "int64", Matrix: "struct", default: "pointer")
#define STRUCT(type) {#type, "struct", 0, sizeof(type)}
#define FIELD(type, field) \
    {#type "." #field, KIND(((type *)0)->field), offsetof(type, field), sizeof(((type *)0)->field)}
#define NUMBER(name) {#name, "number", name, 0}

const Entry *chatglm_layouts(void) {
    static const Entry entries[] = {
        NUMBER(PORTABLE), NUMBER(PORTABLE_AVX2), NUMBER(VNNI), NUMBER(DOTPROD), NUMBER(I8MM),
        NUMBER(FLOAT32), NUMBER(FLOAT16), NUMBER(BFLOAT16), NUMBER(SCALED_INT8), NUMBER(SCALE_BYTES),
        NUMBER(EXACT), NUMBER(DEFAULT), NUMBER(INT8),
        NUMBER(TO_L1), NUMBER(TO_L2), NUMBER(DENSE_BITS),
        NUMBER(MAX_HEAD), NUMBER(HEAD_MULTIPLE),

        STRUCT(Matrix), FIELD(Matrix, weight), FIELD(Matrix, scale), FIELD(Matrix, bias), FIELD(Matrix, columns),
        FIELD(Matrix, outputs), FIELD(Matrix, bits), FIELD(Matrix, precision), FIELD(Matrix, scale_type),
        FIELD(Matrix, bias_type),

        STRUCT(Block), FIELD(Block, norm_weight), FIELD(Block, norm_bias), FIELD(Block, prefix_keys),
        FIELD(Block, prefix_values), FIELD(Block, keys), FIELD(Block, values), FIELD(Block, cache_row),
        FIELD(Block, cache_step), FIELD(Block, fused), FIELD(Block, dense), FIELD(Block, up), FIELD(Block, down),
        FIELD(Block, hidden), FIELD(Block, heads), FIELD(Block, kv_heads), FIELD(Block, head_dim),
        FIELD(Block, query_step), FIELD(Block, key_start), FIELD(Block, value_start), FIELD(Block, key_step),
        FIELD(Block, distance), FIELD(Block, eps), FIELD(Block, residual_scale), FIELD(Block, scaling),
        FIELD(Block, norm_type), FIELD(Block, prefix_type), FIELD(Block, cache_type), FIELD(Block, rms),
        FIELD(Block, gated), FIELD(Block, residual_normed),

        STRUCT(Tokens), FIELD(Tokens, x), FIELD(Tokens, cos), FIELD(Tokens, sin), FIELD(Tokens, y),
        FIELD(Tokens, lines), FIELD(Tokens, past), FIELD(Tokens, prefix), FIELD(Tokens, rows), FIELD(Tokens, turns),
        FIELD(Tokens, angles), FIELD(Tokens, angle_row), FIELD(Tokens, angle_step), FIELD(Tokens, type),
        FIELD(Tokens, angle_type),

        STRUCT(Attention), FIELD(Attention, query), FIELD(Attention, key), FIELD(Attention, value),
        FIELD(Attention, mask), FIELD(Attention, y), FIELD(Attention, heads), FIELD(Attention, kv_heads),
        FIELD(Attention, head_dim), FIELD(Attention, tokens), FIELD(Attention, keys), FIELD(Attention, key_step),
        FIELD(Attention, value_step), FIELD(Attention, mask_step), FIELD(Attention, type), FIELD(Attention, scaling),
        {0},
    };
    return entries;
}
