/* Few rows of x times four-bit weights, in integers where the CPU and a 16-bit x allow, else in float32; and rows of
 * them to bfloat16. */
#include "nibbles_in_integers.h"

/* x's sums per group of `size` columns, float32 [rows, groups]; the caller frees them. */
INLINE float *sums_of(const float *x, long rows, long in, long stride, long size)
{
    float *sums = rows_of(rows, in / size, sizeof *sums);
    for (long r = 0; sums && r < rows; r++)
        for (long g = 0; g < in / size; g++) {
            vec total = {0};
            for (long k = g * size; k < (g + 1) * size; k += LANES)
                total += load(x + r * stride + k);
            sums[r * (in / size) + g] = sum(total);
        }
    return sums;
}

/* The low nibbles of sixteen codes as float32. */
INLINE vec low_nibbles(ints codes)
{
#ifdef __AVX512F__
    const vec table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vec)_mm512_permutexvar_ps((__m512i)codes, (__m512)table);
#else
    return __builtin_convertvector(codes & 15, vec);
#endif
}

/* DEPTH columns of a tile as codes 0..15; lanes that a narrow tile lacks become 0. */
INLINE void decode_nibbles(const uint8_t *tile, long width, float (*out)[TILE])
{
    if (width == TILE) {
        prefetch(tile + AHEAD, DEPTH * TILE / 2);
        for (long k = 0; k < DEPTH; k++)
            for (long j = 0; j < TILE / 2; j += LANES) {
                ints codes = widen(tile + k * TILE / 2 + j);
                store(out[k] + j, low_nibbles(codes));
                store(out[k] + TILE / 2 + j, low_nibbles(codes >> 4));
            }
        return;
    }
    memset(out, 0, DEPTH * sizeof *out);
    for (long k = 0; k < DEPTH; k++, tile += width / 2)
        for (long j = 0; j < width / 2; j++) {
            out[k][2 * j] = tile[j] & 15;
            out[k][2 * j + 1] = tile[j] >> 4;
        }
}

INLINE void outer(int rows, float (*w)[TILE], const float *x, long stride, block *total)
{
    vec acc[BLOCK][BLOCK];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            acc[r][i] = total[r][i];
    for (long k = 0; k < DEPTH; k++)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < BLOCK; i++)
                acc[r][i] += x[r * stride + k] * load(w[k] + i * LANES);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            total[r][i] = acc[r][i];
}

static void tile_in_floats(const nibbles *w, const float *x, long stride, const float *sums, long rows, long n,
                           block *total)
{
    ALIGNED float w32[DEPTH][TILE];
    group own;
    for (long g = 0; g < w->in / w->size; g++) {
        block part[MAX_ROWS];
        memset(part, 0, rows * sizeof *part);
        for (long k = g * w->size; k < (g + 1) * w->size; k += DEPTH) {
            decode_nibbles(tile_at(w, n, k), least(TILE, w->out - n), w32);
            for (long r = 0; r < rows; r += BLOCK)
                BY_ROWS(outer, least(BLOCK, rows - r), w32, x + r * stride + k, stride, part + r);
        }
        load_group(&own, w, n, g * w->size);
        for (long r = 0; r < rows; r++)
            for (int i = 0; i < BLOCK; i++)
                total[r][i] += load(own.scale + i * LANES)
                               * (part[r][i] - sums[r * (w->in / w->size) + g] * load(own.zero + i * LANES));
    }
}

static int product_in_floats(const nibbles *w, matrix x, matrix y, long rows, long start, long stop)
{
    float *x32 = floats_of(x, rows, w->in, w->in);
    float *sums = x32 ? sums_of(x32, rows, w->in, w->in, w->size) : NULL;
    for (long n = start; sums && n < stop; n += TILE) {
        block total[MAX_ROWS];
        memset(total, 0, rows * sizeof *total);
        tile_in_floats(w, x32, w->in, sums, rows, n, total);
        for (long r = 0; r < rows; r++)
            write_floats(y, r * w->out + n, least(TILE, w->out - n), (const float *)total[r]);
    }
    free(x32);
    free(sums);
    return !sums;
}

/* Rows [start, stop) of y, whole tiles, for every row of x [rows <= MAX_ROWS, in]. */
int nibbles_product(const product *p, long start, long stop)
{
    matrix x = {p->x_type, p->x}, y = {p->y_type, p->y};
#if HAS_OCTET_DOTS
    if (x.type != FP32)
        return product_in_integers(p->weight, x, y, p->rows, start, stop);
#endif
    return product_in_floats(p->weight, x, y, p->rows, start, stop);
}

/* Rows [start, stop) of W, whole tiles, to the transposed [in, stride], always scaled. */
int nibbles_decode(const decoding *d, long start, long stop)
{
    ALIGNED float w32[DEPTH][TILE];
    const nibbles *w = d->weight;
    group own;
    for (long n = start; n < stop; n += TILE)
        for (long k = 0; k < w->in; k += DEPTH) {
            long width = least(TILE, w->out - n);
            if (k % w->size == 0)
                load_group(&own, w, n, k);
            decode_nibbles(tile_at(w, n, k), width, w32);
            for (long row = 0; row < DEPTH; row++) {
                uint16_t converted[TILE];
                for (long j = 0; j < TILE; j++)
                    converted[j] = to_bf16((w32[row][j] - own.zero[j]) * own.scale[j]);
                memcpy(d->target + (k + row) * d->stride + n - d->first, converted, width * sizeof(uint16_t));
            }
        }
    return 0;
}
