/* Few rows of x times a compressed weight, and compressed weights to bfloat16.
 *
 * Weights are decoded to float32 a strip at a time, into a buffer in the first-level cache, and meet four rows of x at
 * once in registers. Plain C with GNU vectors; nothing is assumed of alignment, nothing is read or written outside the
 * matrices (prefetching is no reading). Calls work on the rows [start, stop) of W, so that threads can share it.
 */
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum {
    LANES = 16, STRIP = 256, BLOCK = 4, MAX_ROWS = 16, TILE = 64, DEPTH = 32, AHEAD = 8192,
    FP8 = 0, INT8 = 1, FP32 = 0, FP16 = 1, BF16 = 2
};
#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))
/* Calls with the number of rows a constant, so that sums stay in registers. */
#define BY_ROWS(call, rows, ...) \
    ((rows) == 1 ? call(1, __VA_ARGS__) : (rows) == 2 ? call(2, __VA_ARGS__) : (rows) == 3 ? call(3, __VA_ARGS__) \
                                                                             : call(4, __VA_ARGS__))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef vec block[BLOCK];

INLINE vec load(const float *from) { vec v; memcpy(&v, from, sizeof v); return v; }
INLINE void store(float *to, vec v) { memcpy(to, &v, sizeof v); }
INLINE float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE void prefetch(const uint8_t *from, long size)
{
    for (long i = 0; i < size; i += 64)
        __builtin_prefetch(from + i);
}

INLINE ints widen(const uint8_t *from)
{
    uint8_t __attribute__((vector_size(LANES))) octets;
    memcpy(&octets, from, sizeof octets);
#ifdef __AVX512F__
    return (ints)_mm512_cvtepu8_epi32((__m128i)octets);
#else
    return __builtin_convertvector(octets, ints);
#endif
}

INLINE float sum(vec v)
{
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += v[i];
    return total;
#endif
}

/* Round to nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return f != f ? 0x7FC0 : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}

/* ---- Eight bits a weight, [out, in] as in the file ---- */

/* Sixteen weights as float32; of FP8 w / 256. */
INLINE vec decode(int kind, const uint8_t *w)
{
#ifdef __AVX512F__
    __m128i octets = _mm_loadu_si128((const __m128i *)w);
    if (kind == INT8)
        return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(octets));
    /* seeeemmm to where it reads as float16 of w / 256, subnormals included; packing refuses NaN codes. */
    __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(octets), 7);
    return (vec)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xBF80)));
#else
    ints wide = widen(w) << 24 >> 24;
    /* To where it reads as float32 of w * 2^-120. */
    return kind == INT8 ? __builtin_convertvector(wide, vec) : (vec)(wide << 20 & (int)0x87F00000) * 0x1p112f;
#endif
}

/* `spread`: float32 scales [row blocks, in], or none. What is left of whole vectors becomes 0. */
INLINE void decode_some(int kind, const uint8_t *w, const float *spread, long size, float *out)
{
    long whole = size - size % LANES;
    for (long i = 0; i < whole; i += LANES)
        store(out + i, spread ? decode(kind, w + i) * load(spread + i) : decode(kind, w + i));
    if (whole < size) {
        uint8_t last[LANES] = {0};
        memcpy(last, w + whole, size - whole);
        store(out + whole, decode(kind, last));
        for (long i = whole; spread && i < size; i++)
            out[i] *= spread[i];
    }
}

INLINE void decode_strip(int kind, const uint8_t *w, const float *spread, long size, float *out)
{
    /* With everything constant the compiler unrolls the common cases. */
    if (size < STRIP)
        decode_some(kind, w, spread, size, out);
    else if (kind == FP8)
        spread ? decode_some(FP8, w, spread, STRIP, out) : decode_some(FP8, w, 0, STRIP, out);
    else
        spread ? decode_some(INT8, w, spread, STRIP, out) : decode_some(INT8, w, 0, STRIP, out);
}

