/* Few rows of x times eight-bit weights, and rows of them to bfloat16.
 *
 * Three ways to multiply, of which the CPU and x decide: INT8 with 16-bit x in integers, FP8 with bfloat16 x in
 * bfloat16, all else in float32, for which W is decoded a strip at a time into a buffer in the first-level cache and
 * meets four rows of x at once in registers.
 */
#include "octets_in_bf16.h"
#include "octets_in_integers.h"

enum { STRIP = 256 };

/* Sixteen weights as float32; of FP8 w / 256. */
INLINE vec decode(int kind, const uint8_t *w)
{
#ifdef __AVX512F__
    __m128i codes = _mm_loadu_si128((const __m128i *)w);
    if (kind == INT8)
        return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    /* seeeemmm to where it reads as float16 of w / 256, subnormals included; packing refuses NaN codes. */
    __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    return (vec)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xBF80)));
#else
    ints wide = widen(w) << 24 >> 24;
    /* To where it reads as float32 of w * 2^-120. */
    return kind == INT8 ? __builtin_convertvector(wide, vec) : (vec)(wide << 20 & (int)0x87F00000) * 0x1p112f;
#endif
}

/* What is left of whole vectors becomes 0. */
INLINE void decode_some(int kind, const uint8_t *w, long size, float *out)
{
    long whole = size - size % LANES;
    for (long i = 0; i < whole; i += LANES)
        store(out + i, decode(kind, w + i));
    if (whole < size) {
        uint8_t last[LANES] = {0};
        memcpy(last, w + whole, size - whole);
        store(out + whole, decode(kind, last));
    }
}

INLINE void decode_strip(int kind, const uint8_t *w, long size, float *out)
{
    /* With everything constant the compiler unrolls the common cases. */
    if (size == STRIP)
        kind == FP8 ? decode_some(FP8, w, STRIP, out) : decode_some(INT8, w, STRIP, out);
    else if (size == STRIP / 2)
        kind == FP8 ? decode_some(FP8, w, STRIP / 2, out) : decode_some(INT8, w, STRIP / 2, out);
    else
        decode_some(kind, w, size, out);
}

INLINE void dots(int rows, float (*w)[STRIP], const float *scale, const float *x, long stride, long size, block *total)
{
    vec acc[BLOCK][BLOCK] = {0};
#pragma GCC unroll 4 /* else every sixteenth jump is mispredicted */
    for (long k = 0; k < size; k += LANES)
        for (int r = 0; r < rows; r++) {
            vec v = load(x + r * stride + k);
            for (int i = 0; i < BLOCK; i++)
                acc[r][i] += v * load(w[i] + k);
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            total[r][i] += acc[r][i] * scale[i];
}

static int product_in_floats(const octets *w, matrix x, matrix y, long rows, long start, long stop)
{
    ALIGNED float w32[BLOCK][STRIP];
    long stride = padded(w->in + LANES), size;
    float *x32 = floats_of(x, rows, w->in, stride);
    for (long n = start; x32 && n < stop; n += BLOCK) {
        block total[MAX_ROWS];
        memset(total, 0, rows * sizeof *total);
        for (long k = 0; k < w->in; k += size) {
            const uint8_t *from[BLOCK];
            float scale[BLOCK];
            size = run_at(w, k, STRIP);
            rows_at(w, n, stop, k, from, scale);
            if (k + size == w->in)
                prefetch_next(w, n);
            for (long i = 0; i < BLOCK; i++) {
                decode_strip(w->kind, from[i], size, w32[i]);
                scale[i] *= w->kind == FP8 ? 256 : 1;
            }
            for (long r = 0; r < rows; r += BLOCK)
                BY_ROWS(dots, least(BLOCK, rows - r), w32, scale, x32 + r * stride + k, stride, size, total + r);
        }
        write_sums(y, w->out, rows, n, stop, total);
    }
    free(x32);
    return !x32;
}

/* Rows [start, stop) of y, for every row of x [rows <= MAX_ROWS, in]. */
int octets_product(const product *p, long start, long stop)
{
    const octets *w = p->weight;
    matrix x = {p->x_type, p->x}, y = {p->y_type, p->y};
#if HAS_OCTET_DOTS
    if (w->kind == INT8 && x.type != FP32 && w->width >= w->in)
        return product_in_integers(w, x, y, p->rows, start, stop);
#endif
#if HAS_BF16_DOTS
    if (w->kind == FP8 && x.type == BF16 && (w->width % 64 == 0 || w->width >= w->in))
        return product_in_bf16(w, x, y, p->rows, start, stop);
#endif
    return product_in_floats(w, x, y, p->rows, start, stop);
}

/* Rows [start, stop) of W to [rows, stride]. */
int octets_decode(const decoding *d, long start, long stop)
{
    ALIGNED float w32[STRIP];
    const octets *w = d->weight;
    long size;
    for (long n = start; n < stop; n++)
        for (long k = 0; k < w->in; k += size) {
            size = run_at(w, k, STRIP);
            float scale = (d->scaled ? scale_at(w, n, k) : 1) * (w->kind == FP8 ? 256 : 1);
            decode_strip(w->kind, w->codes + n * w->in + k, size, w32);
            uint16_t *to = d->target + (n - d->first) * d->stride + k;
            for (long i = 0; i < size; i++)
                to[i] = to_bf16(w32[i] * scale);
        }
    return 0;
}
