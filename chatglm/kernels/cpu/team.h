/* What the threads of a team share: the place where they wait for each other, and memory in whole cache lines. */
#pragma once

#include "targets.h"

/* Where the threads of a team wait for each other; initially all zero. */
typedef struct { int arrived, times; } Meeting;

/* A barrier that never puts a thread to sleep, but lets others run. OpenMP's own barrier sleeps at once where the
 * process has more threads than the machine has CPUs (because several Python threads use torch, for example): with
 * hundreds of barriers per token, a small model then took twice as long. Otherwise it spins for milliseconds while
 * another process needs the CPU. */
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