INLINE void dots(int rows, float (*w)[STRIP], const float *x, long stride, long size, block *total)
{
    vec acc[BLOCK][BLOCK];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            acc[r][i] = total[r][i];
#pragma GCC unroll 4 /* else every sixteenth jump is mispredicted */
    for (long k = 0; k < size; k += LANES)
        for (int r = 0; r < rows; r++) {
            vec v = load(x + r * stride + k);
            for (int i = 0; i < BLOCK; i++)
                acc[r][i] += v * load(w[i] + k);
        }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            total[r][i] = acc[r][i];
}

/* x float32 [rows <= MAX_ROWS, stride], columns padded with zeros to whole vectors -> y float32 [rows, out], unscaled
 * but for `spread`, of which `height` rows of W share a row. */
void bytes_product(int kind, const uint8_t *w, const float *spread, long height, const float *x, float *y, long rows,
                   long in, long stride, long out, long start, long stop)
{
    ALIGNED float w32[BLOCK][STRIP];
    for (long n = start; n < stop; n += BLOCK) {
        block total[MAX_ROWS];
        memset(total, 0, rows * sizeof *total);
        for (long k = 0; k < in; k += STRIP) {
            long size = least(STRIP, in - k);
            for (long i = 0; i < BLOCK; i++) {
                long row = least(n + i, stop - 1);
                const uint8_t *at = w + row * in + k;
                prefetch(at + (k + 2 * STRIP < in ? 0 : (BLOCK - 1) * in) + 2 * STRIP, STRIP);
                decode_strip(kind, at, spread ? spread + row / height * in + k : 0, size, w32[i]);
            }
            for (long r = 0; r < rows; r += BLOCK)
                BY_ROWS(dots, least(BLOCK, rows - r), w32, x + r * stride + k, stride, size, total + r);
        }
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < least(BLOCK, stop - n); i++)
                y[r * out + n + i] = sum(total[r][i]);
    }
}

/* Rows [start, stop) to bfloat16 [stop - start, in]. */
void bytes_decode(int kind, const uint8_t *w, const float *spread, long height, uint16_t *target, long in, long start,
                  long stop)
{
    ALIGNED float w32[STRIP];
    for (long n = start; n < stop; n++)
        for (long k = 0; k < in; k += STRIP) {
            long size = least(STRIP, in - k);
            decode_strip(kind, w + n * in + k, spread ? spread + n / height * in + k : 0, size, w32);
            uint16_t *to = target + (n - start) * in + k;
            for (long i = 0; i < size; i++)
                to[i] = to_bf16(w32[i]);
        }
}

/* ---- Four bits a weight, in torch's tiles (nibbles.py): W = (q - zero) * scale in groups of columns ---- */

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

typedef struct { float scale[TILE], zero[TILE]; } group;

INLINE float from_fp16(uint16_t half)
{
    float value = from_bits((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f;
    value = (half & 0x7C00) == 0x7C00 ? from_bits((uint32_t)(half & 0x7FFF) << 13 | 0x7F800000) : value;
    return half & 0x8000 ? -value : value;
}

/* `scales` of a type in its 16 or 32 bits; `qzeros`: packed nibbles, or none where all zero points are 8. */
INLINE void load_group(group *g, int type, const uint8_t *scales, const uint8_t *qzeros, float offset, long at,
                       long width)
{
    long octets = type == FP32 ? 4 : 2;
    prefetch(scales + (at + TILE) * octets, TILE * octets); /* of the next tile: another page for every group */
    memset(g, 0, sizeof *g);
    if (type == FP32)
        memcpy(g->scale, scales + at * 4, width * 4);
    else {
        uint16_t raw[TILE] = {0};
        memcpy(raw, scales + at * 2, width * 2);
        for (long j = 0; j < TILE; j++)
            g->scale[j] = type == BF16 ? from_bits((uint32_t)raw[j] << 16) : from_fp16(raw[j]);
    }
    for (long j = 0; j < width / 2; j++) {
        g->zero[2 * j] = qzeros ? (qzeros[at / 2 + j] & 15) + offset : 8;
        g->zero[2 * j + 1] = qzeros ? (qzeros[at / 2 + j] >> 4) + offset : 8;
    }
}

INLINE void outer(int rows, float (*w)[TILE], const float *x, long in, block *total)
{
    vec acc[BLOCK][BLOCK];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            acc[r][i] = total[r][i];
    for (long k = 0; k < DEPTH; k++)
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < BLOCK; i++)
                acc[r][i] += x[r * in + k] * load(w[k] + i * LANES);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < BLOCK; i++)
            total[r][i] = acc[r][i];
}

