/* Four bits a weight, in torch's tiles (nibbles.py): W = (q - zero) * scale in groups of columns. */
#pragma once
#include "halves.h"

enum { TILE = 64, DEPTH = 32, AHEAD = 8192 };

/* codes: torch's tiles; scales [in / size, out] of `type`; zeros: nibbles [in / size, out], or none where all are 8. */
typedef struct {
    const uint8_t *codes;
    const void *scales;
    const uint8_t *zeros;
    long out, in, size;
    int type;
    float offset;
} nibbles;

typedef struct { float scale[TILE], zero[TILE]; } group;

INLINE const uint8_t *tile_at(const nibbles *w, long n, long k)
{
    return w->codes + n * w->in / 2 + k * least(TILE, w->out - n) / 2;
}

/* Of a whole tile. */
INLINE void load_zeros(float *to, const uint8_t *zeros, float offset)
{
#ifdef __AVX512BW__
    __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)zeros));
    pairs = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
    ALIGNED uint8_t codes[TILE];
    _mm512_store_si512(codes, pairs);
    for (long j = 0; j < TILE; j += LANES)
        store(to + j, __builtin_convertvector(widen(codes + j), vec) + offset);
#else
    for (long j = 0; j < TILE / 2; j++) {
        to[2 * j] = (zeros[j] & 15) + offset;
        to[2 * j + 1] = (zeros[j] >> 4) + offset;
    }
#endif
}

INLINE void load_scales(float *to, int type, const void *scales, long at)
{
#ifdef __AVX512F__
    if (type == FP16) {
        for (long j = 0; j < TILE; j += LANES) {
            __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)scales + at + j));
            store(to + j, (vec)_mm512_cvtph_ps(halves));
        }
        return;
    }
#endif
    to_floats(type, scales, at, TILE, to);
}

/* The scales and zero points of the tile at row n, for the group of column k. */
INLINE void load_group(group *g, const nibbles *w, long n, long k)
{
    long octets = w->type == FP32 ? 4 : 2, width = least(TILE, w->out - n), at = k / w->size * w->out + n;
    prefetch((const uint8_t *)w->scales + (at + TILE) * octets, TILE * octets); /* another page for every group */
    for (long j = 0; j < TILE; j++)
        g->zero[j] = 8;
    if (width == TILE) {
        load_scales(g->scale, w->type, w->scales, at);
        if (w->zeros)
            load_zeros(g->zero, w->zeros + at / 2, w->offset);
        return;
    }
    memset(g->scale, 0, sizeof g->scale);
    to_floats(w->type, w->scales, at, width, g->scale);
    for (long j = 0; w->zeros && j < width; j++)
        g->zero[j] = (w->zeros[(at + j) / 2] >> 4 * (j % 2) & 15) + w->offset;
}
