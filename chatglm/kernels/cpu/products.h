/* The calls for quantised weights: products, computed by all threads of a team, and dequantisation. */
#pragma once

#include "dense.h"
#include "products_arm.h"
#include "products_avx2.h"
#include "products_few.h"
#include "products_portable.h"
#include "products_tiles.h"
#include "team.h"

/* Fills in the fields that follow from isa, bits, rows, in and precision. */
static void plan(Job *job, int precision) {
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
    job->few = job->isa == VNNI && job->levels == LEVELS16 && job->groups <= MOST_RUNS * SHARE &&
        job->rows <= FEW_ROWS && job->rows > (job->bits == 4 ? 2 : DOT_ROWS);
    job->tiles = job->isa == VNNI && job->levels && job->rows > most && !job->few;
    const int sharing = job->one && job->bits == 4 && job->levels == LEVELS16 && job->groups <= MOST_RUNS * SHARE;
    job->share = job->few || sharing ? SHARE : 1;
    job->pass = job->isa != VNNI || job->tiles || job->few || job->rows < most ? job->rows : most;
}

/* Bytes of scratch memory: sums, and blocks of activations with their steps and totals. */
static i64 job_memory(const Job *job, int threads) {
    const i64 sums = job->tiles ? (i64)threads * TILE_ROWS * TILE * 4 : 0;
    return sums + job->groups * job->pass * (job->block_bytes + 8);
}

/* Puts the arrays of the job into `memory`, which has job_memory bytes. */
static void take_memory(Job *job, int threads, char *memory) {
    job->sums = (float *)memory;
    job->blocks = memory + (job->tiles ? (i64)threads * TILE_ROWS * TILE * 4 : 0);
    job->step = (float *)(job->blocks + job->groups * job->pass * job->block_bytes);
    job->total = (int32_t *)(job->step + job->groups * job->pass);
}

/* Called by all threads of a team: writes the blocks of activations. The same thread always takes a group of a row. */
static void prepare_blocks(const Job *job, Meeting *meeting) {
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
    #pragma omp for schedule(static) nowait
    for (i64 b = 0; b < runs_of(job) * job->rows; b++) prepare(job, b / job->rows, b % job->rows);
    meet(meeting);
}

/* Called by all threads of a team: computes the outputs. Weights are read once for all rows (by portable kernels, once
 * per PORTABLE_ROWS). There is no barrier at the end. */
static void multiply_rows(const Job *job, int threads) {
    if (job->bits == DENSE_BITS) {
        void (*dense)(const Job *, i64, i64) = dense_kernel(job);
        #pragma omp for schedule(static) nowait
        for (i64 part = 0; part < threads; part++)
            dense(job, job->out * part / threads, job->out * (part + 1) / threads);
        return;
    }
#if X86
    if (job->tiles) {
        /* Memory limits few rows: one run of weights per thread is fastest. With many, a slow thread should do less. */
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
    if (job->isa == VNNI || job->one) {
        #pragma omp for schedule(static) nowait
        for (i64 part = 0; part < threads; part++) {
            const i64 from = job->out * part / threads, to = job->out * (part + 1) / threads;
            (job->one ? one_avx2 : !job->levels ? dot_floats_avx512 : job->few ? few_vnni : dot_vnni)(job, from, to);
        }
        return;
    }
#endif
#if ARM_DOTPROD
    if (is_arm(job)) {
        #pragma omp for schedule(static) nowait
        for (i64 part = 0; part < threads; part++)
            outputs_arm(job, job->out * part / threads, job->out * (part + 1) / threads);
        return;
    }
#endif
    void (*output)(const Job *, i64, i64, int) = CHOOSE(job->isa, output);
    #pragma omp for schedule(static) nowait
    for (i64 o = 0; o < job->out; o++)
        for (i64 first = 0; first < job->rows; first += PORTABLE_ROWS)
            output(job, o, first, job->rows - first < PORTABLE_ROWS ? (int)(job->rows - first) : PORTABLE_ROWS);
}

/* Called by all threads of a team: computes the product, in passes. There is no barrier at the end. */
static void multiply(const Job *job, int threads, Meeting *meeting) {
    const i64 bytes = job->x_type == FLOAT32 ? 4 : 2;
    for (i64 first = 0; first < job->rows; first += job->pass) {
        Job pass = *job;
        pass.rows = job->rows - first < job->pass ? job->rows - first : job->pass;
        pass.x = (const char *)job->x + first * job->in * bytes;
        pass.y = (char *)job->y + first * job->out * bytes;
        if (first) meet(meeting);  /* until all threads have read the blocks of the last pass */
        prepare_blocks(&pass, meeting);
        multiply_rows(&pass, threads);
    }
}

/* y (rows, out) = x (rows, in) . weight * scale, y in x's type. bits: 4 or 8; or DENSE_BITS, for weights of scale_type
 * without scales; the default precision then rounds the activations to bfloat16 if the weights are. Returns 0, or 1 if
 * memory runs out. */
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
