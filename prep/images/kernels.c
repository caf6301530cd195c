/* Inner loops of a build: rescaling and colour sums. kernels.py calls these C functions. The functions are compiled at
 * installation if a C compiler is available. Without a compiler, rescale.py and color_stats.py compute the same results
 * with NumPy. All sums are exact, so the results of C and NumPy agree bit for bit. */

#ifndef NUMBER

#include <stdint.h>
#include <string.h>

#ifdef CLONES /* each function is compiled twice, and the dynamic linker picks the version for this CPU */
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

/* One pass of a separable filter: output k is the sum over t < taps of
 * weights[k * taps + t] * input[first_inputs[k] + t], with taps >= 2. The weight of an input beyond the image is zero.
 * `weights` are floats or doubles. */
typedef struct {
    int64_t outputs, taps;
    const int64_t *first_inputs;
    const void *weights;
} pass;

/* This file includes itself once for floats and once for doubles, to compile the part after #else. x + ROUNDING -
 * ROUNDING is x rounded to the nearest integer, with halves rounded to even numbers. ROUNDING is 1.5 * 2^23 for floats
 * and 1.5 * 2^52 for doubles, because numbers of that size have no bits for a fraction. */
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

/* Adds the sums of R, G, B, RR, RG, RB, GG, GB, BB over the `count` pixels of an RGB image to `sums` (9 numbers). */
EACH_CPU void add_moments(const uint8_t *pixels, int64_t count, int64_t *sums) {
    while (count > 0) {
        const int64_t block = count < 16384 ? count : 16384; /* int32 is large enough: 16384 * 255 * 255 < 2^31 */
        int32_t r = 0, g = 0, b = 0, rr = 0, rg = 0, rb = 0, gg = 0, gb = 0, bb = 0;
        for (int64_t k = 0; k < block; k++) {
            const int32_t red = pixels[3 * k], green = pixels[3 * k + 1], blue = pixels[3 * k + 2];
            r += red, g += green, b += blue;
            rr += red * red, rg += red * green, rb += red * blue;
            gg += green * green, gb += green * blue, bb += blue * blue;
        }
        const int32_t block_sums[9] = {r, g, b, rr, rg, rb, gg, gb, bb};
        for (int k = 0; k < 9; k++)
            sums[k] += block_sums[k];
        pixels += 3 * block, count -= block;
    }
}

/* Adds `rows` rows of `count` bytes, which begin `stride` bytes apart, to `sums` (rows, count). */
EACH_CPU void add_lines(const uint8_t *restrict lines, int64_t stride, int64_t rows, int64_t count,
                        uint16_t *restrict sums) {
    for (int64_t row = 0; row < rows; row++, lines += stride, sums += count)
        for (int64_t j = 0; j < count; j++)
            sums[j] += lines[j];
}

#else

typedef NUMBER NAME(four) __attribute__((vector_size(4 * sizeof(NUMBER)), aligned(sizeof(NUMBER))));

/* Vertical pass, one row of outputs: out[j] = round(sum over t < taps of weights[t] * rows[t * stride + j]), j < count.
 * For one to three taps, which are the usual numbers, a single loop computes the whole sum. */
INLINE void NAME(down_rows)(const uint8_t *restrict rows, int64_t stride, int64_t taps, const NUMBER *restrict weights,
                            int64_t count, NUMBER *restrict out) {
    while (taps > 1 && weights[taps - 1] == 0)
        taps--; /* this row is not read, because it has weight zero and may lie beyond the image */
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

/* Horizontal pass, one output pixel: a vector of four numbers holds three channels and an ignored fourth number. */
INLINE NAME(four) NAME(across_pixel)(const NUMBER *from, const NUMBER *weights, int64_t taps) {
    NAME(four) sum = weights[0] * *(const NAME(four) *)from + weights[1] * *(const NAME(four) *)(from + 3);
    for (int64_t t = 2; t < taps; t++)
        sum += weights[t] * *(const NAME(four) *)(from + 3 * t);
    return sum;
}

INLINE void NAME(across_row)(const NUMBER *between, pass across, int64_t taps, NUMBER *restrict sums) {
    const int64_t left = across.first_inputs[0];
    const NUMBER *weights = across.weights;
    for (int64_t k = 0; k < across.outputs; k++, weights += taps) { /* the next pixel overwrites the fourth number */
        const NUMBER *from = between + 3 * (across.first_inputs[k] - left);
        *(NAME(four) *)(sums + 3 * k) = NAME(across_pixel)(from, weights, taps);
    }
}

/* Rescales RGB `pixels` with rows of `width` pixels to `out` (down.outputs, across.outputs, 3). `scratch` has
 * 3 * (width + across.taps + across.outputs) + 8 elements. */
EACH_CPU void NAME(rescale)(const uint8_t *restrict pixels, int64_t width, pass down, pass across,
                            uint8_t *restrict out, NUMBER *restrict scratch) {
    const int64_t left = across.first_inputs[0];
    const int64_t right = across.first_inputs[across.outputs - 1] + across.taps;
    const int64_t columns = (right < width ? right : width) - left; /* input columns that the output needs */
    NUMBER *restrict between = scratch, *restrict sums = scratch + 3 * (columns + across.taps) + 4;
    /* across_pixel multiplies the numbers after the last column by weights of zero. The numbers after the last column
     * are set to 0, because NaN times zero would be NaN. */
    memset(between + 3 * columns, 0, (3 * across.taps + 4) * sizeof *between);
    for (int64_t row = 0; row < down.outputs; row++, out += 3 * across.outputs) {
        NAME(down_rows)(pixels + 3 * (down.first_inputs[row] * width + left), 3 * width, down.taps,
                        (const NUMBER *)down.weights + row * down.taps, 3 * columns, between);
        if (across.taps == 3) /* the usual case; the compiler unrolls a loop of constant length */
            NAME(across_row)(between, across, 3, sums);
        else
            NAME(across_row)(between, across, across.taps, sums);
        for (int64_t j = 0; j < 3 * across.outputs; j++) {
            const int32_t level = (int32_t)(sums[j] + ROUNDING - ROUNDING);
            out[j] = (uint8_t)(level < 0 ? 0 : level > 255 ? 255 : level);
        }
    }
}

#endif
