/* Four-bit codes from a checkpoint's words to torch's tiles and back, and a search for NaN: at the memory's speed.
 *
 * Words hold eight codes, the lowest nibble first: along `in` in GPTQ's [in / 8, out] and in compressed-tensors'
 * [out, in / 8], along `out` in AWQ's [in, out / 8] (column 0, 2, 4, 6, 1, 3, 5, 7 of eight).
 */
#include "vectors.h"

enum { GPTQ = 0, AWQ = 1, PACKED = 2, TILE = 64, EIGHT = 8, ACROSS = 16 };

#define LOW_NIBBLES 0x0F0F0F0Fu
typedef uint32_t words_of_eight __attribute__((vector_size(4 * EIGHT)));
typedef uint64_t eights __attribute__((vector_size(8 * EIGHT)));

/* `place`: the row of a tile in which a column lies, or none where they lie in order. */
typedef struct {
    uint32_t *words;
    uint8_t *tiles;
    const int32_t *place;
    long out, in;
    int order;
} packing;

/* Of eight words four nibbles each to the low halves of 16-bit numbers, and back. */
INLINE eights spread(eights four)
{
    four = (four | four << 24) & 0x000000FF000000FF;
    return (four | four << 12) & 0x000F000F000F000F;
}

INLINE eights gather(eights four)
{
    four &= 0x000F000F000F000F;
    four = (four | four >> 12) & 0x000000FF000000FF;
    return (four | four >> 24) & 0xFFFF;
}

INLINE void from_awq(const uint32_t *words, long width, uint8_t *column)
{
    words_of_eight eight = {0};
    memcpy(&eight, words, width / 2);
    eights wide = __builtin_convertvector(eight, eights);
    wide = spread(wide & 0xFFFF) | spread(wide >> 16) << 8;
    memcpy(column, &wide, sizeof wide);
}

INLINE void to_awq(const uint8_t *column, long width, uint32_t *words)
{
    eights wide = {0};
    memcpy(&wide, column, width);
    words_of_eight eight = __builtin_convertvector(gather(wide) | gather(wide >> 8) << 16, words_of_eight);
    memcpy(words, &eight, width / 2);
}

/* A column's place in a tile: the second half of its rows above the first, in a narrow tile neighbours. */
INLINE void to_tile(const uint8_t *column, long width, uint8_t *octets)
{
    if (width == TILE)
        for (long i = 0; i < TILE / 2; i++)
            octets[i] = column[i] | column[i + TILE / 2] << 4;
    else
        for (long i = 0; i < width / 2; i++)
            octets[i] = column[2 * i] | column[2 * i + 1] << 4;
}

INLINE void from_tile(const uint8_t *octets, long width, uint8_t *column)
{
    if (width == TILE)
        for (long i = 0; i < TILE / 2; i++) {
            column[i] = octets[i] & 15;
            column[i + TILE / 2] = octets[i] >> 4;
        }
    else
        for (long i = 0; i < width / 2; i++) {
            column[2 * i] = octets[i] & 15;
            column[2 * i + 1] = octets[i] >> 4;
        }
}

INLINE uint8_t *octets_at(const packing *p, long n, long k, long width)
{
    return p->tiles + n * p->in / 2 + (p->place ? p->place[k] : k) * width / 2;
}

/* Eight columns of a tile from words of them, one for each row. Two words whose rows share octets are eight octets, four
 * with the even columns and four with the odd ones. */
INLINE void words_to_tile(const packing *p, const uint32_t *words, long n, long k, long width)
{
    uint32_t even[TILE / 2], odd[TILE / 2];
    for (long i = 0; i < width / 2; i++) {
        uint32_t low = words[width == TILE ? i : 2 * i], high = words[width == TILE ? i + TILE / 2 : 2 * i + 1];
        even[i] = (low & LOW_NIBBLES) | (high & LOW_NIBBLES) << 4;
        odd[i] = (low >> 4 & LOW_NIBBLES) | (high & ~LOW_NIBBLES);
    }
    for (long j = 0; j < EIGHT; j += 2) {
        uint8_t *to = octets_at(p, n, k + j, width), *next = octets_at(p, n, k + j + 1, width);
        for (long i = 0; i < width / 2; i++)
            to[i] = even[i] >> 4 * j;
        for (long i = 0; i < width / 2; i++)
            next[i] = odd[i] >> 4 * j;
    }
}

