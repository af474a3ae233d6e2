/* Few rows of 16-bit x, as two integers of 8 bits each, times nibbles: exact within a group. A lane holds four columns
 * of one row. */
#pragma once
#include "nibbles.h"

#if HAS_OCTET_DOTS
typedef __m512i sums[BLOCK];
enum { LARGEST_UNIT = 512, PAGE = 4096 };

/* Four columns of a whole tile: vector i holds the rows 16i to 16i + 15. */
INLINE void four_columns(const uint8_t *tile, __m512i *out)
{
    __m512i place = _mm512_set_epi32(0x6F4F2F0F, 0x6E4E2E0E, 0x6D4D2D0D, 0x6C4C2C0C, 0x6B4B2B0B, 0x6A4A2A0A, 0x69492909,
                                     0x68482808, 0x67472707, 0x66462606, 0x65452505, 0x64442404, 0x63432303, 0x62422202,
                                     0x61412101, 0x60402000);
    __m512i first = _mm512_loadu_si512(tile), second = _mm512_loadu_si512(tile + 64), mask = _mm512_set1_epi8(15);
    for (int i = 0; i < 2; i++) {
        __m512i pairs = _mm512_permutex2var_epi8(first, place, second);
        out[i] = _mm512_and_si512(pairs, mask);
        out[i + 2] = _mm512_and_si512(_mm512_srli_epi32(pairs, 4), mask);
        place = _mm512_add_epi8(place, _mm512_set1_epi8(16));
    }
}

/* The same of a narrow tile, whose octets hold neighbours; lanes that it lacks become 0. */
INLINE void four_narrow_columns(const uint8_t *tile, long width, __m512i *out)
{
    uint8_t codes[BLOCK * LANES][4] = {0};
    for (long k = 0; k < 4; k++)
        for (long j = 0; j < width; j++)
            codes[j][k] = tile[(k * width + j) / 2] >> 4 * (j % 2) & 15;
    memcpy(out, codes, sizeof codes);
}

INLINE void multiply(int rows, const __m512i *w, const int8_t *x, long stride, sums *acc)
{
    for (int r = 0; r < rows; r++) {
        int32_t four;
        memcpy(&four, x + r * stride, sizeof four);
        __m512i factor = _mm512_set1_epi32(four);
        for (int i = 0; i < BLOCK; i++)
            acc[r][i] = _mm512_dpbusd_epi32(acc[r][i], w[i], factor);
    }
}

/* Decoding again for every two rows of x costs less than keeping what was decoded. */
INLINE void tile_dots(int rows, const uint8_t *tile, long width, const int8_t *x, long stride, long size, sums *total)
{
    sums acc[BLOCK] = {0};
    for (long k = 0; k < size; k += 4) {
        __m512i v[BLOCK];
        width == TILE ? four_columns(tile + k * TILE / 2, v) : four_narrow_columns(tile + k * width / 2, width, v);
        multiply(rows, v, x + k, stride, acc);
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            total[r][i] = acc[r][i];
}

/* The sums of one unit of a tile's columns, for every row of halves. */
INLINE void unit_dots(const nibbles *w, const halves *h, long rows, long n, long first, sums *total)
{
    long width = least(TILE, w->out - n);
    const uint8_t *tile = tile_at(w, n, first);
    prefetch(tile + PAGE, 1); /* the CPU finds its way through a page by itself, but not to the next one */
    for (long r = 0; r < rows; r += BLOCK) {
        const int8_t *x = h->values + r * h->stride + first;
        if (width == TILE)
            rows - r < BLOCK ? tile_dots(2, tile, TILE, x, h->stride, h->unit, total + r)
                             : tile_dots(4, tile, TILE, x, h->stride, h->unit, total + r);
        else
            rows - r < BLOCK ? tile_dots(2, tile, width, x, h->stride, h->unit, total + r)
                             : tile_dots(4, tile, width, x, h->stride, h->unit, total + r);
    }
}

static void tile_in_integers(const nibbles *w, const halves *h, const float *x_sums, long rows, long n, block *total)
{
    group own;
    for (long unit = 0; unit < h->units; unit++) {
        sums part[2 * MAX_ROWS];
        unit_dots(w, h, 2 * rows, n, unit * h->unit, part);
        if (unit * h->unit % w->size == 0)
            load_group(&own, w, n, unit * h->unit);
        for (long r = 0; r < rows; r++) {
            float step = h->steps[r * h->units + unit], x_sum = x_sums[r * h->units + unit];
            for (int i = 0; i < BLOCK; i++) {
                __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(part[2 * r][i], 8), part[2 * r + 1][i]);
                vec own_sum = (vec)_mm512_cvtepi32_ps(whole) - x_sum * load(own.zero + i * LANES);
                total[r][i] += step * load(own.scale + i * LANES) * own_sum;
            }
        }
    }
}

/* A group, or the largest part of a larger one that it has a whole number of: sums of 31 bits, steps of few columns. */
INLINE long unit_of(long size)
{
    long unit = least(size, LARGEST_UNIT);
    while (size % unit)
        unit -= DEPTH;
    return unit;
}

static int product_in_integers(const nibbles *w, matrix x, matrix y, long rows, long start, long stop)
{
    halves h;
    if (split(&h, x, rows, w->in, unit_of(w->size)))
        return 1;
    float *x_sums = sums_of_halves(&h, rows);
    for (long n = start; x_sums && n < stop; n += TILE) {
        block total[MAX_ROWS];
        memset(total, 0, rows * sizeof *total);
        tile_in_integers(w, &h, x_sums, rows, n, total);
        for (long r = 0; r < rows; r++)
            write_floats(y, r * w->out + n, least(TILE, w->out - n), (const float *)total[r]);
    }
    free_halves(&h);
    free(x_sums);
    return !x_sums;
}
#endif
