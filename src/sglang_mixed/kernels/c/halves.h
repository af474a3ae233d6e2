/* x as integers of 16 bits, x = (256 * high + low) * step, for instructions that multiply octets exactly. A step serves
 * `unit` columns of a row, so that a large value costs its neighbours their last bits and no others.
 */
#pragma once
#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#define HAS_OCTET_DOTS 1
#else
#define HAS_OCTET_DOTS 0
#endif

#if HAS_OCTET_DOTS
/* Rows 2r and 2r + 1 are the high and the low halves of row r, [2 * rows, stride]; steps [rows, units]. */
typedef struct { int8_t *values; float *steps; long stride, unit, units; } halves;

/* `size` values, whole vectors; returns the step, NaN where not all of them are finite numbers. */
INLINE float split_some(const float *x, long size, int8_t *high, int8_t *low)
{
    __m512 most = _mm512_setzero_ps(), none = _mm512_setzero_ps();
    for (long k = 0; k < size; k += LANES) {
        __m512 v = _mm512_loadu_ps(x + k);
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
        none = _mm512_fmadd_ps(v, _mm512_setzero_ps(), none);
    }
    float step = fmaxf(_mm512_reduce_max_ps(most) / 32512, 0x1p-126f);
    __m512 inverse = _mm512_set1_ps(1 / step);
    for (long k = 0; k < size; k += LANES) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), inverse));
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128((__m128i *)(high + k), _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128((__m128i *)(low + k), _mm512_cvtepi32_epi8(whole)); /* wraps, as it should */
    }
    return step + _mm512_reduce_add_ps(none);
}

INLINE void free_halves(halves *h)
{
    free(h->values);
    free(h->steps);
}

/* 1 if there is no memory; the caller frees the halves. `unit`: whole vectors. */
static inline int split(halves *h, matrix x, long rows, long in, long unit)
{
    h->stride = padded(in);
    h->unit = unit;
    h->units = (in + unit - 1) / unit;
    h->values = rows_of(2 * rows, h->stride, 1);
    h->steps = rows_of(rows, h->units, sizeof *h->steps);
    float *row = rows_of(1, h->stride, sizeof *row);
    int failed = !h->values || !h->steps || !row;
    for (long r = 0; !failed && r < rows; r++) {
        int8_t *high = h->values + 2 * r * h->stride;
        to_floats(x.type, x.values, r * in, in, row);
        memset(row + in, 0, (h->stride - in) * sizeof *row);
        for (long k = 0, g = 0; k < in; k += unit, g++)
            h->steps[r * h->units + g] = split_some(row + k, least(unit, h->stride - k), high + k, high + h->stride + k);
    }
    free(row);
    if (failed)
        free_halves(h);
    return failed;
}

/* What x became, summed by unit, float32 [rows, units]; the caller frees them. */
static inline float *sums_of_halves(const halves *h, long rows)
{
    float *sums = rows_of(rows, h->units, sizeof *sums);
    for (long r = 0; sums && r < rows; r++)
        for (long g = 0; g < h->units; g++) {
            const int8_t *high = h->values + 2 * r * h->stride + g * h->unit, *low = high + h->stride;
            int32_t total = 0;
            for (long k = 0; k < least(h->unit, h->stride - g * h->unit); k++)
                total += 256 * high[k] + low[k];
            sums[r * h->units + g] = total;
        }
    return sums;
}
#endif