INLINE void words_of_tile(const packing *p, uint32_t *words, long n, long k, long width)
{
    uint32_t even[TILE / 2] = {0}, odd[TILE / 2] = {0};
    if (p->place) /* the next tile, in order: whoever takes columns from all over it would wait for each */
        prefetch(p->tiles + (n + TILE) * p->in / 2 + k * TILE / 2, EIGHT * TILE / 2);
    for (long j = 0; j < EIGHT; j += 2) {
        const uint8_t *from = octets_at(p, n, k + j, width), *next = octets_at(p, n, k + j + 1, width);
        for (long i = 0; i < width / 2; i++)
            even[i] |= (uint32_t)from[i] << 4 * j;
        for (long i = 0; i < width / 2; i++)
            odd[i] |= (uint32_t)next[i] << 4 * j;
    }
    for (long i = 0; i < width / 2; i++) {
        words[width == TILE ? i : 2 * i] = (even[i] & LOW_NIBBLES) | (odd[i] & LOW_NIBBLES) << 4;
        words[width == TILE ? i + TILE / 2 : 2 * i + 1] = (even[i] >> 4 & LOW_NIBBLES) | (odd[i] & ~LOW_NIBBLES);
    }
}

/* 16 x 16 words. */
INLINE void transpose(uint32_t (*words)[ACROSS])
{
#ifdef __AVX512F__
    __m512i row[ACROSS], lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    memcpy(row, words, sizeof row);
#pragma GCC unroll 4
    for (int step = 1; step < ACROSS; step *= 2) {
        __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
        __m512i even_from = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(ACROSS - step));
        __m512i odd_from = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(step)), odd, lane,
                                                 _mm512_set1_epi32(ACROSS));
#pragma GCC unroll 16
        for (int i = 0; i < ACROSS; i++)
            if (!(i & step)) {
                __m512i even = row[i], after = row[i + step];
                row[i] = _mm512_permutex2var_epi32(even, even_from, after);
                row[i + step] = _mm512_permutex2var_epi32(even, odd_from, after);
            }
    }
    memcpy(words, row, sizeof row);
#else
    for (int i = 0; i < ACROSS; i++)
        for (int j = 0; j < i; j++) {
            uint32_t word = words[i][j];
            words[i][j] = words[j][i];
            words[j][i] = word;
        }
#endif
}

INLINE void *copy_words(uint32_t *to, const uint32_t *from, long count)
{
    return count == ACROSS ? memcpy(to, from, ACROSS * sizeof *to) : memcpy(to, from, count * sizeof *to);
}

/* Words of `count` columns of words, from compressed-tensors' rows to columns or back: by whole cache lines, since
 * what is read by columns would be read sixteen times. */
INLINE void turn(uint32_t *rows, long stride, long width, long count, uint32_t (*turned)[TILE], int back)
{
    for (long row = 0; row < width; row += ACROSS) {
        uint32_t square[ACROSS][ACROSS];
        if (count < ACROSS)
            memset(square, 0, sizeof square);
        for (long i = 0; i < ACROSS; i++)
            back ? memcpy(square[i], turned[i] + row, sizeof *square)
                 : copy_words(square[i], rows + (row + i) * stride, count);
        transpose(square);
        for (long i = 0; i < ACROSS; i++)
            back ? copy_words(rows + (row + i) * stride, square[i], count)
                 : memcpy(turned[i] + row, square[i], sizeof *square);
    }
}

INLINE void pack_by_rows(const packing *p, long n, long width)
{
    uint32_t turned[ACROSS][TILE];
    for (long k = 0, count; k < p->in; k += count * EIGHT) {
        count = least(ACROSS, (p->in - k) / EIGHT);
        turn(p->words + (n * p->in + k) / EIGHT, p->in / EIGHT, width, count, turned, 0);
        for (long j = 0; j < count; j++)
            words_to_tile(p, turned[j], n, k + j * EIGHT, width);
    }
}

