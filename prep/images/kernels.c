/* The inner loops of a build, for machines where a C compiler was there at installation. rescale.py and colour.py hold
 * the same arithmetic in NumPy; every sum is exact in both, so both give the same bits. Called by kernels.py. */

#ifndef NUMBER

#include <stdint.h>
#include <string.h>

#ifdef CLONES /* each function twice, the better one for this CPU chosen when the library is loaded */
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

/* One pass of a filter: output k is the sum over t < taps of weights[k * taps + t] * input[lows[k] + t], taps >= 2. An
 * input beyond the picture has weight zero. `weights` are floats or doubles. */
typedef struct {
    int64_t outputs, taps;
    const int64_t *lows;
    const void *weights;
} pass;

/* The rest of the file but the sums, for numbers of both kinds. ROUNDING is 1.5 times 2 to the bits of the mantissa:
 * added to a number it leaves no room for a fraction, and taken away again it leaves the nearest whole number (of two,
 * the even one). */
#define NUMBER float
#define ROUNDING 12582912.0f
#define NAME(name) name##_float
#include "kernels.c"
#undef NUMBER
#undef ROUNDING
#undef NAME
#define NUMBER double
#define ROUNDING 6755399441055744.0
#define NAME(name) name##_double
#include "kernels.c"

/* Adds R, G, B, RR, RG, RB, GG, GB, BB over all `count` pixels of an RGB picture to `sums`. */
EACH_CPU void add_moments(const uint8_t *pixels, int64_t count, int64_t *sums) {
    while (count > 0) {
        const int64_t some = count < 16384 ? count : 16384; /* 16384 * 255 * 255 < 2^31 */
        int32_t r = 0, g = 0, b = 0, rr = 0, rg = 0, rb = 0, gg = 0, gb = 0, bb = 0;
        for (int64_t k = 0; k < some; k++) {
            const int32_t red = pixels[3 * k], green = pixels[3 * k + 1], blue = pixels[3 * k + 2];
            r += red, g += green, b += blue;
            rr += red * red, rg += red * green, rb += red * blue;
            gg += green * green, gb += green * blue, bb += blue * blue;
        }
        const int32_t found[9] = {r, g, b, rr, rg, rb, gg, gb, bb};
        for (int k = 0; k < 9; k++)
            sums[k] += found[k];
        pixels += 3 * some, count -= some;
    }
}

/* Adds `rows` lines of `count` numbers, `stride` bytes from one to the next, to `sums` (rows, count). */
EACH_CPU void add_lines(const uint8_t *restrict lines, int64_t stride, int64_t rows, int64_t count,
                        uint16_t *restrict sums) {
    for (int64_t row = 0; row < rows; row++, lines += stride, sums += count)
        for (int64_t j = 0; j < count; j++)
            sums[j] += lines[j];
}

#else

typedef NUMBER NAME(four) __attribute__((vector_size(4 * sizeof(NUMBER)), aligned(sizeof(NUMBER))));

/* `count` numbers: out[j] is the sum over taps of weights[t] times number j of row t, rounded. */
INLINE void NAME(down_rows)(const uint8_t *restrict rows, int64_t stride, int64_t taps, const NUMBER *restrict weights,
                            int64_t count, NUMBER *restrict out) {
    while (taps > 1 && weights[taps - 1] == 0)
        taps--; /* rows that may not be there */
    const uint8_t *restrict second = rows + stride, *restrict third = second + stride;
    if (taps == 1)
        for (int64_t j = 0; j < count; j++)
            out[j] = weights[0] * rows[j];
    else if (taps == 2)
        for (int64_t j = 0; j < count; j++)
            out[j] = weights[0] * rows[j] + weights[1] * second[j];
    else
        for (int64_t j = 0; j < count; j++)
            out[j] = weights[0] * rows[j] + weights[1] * second[j] + weights[2] * third[j];
    for (int64_t t = 3; t < taps; t++)
        for (int64_t j = 0; j < count; j++)
            out[j] += weights[t] * rows[t * stride + j];
    for (int64_t j = 0; j < count; j++)
        out[j] = out[j] + ROUNDING - ROUNDING;
}

/* Output k of a pass across, three channels by one instruction; the fourth number is of no use. */
INLINE NAME(four) NAME(across_pixel)(const NUMBER *from, const NUMBER *weights, int64_t taps) {
    NAME(four) sum = weights[0] * *(const NAME(four) *)from + weights[1] * *(const NAME(four) *)(from + 3);
    for (int64_t t = 2; t < taps; t++)
        sum += weights[t] * *(const NAME(four) *)(from + 3 * t);
    return sum;
}

INLINE void NAME(across_row)(const NUMBER *between, pass across, int64_t taps, NUMBER *restrict sums) {
    const int64_t left = across.lows[0];
    const NUMBER *weights = across.weights;
    for (int64_t k = 0; k < across.outputs; k++, weights += taps) /* each fourth number is overwritten by the next */
        *(NAME(four) *)(sums + 3 * k) = NAME(across_pixel)(between + 3 * (across.lows[k] - left), weights, taps);
}

/* Rescales RGB `pixels`, `width` to a row, to `out`, (down.outputs, across.outputs, 3). `scratch` is for
 * 3 * (width + across.taps + across.outputs) + 8 numbers. */
EACH_CPU void NAME(rescale)(const uint8_t *restrict pixels, int64_t width, pass down, pass across,
                            uint8_t *restrict out, NUMBER *restrict scratch) {
    const int64_t left = across.lows[0], right = across.lows[across.outputs - 1] + across.taps;
    const int64_t columns = (right < width ? right : width) - left; /* that are needed */
    NUMBER *restrict between = scratch, *restrict sums = scratch + 3 * (columns + across.taps) + 4;
    memset(between + 3 * columns, 0, (3 * across.taps + 4) * sizeof *between); /* beyond the picture, weight zero */
    for (int64_t row = 0; row < down.outputs; row++, out += 3 * across.outputs) {
        NAME(down_rows)(pixels + 3 * (down.lows[row] * width + left), 3 * width, down.taps,
                        (const NUMBER *)down.weights + row * down.taps, 3 * columns, between);
        if (across.taps == 3) /* what most photographs need, without a loop */
            NAME(across_row)(between, across, 3, sums);
        else
            NAME(across_row)(between, across, across.taps, sums);
        for (int64_t j = 0; j < 3 * across.outputs; j++) {
            const int32_t whole = (int32_t)(sums[j] + ROUNDING - ROUNDING);
            out[j] = (uint8_t)(whole < 0 ? 0 : whole > 255 ? 255 : whole);
        }
    }
}

#endif
