/* Sixteen lanes in plain C with GNU vectors; nothing is assumed of alignment, nothing is read or written outside the
 * matrices (prefetching is no reading). What Python calls takes a job and the part [start, stop) of it, so that threads
 * can share it, and returns 0, or 1 for what its comment says, which is that there is no memory where it says nothing.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16, BLOCK = 4, MAX_ROWS = 32, PADDING = 64, FP32 = 0, FP16 = 1, BF16 = 2 };

#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))
/* Calls with the number of rows a constant, so that sums stay in registers. */
#define BY_ROWS(call, rows, ...) \
    ((rows) == 1 ? call(1, __VA_ARGS__) : (rows) == 2 ? call(2, __VA_ARGS__) : (rows) == 3 ? call(3, __VA_ARGS__) \
                                                                             : call(4, __VA_ARGS__))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef vec block[BLOCK];

/* x [rows, in] or y [rows, out], of one of the types above; y is never FP16. */
typedef struct { int type; void *values; } matrix;

/* x [rows, in] times a weight -> y [rows, out]; of types as above. */
typedef struct { const void *weight; void *x, *y; long rows; int x_type, y_type; } product;

/* Rows of a weight to bfloat16, the first of which is `first`; `scaled`: times the scales. */
typedef struct { const void *weight; uint16_t *target; long first, stride; int scaled; } decoding;

INLINE vec load(const float *from) { vec v; memcpy(&v, from, sizeof v); return v; }
INLINE void store(float *to, vec v) { memcpy(to, &v, sizeof v); }
INLINE float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long padded(long size) { return (size + PADDING - 1) / PADDING * PADDING; }

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

INLINE float from_fp16(uint16_t half)
{
    float value = from_bits((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f;
    value = (half & 0x7C00) == 0x7C00 ? from_bits((uint32_t)(half & 0x7FFF) << 13 | 0x7F800000) : value;
    return half & 0x8000 ? -value : value;
}

/* Values [at, at + size) of a type as float32. */
INLINE void to_floats(int type, const void *values, long at, long size, float *out)
{
    const uint16_t *halves = (const uint16_t *)values + at;
    if (type == FP32)
        memcpy(out, (const float *)values + at, size * sizeof *out);
    else if (type == BF16)
        for (long i = 0; i < size; i++)
            out[i] = from_bits((uint32_t)halves[i] << 16);
    else
        for (long i = 0; i < size; i++)
            out[i] = from_fp16(halves[i]);
}

INLINE float value_at(int type, const void *values, long at)
{
    float value;
    to_floats(type, values, at, 1, &value);
    return value;
}

INLINE void write_floats(matrix y, long at, long size, const float *values)
{
    if (y.type == FP32)
        memcpy((float *)y.values + at, values, size * sizeof *values);
    else
        for (long i = 0; i < size; i++)
            ((uint16_t *)y.values)[at + i] = to_bf16(values[i]);
}

/* Memory for `rows` rows of `stride` values of some size, on a cache line. */
static inline void *rows_of(long rows, long stride, long octets)
{
    return aligned_alloc(64, (rows * stride * octets + 63) / 64 * 64);
}

/* x as float32 [rows, stride], zeros behind its columns; the caller frees it. */
static inline float *floats_of(matrix x, long rows, long in, long stride)
{
    float *values = rows_of(rows, stride, sizeof *values);
    for (long r = 0; values && r < rows; r++) {
        to_floats(x.type, x.values, r * in, in, values + r * stride);
        memset(values + r * stride + in, 0, (stride - in) * sizeof *values);
    }
    return values;
}