INLINE void unpack_by_rows(const packing *p, long n, long width)
{
    uint32_t turned[ACROSS][TILE] = {0};
    for (long k = 0, count; k < p->in; k += count * EIGHT) {
        count = least(ACROSS, (p->in - k) / EIGHT);
        for (long j = 0; j < count; j++)
            words_of_tile(p, turned[j], n, k + j * EIGHT, width);
        turn(p->words + (n * p->in + k) / EIGHT, p->in / EIGHT, width, count, turned, 1);
    }
}

INLINE void pack_tile(const packing *p, long n, long width)
{
    uint8_t columns[EIGHT][TILE];
    if (p->order == PACKED)
        pack_by_rows(p, n, width);
    else if (p->order == GPTQ)
        for (long k = 0; k < p->in; k += EIGHT)
            words_to_tile(p, p->words + k / EIGHT * p->out + n, n, k, width);
    else
        for (long k = 0; k < p->in; k += EIGHT) { /* rather than by one: reads and writes in turn are slower */
            for (long j = 0; j < EIGHT; j++)
                from_awq(p->words + ((k + j) * p->out + n) / EIGHT, width, columns[j]);
            for (long j = 0; j < EIGHT; j++)
                to_tile(columns[j], width, octets_at(p, n, k + j, width));
        }
}

INLINE void unpack_tile(const packing *p, long n, long width)
{
    uint8_t columns[EIGHT][TILE] = {0};
    if (p->order == PACKED)
        unpack_by_rows(p, n, width);
    else if (p->order == GPTQ)
        for (long k = 0; k < p->in; k += EIGHT)
            words_of_tile(p, p->words + k / EIGHT * p->out + n, n, k, width);
    else
        for (long k = 0; k < p->in; k += EIGHT) {
            for (long j = 0; j < EIGHT; j++)
                from_tile(octets_at(p, n, k + j, width), width, columns[j]);
            for (long j = 0; j < EIGHT; j++)
                to_awq(columns[j], width, p->words + ((k + j) * p->out + n) / EIGHT);
        }
}

/* Rows [start, stop), whole tiles, to tiles. */
int nibbles_pack(const packing *p, long start, long stop)
{
    for (long n = start; n < stop; n += TILE) /* with the width a constant the compiler unrolls the common case */
        p->out - n >= TILE ? pack_tile(p, n, TILE) : pack_tile(p, n, p->out - n);
    return 0;
}

/* Rows [start, stop), whole tiles, to words. */
int nibbles_unpack(const packing *p, long start, long stop)
{
    for (long n = start; n < stop; n += TILE)
        p->out - n >= TILE ? unpack_tile(p, n, TILE) : unpack_tile(p, n, p->out - n);
    return 0;
}

/* from [rows, columns] -> to [columns, rows], every word with the bits of `mask` turned. */
typedef struct { const uint32_t *from; uint32_t *to; long rows, columns, mask; } turning;

/* Rows [start, stop) of `to`. */
int words_turn(const turning *t, long start, long stop)
{
    uint32_t square[ACROSS][ACROSS] = {0};
    for (long i = start; i < stop; i += ACROSS)
        for (long j = 0; j < t->rows; j += ACROSS) {
            long across = least(ACROSS, stop - i), down = least(ACROSS, t->rows - j);
            for (long row = 0; row < down; row++)
                copy_words(square[row], t->from + (j + row) * t->columns + i, across);
            transpose(square);
            for (long row = 0; row < across; row++) {
                for (long column = 0; column < ACROSS; column++)
                    square[row][column] ^= t->mask;
                copy_words(t->to + (i + row) * t->rows + j, square[row], down);
            }
        }
    return 0;
}

/* 1 if one of the octets [start, stop) is an e4m3 NaN. */
int find_nan(const uint8_t *codes, long start, long stop)
{
    enum { STEP = 4096 };
    for (long at = start; at < stop; at += STEP) {
        uint8_t found = 0;
        for (long i = at; i < least(at + STEP, stop); i++)
            found |= (codes[i] & 0x7F) == 0x7F;
        if (found)
            return 1;
    }
    return 0;
}