/* One row of x times a whole tile's columns, which needn't be kept for another row. */
INLINE void outer_once(const uint8_t *tile, const float *x, vec *total)
{
    vec acc[BLOCK] = {total[0], total[1], total[2], total[3]};
    prefetch(tile + AHEAD, DEPTH * TILE / 2);
    for (long k = 0; k < DEPTH; k++)
        for (int i = 0; i < BLOCK / 2; i++) {
            ints codes = widen(tile + k * TILE / 2 + i * LANES);
            acc[i] += x[k] * low_nibbles(codes);
            acc[BLOCK / 2 + i] += x[k] * low_nibbles(codes >> 4);
        }
    for (int i = 0; i < BLOCK; i++)
        total[i] = acc[i];
}

/* x float32 [rows <= MAX_ROWS, in] and its sums per group [rows, groups] -> y float32 [rows, out]. `start` begins a
 * tile, `stop` ends one; `size` columns make a group, whole DEPTHs; scales [groups, out]. */
void nibbles_product(const uint8_t *nibbles, int type, const uint8_t *scales, const uint8_t *qzeros, float offset,
                     const float *x, const float *sums, float *y, long rows, long in, long out, long size, long start,
                     long stop)
{
    ALIGNED float w[DEPTH][TILE];
    long groups = in / size;
    for (long n = start; n < stop; n += TILE) {
        long width = least(TILE, out - n);
        block total[MAX_ROWS], part[MAX_ROWS];
        memset(total, 0, rows * sizeof *total);
        for (long g = 0; g < groups; g++) {
            memset(part, 0, rows * sizeof *part);
            for (long k = g * size; k < (g + 1) * size; k += DEPTH) {
                const uint8_t *tile = nibbles + n * in / 2 + k * width / 2;
                if (rows == 1 && width == TILE) {
                    outer_once(tile, x + k, part[0]);
                    continue;
                }
                decode_nibbles(tile, width, w);
                for (long r = 0; r < rows; r += BLOCK)
                    BY_ROWS(outer, least(BLOCK, rows - r), w, x + r * in + k, in, part + r);
            }
            group own;
            load_group(&own, type, scales, qzeros, offset, g * out + n, width);
            for (long r = 0; r < rows; r++)
                for (int i = 0; i < BLOCK; i++)
                    total[r][i] += load(own.scale + i * LANES)
                                   * (part[r][i] - sums[r * groups + g] * load(own.zero + i * LANES));
        }
        for (long r = 0; r < rows; r++)
            memcpy(y + r * out + n, total[r], width * sizeof(float));
    }
}

/* Rows [start, stop) of W, whole tiles, to bfloat16 of the transposed [in, stride] that begins with row `first`. */
void nibbles_decode(const uint8_t *nibbles, int type, const uint8_t *scales, const uint8_t *qzeros, float offset,
                    uint16_t *target, long first, long stride, long in, long out, long size, long start, long stop)
{
    ALIGNED float w[DEPTH][TILE];
    for (long n = start; n < stop; n += TILE)
        for (long k = 0; k < in; k += DEPTH) {
            long width = least(TILE, out - n), g = k / size;
            group own;
            load_group(&own, type, scales, qzeros, offset, g * out + n, width);
            decode_nibbles(nibbles + n * in / 2 + k * width / 2, width, w);
            for (long row = 0; row < DEPTH; row++) {
                uint16_t converted[TILE];
                for (long j = 0; j < TILE; j++)
                    converted[j] = to_bf16((w[row][j] - own.zero[j]) * own.scale[j]);
                memcpy(target + (k + row) * stride + n - first, converted, width * sizeof(uint16_t));
            }
        }
}
