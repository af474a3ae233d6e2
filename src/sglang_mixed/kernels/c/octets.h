/* Eight bits a weight, [out, in] as in the file, with scales in blocks. */
#pragma once
#include "halves.h"

enum { FP8 = 0, INT8 = 1 };

/* Scales of `type` in blocks of height x width, [ceil(out / height), ceil(in / width)]; `inverse`: 1 / scale. */
typedef struct {
    const uint8_t *codes;
    const void *scales;
    long out, in, height, width;
    int kind, type, inverse;
} octets;

INLINE float scale_at(const octets *w, long row, long column)
{
    long across = (w->in + w->width - 1) / w->width;
    float scale = value_at(w->type, w->scales, row / w->height * across + column / w->width);
    return w->inverse ? 1 / scale : scale;
}

/* Columns from `k` on that share a scale, at most `most`. */
INLINE long run_at(const octets *w, long k, long most)
{
    return least(most, least(w->in, (k / w->width + 1) * w->width) - k);
}

/* The four rows from n on; those behind the end are the last one again. */
INLINE void rows_at(const octets *w, long n, long stop, long k, const uint8_t **from, float *scale)
{
    for (long i = 0; i < BLOCK; i++) {
        long row = least(n + i, stop - 1);
        from[i] = w->codes + row * w->in + k;
        scale[i] = scale_at(w, row, k);
    }
}

/* The CPU finds its way along a row by itself, but not to the next one, which is in another page. */
INLINE void prefetch_next(const octets *w, long n)
{
    for (long i = 0; i < BLOCK; i++)
        __builtin_prefetch(w->codes + (n + BLOCK + i) * w->in);
}

INLINE void write_sums(matrix y, long out, long rows, long n, long stop, const block *total)
{
    for (long r = 0; r < rows; r++) {
        float sums[BLOCK];
        for (long i = 0; i < BLOCK; i++)
            sums[i] = sum(total[r][i]);
        write_floats(y, r * out + n, least(BLOCK, stop - n), sums);
    }
}
