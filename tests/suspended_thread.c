/* Two threads of a team, the first of which the system suspends: it stays in its first chunk until the second one has
 * been through all stages. Called by test_kernels_cpu_team.py. */
#include "team.h"

enum { STAGES = 6, CHUNKS = 10 };

/* Returns how many results are wrong. published: how often the suspended thread published its late result; taken: the
 * chunks that each thread computed. */
int run_with_suspended_thread(int *published, int *taken) {
    int results[STAGES][CHUNKS] = {{0}}, times[STAGES][CHUNKS] = {{0}}, there = 0, gone = 0, wrong = 0;
    char *memory = malloc((size_t)team_memory(2, CHUNKS, 4) + 64);
    if (!memory) return -1;
    Team team = make_team(2, CHUNKS, aligned(memory));
    #pragma omp parallel num_threads(2)
    {
        Member me = join_team(&team, CHUNKS, 4);
        int *mine = (int *)me.memory;
        if (me.thread) while (!__atomic_load_n(&there, __ATOMIC_ACQUIRE)) sched_yield();
        for (int stage = 0; stage < STAGES; stage++) {
            for (i64 chunk; (chunk = next_chunk(&me, CHUNKS, AGAIN)) >= 0;) {
                taken[me.thread]++;
                *mine = 100 * stage + (int)chunk;
                if (!me.thread && !stage && !__atomic_exchange_n(&there, 1, __ATOMIC_ACQ_REL)) {
                    while (!__atomic_load_n(&gone, __ATOMIC_ACQUIRE)) sched_yield();
                    *mine = -1;  /* what it reads after so long is of another stage */
                    *published += claim(&me);
                }
                if (claim(&me)) results[stage][chunk] = *mine, times[stage][chunk]++;
            }
            SHARE_OUT(&me, CHUNKS, i) results[stage][i] += 1000;
        }
        if (me.thread) __atomic_store_n(&gone, 1, __ATOMIC_RELEASE);
    }
    for (int stage = 0; stage < STAGES; stage++)
        for (int i = 0; i < CHUNKS; i++)
            wrong += results[stage][i] != 1000 + 100 * stage + i || times[stage][i] != 1;
    free(memory);
    return wrong;
}
