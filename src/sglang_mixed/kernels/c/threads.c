/* A job shared by the threads that torch's OpenMP runtime has at hand: ones of our own would wait while these, between
 * torch's operations, keep the cores busy. The runtime is not linked, because torch brings its own; Python passes its
 * functions.
 */
#include "vectors.h"

typedef int part(const void *job, long start, long stop);

typedef struct {
    part *run;
    const void *job;
    int (*number)(void), (*count)(void);
    long start, stop, step;
    int result;
} sharing;

static void run_share(void *data)
{
    sharing *s = data;
    /* There may be fewer threads than were asked for. */
    for (long low = s->start + s->number() * s->step; low < s->stop; low += s->count() * s->step)
        if (s->run(s->job, low, least(low + s->step, s->stop)))
            __atomic_store_n(&s->result, 1, __ATOMIC_RELAXED);
}

/* Parts of `step` of [start, stop), each by a thread of its own; 1 if one returned it. The last three are GOMP_parallel,
 * omp_get_thread_num and omp_get_num_threads. */
int run_shared(part *run, const void *job, long start, long stop, long step, long threads,
               void (*parallel)(void (*)(void *), void *, unsigned, unsigned), int (*number)(void), int (*count)(void))
{
    sharing s = {run, job, number, count, start, stop, step, 0};
    parallel(run_share, &s, threads, 0);
    return s.result;
}
