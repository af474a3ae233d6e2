/* Few rows of bfloat16 x times FP8 as bfloat16, which holds every weight exactly. */
#pragma once
#include "octets.h"

#if HAS_OCTET_DOTS && defined(__AVX512BF16__)
#define HAS_BF16_DOTS 1
enum { COLUMNS = 512 /* of which W's rows stay in the first-level cache for all of x's */ };
typedef struct { __m512i low[2], high[2]; } code_table;

INLINE __m512i octets_at(const uint8_t *from, long size)
{
    return size >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8((1ULL << size) - 1, from);
}

/* The two octets of each positive code's bfloat16. */
INLINE code_table code_octets(void)
{
    code_table t;
    for (int code = 0; code < 128; code++) {
        int exponent = code >> 3, mantissa = code & 7;
        float value = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
        uint16_t bits = to_bf16(value);
        ((uint8_t *)t.low)[code] = bits;
        ((uint8_t *)t.high)[code] = bits >> 8;
    }
    return t;
}

/* 64 weights; the columns of either vector are as `spread_columns` puts x's. */
INLINE void decode_bf16(__m512i codes, const code_table *t, __m512i *out)
{
    __m512i low = _mm512_permutex2var_epi8(t->low[0], codes, t->low[1]);
    __m512i high = _mm512_permutex2var_epi8(t->high[0], codes, t->high[1]);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0xF8); /* high | codes & sign */
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
}

/* bf16 x [rows, in] -> [rows, stride], of every 64 columns the even eights first. */
static uint16_t *spread_columns(const uint16_t *x, long rows, long in, long stride)
{
    uint16_t *out = rows_of(rows, stride, sizeof *out);
    for (long r = 0; out && r < rows; r++)
        for (long k = 0; k < stride; k += 8) {
            uint16_t *to = out + r * stride + k / 64 * 64 + (k / 8 % 2) * 32 + k / 16 % 4 * 8;
            long size = in - k < 0 ? 0 : least(8, in - k);
            memset(to, 0, 16);
            memcpy(to, x + r * in + k, 2 * size);
        }
    return out;
}

INLINE void multiply(int rows, const __m512i (*w)[2], const uint16_t *x, long stride, vec (*acc)[BLOCK])
{
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
            __m512bh factor = (__m512bh)_mm512_load_si512(x + r * stride + 32 * half);
            for (int i = 0; i < BLOCK; i++)
                acc[r][i] = (vec)_mm512_dpbf16_ps((__m512)acc[r][i], (__m512bh)w[i][half], factor);
        }
}

/* Up to four rows of x; decoding again for each four costs about what keeping the decoded would. */
INLINE void code_dots(int rows, const uint8_t **w, const code_table *t, const float *scale, const uint16_t *x,
                      long stride, long size, block *total)
{
    vec acc[BLOCK][BLOCK] = {0};
    for (long k = 0; k < size; k += 64) {
        __m512i v[BLOCK][2];
        for (int i = 0; i < BLOCK; i++)
            decode_bf16(octets_at(w[i] + k, size - k), t, v[i]);
        multiply(rows, v, x + k, stride, acc);
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            total[r][i] += acc[r][i] * scale[i];
}

static int product_in_bf16(const octets *w, matrix x, matrix y, long rows, long start, long stop)
{
    code_table table = code_octets();
    long stride = padded(w->in), size;
    uint16_t *x16 = spread_columns(x.values, rows, w->in, stride);
    for (long n = start; x16 && n < stop; n += BLOCK) {
        block total[MAX_ROWS];
        memset(total, 0, rows * sizeof *total);
        for (long k = 0; k < w->in; k += size) {
            const uint8_t *from[BLOCK];
            float scale[BLOCK];
            size = run_at(w, k, rows <= BLOCK ? w->in : COLUMNS);
            rows_at(w, n, stop, k, from, scale);
            if (k + size == w->in)
                prefetch_next(w, n);
            for (long r = 0; r < rows; r += BLOCK)
                BY_ROWS(code_dots, least(BLOCK, rows - r), from, &table, scale, x16 + r * stride + k, stride, size,
                        total + r);
        }
        write_sums(y, w->out, rows, n, stop, total);
    }
    free(x16);
    return !x16;
}
#else
#define HAS_BF16_DOTS 0
#endif
