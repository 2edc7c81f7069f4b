/* The calls for quantised weights: products, computed by all threads of a team, and dequantisation. */
#pragma once

#include "dense.h"
#include "products_arm.h"
#include "products_avx2.h"
#include "products_few.h"
#include "products_portable.h"
#include "products_tiles.h"
#include "team.h"

enum { LEAST_BYTES = 1 << 15, CHUNK_BYTES = 1 << 18, CHUNK_OUTS = 1024 };  /* limits of a chunk: weights, outputs */

/* Outputs per chunk: few, so that threads end at nearly the same time, but so many that weights remain a stream. */
static i64 plan_chunk(const Job *job, int threads) {
    const i64 least = LEAST_BYTES / job->row_bytes, fair = larger(job->out / (4 * threads), least);
    i64 outs = CHUNK_BYTES / job->row_bytes;
    outs = outs < fair ? outs : fair;
    outs = outs < CHUNK_OUTS ? outs : CHUNK_OUTS;
    return job->tiles ? TILE : larger(outs / EIGHT * EIGHT, EIGHT);
}

/* Fills in the fields that follow from isa, bits, rows, in, out and precision. */
static void plan_kernels(Job *job, int precision) {
    job->groups = (job->in + GROUP - 1) / GROUP;
    if (job->bits == DENSE_BITS) {
#ifdef BF16
        job->pairs = job->isa == VNNI && precision != EXACT && job->scale_type == BFLOAT16 && has_bf16();
#endif
        job->row_bytes = job->in * bytes_of(job->scale_type);
        job->block_bytes = GROUP * (job->pairs ? 2 : 4);
        job->share = 1, job->pass = job->rows;
        return;
    }
    job->row_bytes = job->in * job->bits / 8;
    job->group_bytes = GROUP * job->bits / 8;
    /* 16-bit products of INT8 weights keep up with the L2 cache at a steady rate; those of byte planes do not. */
    const int words = job->isa == VNNI && job->bits == 8 && precision == DEFAULT && fetching == TO_L2;
    job->one = job->rows == 1 && precision != EXACT && (job->isa == PORTABLE_AVX2 || words);
    /* Whether activations are planes of bytes. */
    const int bytes = job->one ? job->bits == 4 : job->isa == VNNI || job->isa == DOTPROD || job->isa == I8MM;
    job->levels = precision == EXACT ? 0 : precision == INT8 && bytes ? LEVELS8 : LEVELS16;
    job->block_bytes = !job->levels ? GROUP * 4 : job->levels == LEVELS8 ? GROUP : GROUP * 2;
    const i64 fitting = DOT_BYTES / (job->groups * job->block_bytes);
    const i64 most = fitting < 1 ? 1 : fitting > DOT_ROWS ? DOT_ROWS : fitting;
    const i64 least = job->bits == 4 && job->levels == LEVELS16 && most > 2 ? 2 : most;
    const int is_slow = job->bits == 4 && job->levels == LEVELS8 && job->rows > FOUR;  /* tiles are faster */
    job->few = job->isa == VNNI && job->levels && !is_slow && job->groups <= MOST_RUNS * SHARE &&
        job->rows <= FEW_ROWS && job->rows > least;
    job->tiles = job->isa == VNNI && job->levels && job->rows > most && !job->few;
    const int sharing = job->one && job->bits == 4 && job->levels == LEVELS16 && job->groups <= MOST_RUNS * SHARE;
    job->share = (job->few && job->levels == LEVELS16) || sharing ? SHARE : 1;
    job->pass = job->isa != VNNI || job->tiles || job->few || job->rows < most ? job->rows : most;
}

static void plan(Job *job, int precision, int threads) {
    plan_kernels(job, precision);
    job->chunk = plan_chunk(job, threads);
}

static i64 count_chunks(const Job *job) {
    const i64 across = (job->out + job->chunk - 1) / job->chunk;
    return job->tiles ? across * ((job->rows + TILE_ROWS - 1) / TILE_ROWS) : across;
}

/* Bytes of the result of a chunk. */
static i64 chunk_bytes(const Job *job) {
    if (job->tiles) return TILE_ROWS * TILE * 4;
    return job->pass * job->chunk * bytes_of(job->x_type);
}

/* Bytes of scratch memory: blocks of activations with their steps and totals. */
static i64 job_memory(const Job *job) { return job->groups * job->pass * (job->block_bytes + 8); }

/* Puts the arrays of the job into `memory`, which has job_memory bytes. */
static void take_memory(Job *job, char *memory) {
    job->blocks = memory;
    job->step = (float *)(memory + job->groups * job->pass * job->block_bytes);
    job->total = (int32_t *)(job->step + job->groups * job->pass);
}

/* Called by all threads of a team: writes the blocks of activations. */
static void prepare_blocks(const Job *job, Member *me) {
    void (*prepare)(const Job *, i64, i64) = CHOOSE(job->isa, prepare);
    if (job->bits == DENSE_BITS) prepare = CHOOSE(job->isa, copy);
#ifdef BF16
    if (job->pairs) prepare = copy_pairs;
#endif
#if X86
    if (job->bits == DENSE_BITS) ;
    else if (job->one && job->bits == 4) prepare = prepare_planes;
    else if (job->isa == VNNI && !job->one) prepare = job->levels ? prepare_vnni : prepare_floats;
#endif
#if ARM_DOTPROD
    if (is_arm(job)) prepare = prepare_arm;
#endif
    SHARE_OUT(me, runs_of(job) * job->rows, b) prepare(job, b / job->rows, b % job->rows);
}

