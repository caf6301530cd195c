/* Resize a rectangle of RGB pixels to a square. The result has the same bits as Pillow's antialiased bilinear filter,
 * Image.resize((side, side), Image.Resampling.BILINEAR). The source is src/libImaging/Resample.c of Pillow, up to
 * version 12. Later versions resize columns before rows if the height shrinks and the width does not.
 *
 * A row or column of `in` pixels becomes `out` pixels. With scale = max(1, in / out), output pixel i is
 * Σ w[x] · pixel[x]. The weight w[x] is proportional to max(0, 1 − |x + 0.5 − (i + 0.5) · in / out| / scale). The sum
 * of the weights of an output pixel is 1. The weights are rounded to multiples of 2^-22. The first pass resizes
 * rows, and the second pass resizes columns. Each pass rounds to bytes.
 *
 * There are three versions of each pass, which compute the same integers: one for all CPUs in this file, and two for x86
 * CPUs with AVX2 in resample_avx2.h. The instructions of AVX2 multiply numbers of 16 bits, so a weight is stored as
 * high · 2^11 + low. */

enum { WEIGHT_BITS = 22, LOW_BITS = 11, ROUND_HALF = 1 << (WEIGHT_BITS - 1), VECTOR = 32, ROWS = 4 };

/* Two weights: high * 2^11 + low. */
typedef struct {
    int16_t high[2], low[2];
} weight_pair;

/* The weights of a resized row or column. Output pixel i is a weighted sum of 2 * pairs input pixels, which begin at
 * input pixel first[i]. Their weights begin at weights[most_pairs * i]. Pixels after the end of the row or column have
 * the weight 0. If `is_blend` is 1, pairs is 1, first[i + 1] - first[i] is at most 1, and the sum of the two weights of
 * an output pixel is exactly 2^22. */
typedef struct {
    int64_t pairs, most_pairs, is_blend;
    int32_t *first;
    weight_pair *weights;
} resize_weights;

/* Return the product x. Because x is volatile, no compiler fuses the product with a sum: every compiler gives the same
 * bits. */
INLINE double rounded(volatile double x) { return x; }

/* The number of pairs of weights that are stored for each output pixel, if `length` pixels become `side` pixels. */
INLINE int64_t most_pairs(int64_t length, int64_t side) { return length <= side ? 2 : (length + side - 1) / side + 1; }

static void find_weights(int64_t length, int64_t side, resize_weights *out) {
    const double scale = (double)length / (double)side, support = scale < 1 ? 1 : scale, inverse = 1 / support;
    double weight[2 * out->most_pairs];
    int64_t used = 1; /* the largest number of weights of an output pixel, without the zeros at the end */
    memset(out->weights, 0, side * out->most_pairs * sizeof *out->weights);
    out->is_blend = length <= side;
    for (int64_t i = 0; i < side; i++) {
        const double centre = rounded((i + 0.5) * scale);
        int64_t first = (int64_t)(centre - support + 0.5), end = (int64_t)(centre + support + 0.5);
        first = first < 0 ? 0 : first, end = end > length ? length : end;
        double sum = 0;
        for (int64_t x = first; x < end; x++) {
            const double distance = rounded((x - centre + 0.5) * inverse);
            const double one = distance < 0 ? 1 + distance : 1 - distance;
            sum += weight[x - first] = one > 0 ? one : 0;
        }
        int64_t total = 0;
        for (int64_t t = 0; t < end - first; t++) {
            const int32_t one = (int32_t)(0.5 + weight[t] / sum * (1 << WEIGHT_BITS));
            weight_pair *pair = out->weights + out->most_pairs * i + t / 2;
            pair->high[t % 2] = (int16_t)(one >> LOW_BITS), pair->low[t % 2] = (int16_t)(one & ((1 << LOW_BITS) - 1));
            used = one && t >= used ? t + 1 : used, total += one;
        }
        out->is_blend &= total == 1 << WEIGHT_BITS;
        out->first[i] = (int32_t)first;
    }
    out->pairs = (used + 1) / 2;
    out->is_blend &= out->pairs == 1;
}

INLINE int32_t weight_at(const resize_weights *self, int64_t i, int64_t t) {
    const weight_pair *pair = self->weights + self->most_pairs * i + t / 2;
    return (pair->high[t % 2] << LOW_BITS) + pair->low[t % 2];
}

/* Resize a row of pixels to the `side` pixels of `out`. */
static void resize_row(const uint8_t *in, int64_t side, const resize_weights *weights, uint8_t *restrict out) {
    for (int64_t i = 0; i < side; i++, out += 3) {
        const uint8_t *pixel = in + 3 * weights->first[i];
        int32_t r = ROUND_HALF, g = ROUND_HALF, b = ROUND_HALF;
        for (int64_t t = 0; t < 2 * weights->pairs; t++, pixel += 3) {
            const int32_t weight = weight_at(weights, i, t);
            r += weight * pixel[0], g += weight * pixel[1], b += weight * pixel[2];
        }
        out[0] = r >> WEIGHT_BITS, out[1] = g >> WEIGHT_BITS, out[2] = b >> WEIGHT_BITS;
    }
}

/* Write line i of the square, the sum of weighted rows, to `out`. The rows are `bytes` bytes apart. */
EACH_CPU void resize_line(const uint8_t *rows, int64_t bytes, int64_t height, const resize_weights *weights, int64_t i,
                          uint8_t *restrict out) {
    int32_t sums[bytes];
    for (int64_t j = 0; j < bytes; j++)
        sums[j] = ROUND_HALF;
    for (int64_t t = 0; t < 2 * weights->pairs && weights->first[i] + t < height; t++) {
        const uint8_t *restrict row = rows + (weights->first[i] + t) * bytes;
        const int32_t weight = weight_at(weights, i, t);
        for (int64_t j = 0; j < bytes; j++)
            sums[j] += weight * row[j];
    }
    for (int64_t j = 0; j < bytes; j++)
        out[j] = (uint8_t)(sums[j] >> WEIGHT_BITS);
}
