/* How the threads of a team share work, so that none waits for one that the system has suspended: other programs use
 * the CPUs too, and take a thread's place for milliseconds, in the middle of anything.
 *
 * All threads go through the same stages, each of some chunks of work, which they take as they come: first those of
 * their own share, so that each reads one linear stream of weights, then what is left of the shares of others. A stage
 * is over once its chunks are finished, whoever finished them; a thread that comes late finds nothing to do and goes on.
 * A chunk that stays unfinished for long is computed once more by a thread that would otherwise wait, if it is of a
 * kind that can be: one whose result comes to lie in memory of the thread. Who claims the chunk first, publishes it. */
#pragma once

#include <time.h>

#include "targets.h"

enum { ONCE, AGAIN };                 /* whether a chunk can be computed a second time */
enum { PATIENCE = 50000 };            /* nanoseconds to wait for a chunk, besides twice the time of an own one */
enum { SPINS = 128 };                 /* looks at what is finished between two at the clock */

/* What is taken of a thread's share: a stage, and how many chunks of it. On a cache line of its own. */
typedef struct { _Alignas(64) uint64_t taken; } Share;

/* What a team shares; initially all zero. `claimed` has the last stage in which a chunk of that number was claimed. */
typedef struct {
    _Alignas(64) i64 finished;        /* chunks of all stages */
    Share *shares;
    uint64_t *claimed;
} Team;

/* A thread of the team. */
typedef struct {
    Team *team;
    int thread, threads, claimed;     /* claimed: whether the chunk in work is the thread's to publish */
    uint64_t stage;
    i64 chunk, finished;              /* the chunk in work; the number of chunks of all earlier stages */
    i64 began, took;                  /* nanoseconds: when the chunk in work was taken, how long the last one took */
    char *memory;                     /* for results of a chunk */
} Member;

static void *aligned(char *memory) { return (void *)(((uintptr_t)memory + 63) & ~(uintptr_t)63); }

static i64 larger(i64 a, i64 b) { return a > b ? a : b; }

static i64 padded(i64 bytes) { return (bytes + 63) / 64 * 64; }

/* Bytes of memory for a team: with stages of up to `chunks` chunks, the results of each of which take `bytes`. */
static i64 team_memory(int threads, i64 chunks, i64 bytes) {
    return threads * ((i64)sizeof(Share) + padded(bytes)) + padded(chunks * 8);
}

/* A team in `memory`, of which it sets to zero what has to be. */
static Team make_team(int threads, i64 chunks, char *memory) {
    Team team = {.shares = (Share *)memory, .claimed = (uint64_t *)(memory + threads * (i64)sizeof(Share))};
    memset(memory, 0, (size_t)team_memory(threads, chunks, 0));
    return team;
}

/* Called by each thread, with the numbers that team_memory was given. */
static Member join_team(Team *team, i64 chunks, i64 bytes) {
    char *memory = (char *)team->claimed + padded(chunks * 8);
    return (Member){.team = team, .thread = thread_number(), .threads = team_size(), .stage = 1,
                    .memory = memory + thread_number() * padded(bytes)};
}

static i64 nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (i64)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Takes a chunk that nobody has taken; -1 if there is none. */
static i64 take_chunk(Member *me, i64 count) {
    for (int i = 0; i < me->threads; i++) {
        const int owner = (me->thread + i) % me->threads;
        const i64 first = count * owner / me->threads, size = count * (owner + 1) / me->threads - first;
        uint64_t *share = &me->team->shares[owner].taken, seen = __atomic_load_n(share, __ATOMIC_RELAXED);
        while (seen >> 32 <= me->stage) {  /* else the others are further: this stage is over */
            const i64 taken = seen >> 32 < me->stage ? 0 : (i64)(uint32_t)seen;
            if (taken == size) break;
            const uint64_t next = me->stage << 32 | (uint64_t)(taken + 1);
            if (__atomic_compare_exchange_n(share, &seen, next, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
                return first + taken;
        }
    }
    return -1;
}

/* Waits until all chunks are finished and returns -1; or returns one to be computed again. */
static i64 wait_or_repeat(Member *me, i64 count, int kind) {
    const Team *team = me->team;
    const i64 all = me->finished + count, until = me->began + PATIENCE + 2 * me->took;
    int patient = 1;
    for (i64 spin = 1; __atomic_load_n(&team->finished, __ATOMIC_ACQUIRE) < all; spin++) {
#if X86
        __builtin_ia32_pause();
#endif
        if (spin % SPINS) continue;
        patient = patient && nanoseconds() < until;
        if (patient) continue;
        for (i64 i = 0; i < count && kind == AGAIN; i++) {
            const i64 chunk = (count * me->thread / me->threads + i) % count;
            if (__atomic_load_n(&team->claimed[chunk], __ATOMIC_RELAXED) < me->stage) return chunk;
        }
        sched_yield();
    }
    return -1;
}

/* Called by all threads of a team: finishes the chunk in work and returns the next one of a stage of `count` chunks; -1
 * once all of them are finished. */
static i64 next_chunk(Member *me, i64 count, int kind) {
    const i64 now = kind == AGAIN ? nanoseconds() : 0;
    if (me->claimed) {
        __atomic_add_fetch(&me->team->finished, 1, __ATOMIC_ACQ_REL);
        if (kind == AGAIN) me->took = now - me->began;
    }
    me->began = now;
    me->chunk = take_chunk(me, count);
    if (me->chunk < 0) me->chunk = wait_or_repeat(me, count, kind);
    me->claimed = me->chunk >= 0 && kind == ONCE;
    if (me->chunk < 0) me->stage++, me->finished += count;
    return me->chunk;
}

/* Whether the thread may publish the result of its chunk: true for the first of those who computed it. */
static int claim(Member *me) {
    uint64_t *last = &me->team->claimed[me->chunk], seen = __atomic_load_n(last, __ATOMIC_RELAXED);
    while (seen < me->stage && !me->claimed)
        me->claimed = __atomic_compare_exchange_n(last, &seen, me->stage, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return me->claimed;
}

/* For all i from 0 to `total` - 1, in as many pieces as there are threads. */
#define SHARE_OUT(me, total, i) \
    for (i64 all_ = (total), pieces_ = all_ < (me)->threads ? all_ : (me)->threads, piece_; \
         (piece_ = next_chunk(me, pieces_, ONCE)) >= 0;) \
        for (i64 i = all_ * piece_ / pieces_; i < all_ * (piece_ + 1) / pieces_; i++)
