/* Few rows of 16-bit x, as two integers of 8 bits each, times INT8: every product is exact. */
#pragma once
#include "octets.h"

#if HAS_OCTET_DOTS
typedef __m512i sums[BLOCK];

/* 64 columns; what the instruction multiplies is w + 128, without a sign. */
INLINE void multiply_octets(int rows, const __m512i *w, const int8_t *x, long stride, sums *acc)
{
    __m512i v[BLOCK];
    for (int i = 0; i < BLOCK; i++)
        v[i] = _mm512_xor_si512(w[i], _mm512_set1_epi8((char)0x80));
    for (int r = 0; r < rows; r++) {
        __m512i factor = _mm512_load_si512(x + r * stride);
        for (int i = 0; i < BLOCK; i++)
            acc[r][i] = _mm512_dpbusd_epi32(acc[r][i], v[i], factor);
    }
}

INLINE void octet_dots(int rows, const uint8_t **w, const int8_t *x, long stride, long size, sums *total)
{
    sums acc[BLOCK] = {0};
    __m512i v[BLOCK];
    long k = 0;
    for (; k + 64 <= size; k += 64) {
        for (int i = 0; i < BLOCK; i++)
            v[i] = _mm512_loadu_si512(w[i] + k);
        multiply_octets(rows, v, x + k, stride, acc);
    }
    if (k < size) {
        for (int i = 0; i < BLOCK; i++)
            v[i] = _mm512_maskz_loadu_epi8((1ULL << (size - k)) - 1, w[i] + k);
        multiply_octets(rows, v, x + k, stride, acc);
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            total[r][i] = acc[r][i];
}

enum { UNIT = 1024 };

/* Of one unit of columns, in x's steps. */
INLINE void add_unit(const uint8_t **w, const halves *h, long rows, long unit, long size, block *total)
{
    sums part[2 * MAX_ROWS];
    for (long r = 0; r < 2 * rows; r += BLOCK) {
        const int8_t *at = h->values + r * h->stride + unit * UNIT;
        2 * rows - r < BLOCK ? octet_dots(2, w, at, h->stride, size, part + r)
                             : octet_dots(4, w, at, h->stride, size, part + r);
    }
    for (long r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++) {
            __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(part[2 * r][i], 8), part[2 * r + 1][i]);
            total[r][i] += h->steps[r * h->units + unit] * (vec)_mm512_cvtepi32_ps(whole);
        }
}

static int product_in_integers(const octets *w, matrix x, matrix y, long rows, long start, long stop)
{
    halves h;
    if (split(&h, x, rows, w->in, UNIT))
        return 1;
    float *x_sums = sums_of_halves(&h, rows), surplus[MAX_ROWS] = {0};
    for (long r = 0; x_sums && r < rows; r++)
        for (long unit = 0; unit < h.units; unit++)
            surplus[r] += 128 * x_sums[r * h.units + unit] * h.steps[r * h.units + unit];
    for (long n = start; x_sums && n < stop; n += BLOCK) {
        block total[MAX_ROWS];
        const uint8_t *from[BLOCK];
        float scale[BLOCK] = {0}, found[BLOCK];
        memset(total, 0, rows * sizeof *total);
        for (long unit = 0; unit < h.units; unit++) {
            rows_at(w, n, stop, unit * UNIT, from, scale);
            if (unit + 1 == h.units)
                prefetch_next(w, n);
            add_unit(from, &h, rows, unit, least(UNIT, w->in - unit * UNIT), total);
        }
        for (long r = 0; r < rows; r++) {
            for (long i = 0; i < BLOCK; i++)
                found[i] = (sum(total[r][i]) - surplus[r]) * scale[i];
            write_floats(y, r * w->out + n, least(BLOCK, stop - n), found);
        }
    }
    free_halves(&h);
    free(x_sums);
    return !x_sums;
}
#endif