#define PORTABLE_OUTPUTS(suffix) \
    static void outputs_##suffix(const Job *job, i64 from, i64 to) { \
        for (; from < to; from++) \
            for (i64 first = 0, left; (left = job->rows - first) > 0; first += PORTABLE_ROWS) \
                output_##suffix(job, from, first, left < PORTABLE_ROWS ? (int)left : PORTABLE_ROWS); \
    }

PORTABLE_OUTPUTS(plain)
#if X86
PORTABLE_OUTPUTS(avx2)
#endif

/* The function that computes outputs from..to of all rows. */
static void (*kernel_of(const Job *job))(const Job *, i64, i64) {
    if (job->bits == DENSE_BITS) return dense_kernel(job);
#if X86
    if (job->one) return one_avx2;
    if (job->isa == VNNI) return !job->levels ? dot_floats_avx512 : job->few ? few_vnni : dot_vnni;
#endif
#if ARM_DOTPROD
    if (is_arm(job)) return outputs_arm;
#endif
    return CHOOSE(job->isa, outputs);
}

/* Called by all threads of a team: computes the outputs. Weights are read once for all rows (by portable kernels, once
 * per PORTABLE_ROWS). */
static void multiply_rows(const Job *job, Member *me) {
    const i64 count = count_chunks(job);
    i64 chunk;
#if X86
    if (job->tiles) {
        const i64 across = (job->out + TILE - 1) / TILE;  /* tiles */
        float *sums = (float *)me->memory;
        while ((chunk = next_chunk(me, count, AGAIN)) >= 0) {
            const i64 first = chunk / across * TILE_ROWS, left = job->rows - first, output = chunk % across * TILE;
            const int rows = left < TILE_ROWS ? (int)left : TILE_ROWS;
            tile_vnni(job, output, first, rows, sums);
            if (claim(me)) store_tile(job, output, first, rows, sums);
        }
        return;
    }
#endif
    void (*kernel)(const Job *, i64, i64) = kernel_of(job);
    const i64 bytes = bytes_of(job->x_type);
    while ((chunk = next_chunk(me, count, AGAIN)) >= 0) {
        const i64 from = chunk * job->chunk, left = job->out - from;
        Job part = *job;  /* the same product with these outputs only */
        part.out = left < job->chunk ? left : job->chunk;
        part.weight += from * job->row_bytes;
        if (job->scale) part.scale = (const char *)job->scale + from * bytes_of(job->scale_type);
        part.y = me->memory;
        kernel(&part, 0, part.out);
        for (i64 r = 0; r < job->rows && claim(me); r++)
            memcpy((char *)job->y + (r * job->out + from) * bytes, me->memory + r * part.out * bytes,
                   (size_t)(part.out * bytes));
    }
}

/* Called by all threads of a team: computes the product, in passes. */
static void multiply(const Job *job, Member *me) {
    const i64 bytes = bytes_of(job->x_type);
    for (i64 first = 0; first < job->rows; first += job->pass) {
        Job pass = *job;
        pass.rows = job->rows - first < job->pass ? job->rows - first : job->pass;
        pass.x = (const char *)job->x + first * job->in * bytes;
        pass.y = (char *)job->y + first * job->out * bytes;
        prepare_blocks(&pass, me);
        multiply_rows(&pass, me);
    }
}

/* y (rows, out) = x (rows, in) . weight * scale, y in x's type. bits: 4 or 8; or DENSE_BITS, for weights of scale_type
 * without scales; the default precision then rounds the activations to bfloat16 if the weights are. Returns 0, or 1 if
 * memory runs out. */
int chatglm_linear(int isa, int threads, int precision, int bits, const void *x, int x_type, const void *weight,
                   const void *scale, int scale_type, void *y, i64 rows, i64 in, i64 out) {
    Job job = {.isa = isa, .bits = bits, .x_type = x_type, .scale_type = scale_type, .rows = rows, .in = in, .out = out,
               .x = x, .scale = scale, .weight = weight, .y = y};
    plan(&job, precision, threads);
    const i64 chunks = count_chunks(&job), result = chunk_bytes(&job);
    char *memory = malloc((size_t)(padded(job_memory(&job)) + team_memory(threads, chunks, result) + 64));
    if (!memory) return 1;
    take_memory(&job, aligned(memory));
    Team team = make_team(threads, chunks, (char *)aligned(memory) + padded(job_memory(&job)));
    #pragma omp parallel num_threads(threads)
    {
        Member me = join_team(&team, chunks, result);
        multiply(&job, &me);
    }
    free(memory);
    return 0;
}

/* y (out, in) = weight * scale, rounded once to y's type. Returns 0, or 1 if memory runs out. */
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
        /* A row has only as many different values as a weight can have: look them up. */
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
