/* Resize a rectangle of RGB pixels to a square with the antialiased bilinear filter of Pillow, to the bit:
 * Image.resize((side, side), Image.Resampling.BILINEAR), in src/libImaging/Resample.c of Pillow up to version 12. Later
 * versions resize columns before rows if the height shrinks and the width does not.
 *
 * With scale = max(1, in / out), pixel i of a row or column is Σ w[x] · pixel[x]. The weight w[x] is proportional to
 * max(0, 1 − |x + 0.5 − (i + 0.5) · in / out| / scale). The sum of the weights of a pixel is 1. The weights are rounded
 * to multiples of 2^-22. Rows are resized first. Each of the two passes rounds to bytes. */

enum { WEIGHT_BITS = 22, ROUND_HALF = 1 << (WEIGHT_BITS - 1), TILE = 16 };

/* For each pixel of a resized row or column: the first pixel that has a weight, the number of weights, and the weights.
 * Pixel i has the weights weight[i * taps] to weight[i * taps + count[i] - 1]. */
typedef struct {
    int64_t taps;
    int32_t *first, *count, *weight;
} resize_weights;

/* Return x. The compiler cannot fuse the product x with a sum, so every compiler gives the same bits. */
INLINE double rounded(volatile double x) { return x; }

/* The largest number of weights of a pixel, if `length` pixels are resized to `side` pixels. */
INLINE int64_t most_taps(int64_t length, int64_t side) { return length <= side ? 3 : 2 * ((length + side - 1) / side) + 1; }

static void find_weights(int64_t length, int64_t side, const resize_weights *out) {
    const double scale = (double)length / (double)side, support = scale < 1 ? 1 : scale, inverse = 1 / support;
    double weight[out->taps];
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
        for (int64_t t = 0; t < end - first; t++)
            out->weight[i * out->taps + t] = (int32_t)(0.5 + weight[t] / sum * (1 << WEIGHT_BITS));
        out->first[i] = (int32_t)first, out->count[i] = (int32_t)(end - first);
    }
}

/* Resize lines: `out` gets `side` lines of `bytes` bytes, each a weighted sum of lines of `in`, which are `stride` bytes
 * apart. The lines of `out` are out_stride bytes apart. */
EACH_CPU void resize_lines(const uint8_t *in, int64_t stride, int64_t bytes, int64_t side, const resize_weights *weights,
                           uint8_t *restrict out, int64_t out_stride) {
    int32_t sums[bytes];
    for (int64_t i = 0; i < side; i++, out += out_stride) {
        const int64_t count = weights->count[i];
        const int32_t *weight = weights->weight + i * weights->taps;
        for (int64_t t = 0; t < count; t += 2) { /* two lines at a time; the second line may be missing */
            const uint8_t *a = in + (weights->first[i] + t) * stride, *b = t + 1 < count ? a + stride : a;
            const int32_t wa = weight[t], wb = t + 1 < count ? weight[t + 1] : 0;
            if (count <= 2)
                for (int64_t j = 0; j < bytes; j++)
                    out[j] = (uint8_t)((ROUND_HALF + a[j] * wa + b[j] * wb) >> WEIGHT_BITS);
            else if (t == 0)
                for (int64_t j = 0; j < bytes; j++)
                    sums[j] = ROUND_HALF + a[j] * wa + b[j] * wb;
            else if (t + 2 < count)
                for (int64_t j = 0; j < bytes; j++)
                    sums[j] += a[j] * wa + b[j] * wb;
            else
                for (int64_t j = 0; j < bytes; j++)
                    out[j] = (uint8_t)((sums[j] + a[j] * wa + b[j] * wb) >> WEIGHT_BITS);
        }
    }
}

/* Transpose RGB pixels (height, width) to `out`: cells of four bytes (R, G, B, undefined), with `length` cells from one
 * column to the next. `row` has room for a row and one more byte. */
static void to_columns(const uint8_t *pixels, int64_t stride, int64_t height, int64_t width, uint8_t *restrict row,
                       uint32_t *restrict out, int64_t length) {
    memcpy(row, pixels + (height - 1) * stride, 3 * width); /* after the last pixel, there may be no fourth byte */
    for (int64_t left = 0; left < width; left += TILE)
        for (int64_t y = 0; y < height; y++) {
            const uint8_t *in = y < height - 1 ? pixels + y * stride : row;
            for (int64_t x = left; x < width && x < left + TILE; x++)
                memcpy(out + x * length + y, in + 3 * x, 4);
        }
}

/* Transpose cells (side, height), which to_columns describes, to RGB pixels: rows of 3 * side + 1 bytes. */
static void to_rows(const uint32_t *cells, int64_t length, int64_t height, int64_t side, uint8_t *restrict out) {
    for (int64_t top = 0; top < height; top += TILE)
        for (int64_t x = 0; x < side; x++) /* the fourth byte of a cell is overwritten by the next pixel */
            for (int64_t y = top; y < height && y < top + TILE; y++)
                memcpy(out + y * (3 * side + 1) + 3 * x, cells + x * length + y, 4);
}

/* Number of cells from one column to the next. In lines of the cache, the number is odd, so that the cells of a row are
 * in different sets of the cache. */
INLINE int64_t cells_apart(int64_t height) { return 16 * ((height + 15) / 16 | 1); }

/* Number of bytes of memory that `resize` uses. */
INLINE int64_t resize_bytes(int64_t height, int64_t width, int64_t side) {
    const int64_t taps = most_taps(width, side) + most_taps(height, side);
    return 4 * ((4 + taps) * side + cells_apart(height) * (width + side) + width) + (3 * side + 1) * height;
}

/* Resize height * width pixels to `out` (side, side, 3). `memory` has resize_bytes(height, width, side) bytes. */
static void resize(const uint8_t *pixels, int64_t stride, int64_t height, int64_t width, int64_t side, void *memory,
                   uint8_t *out) {
    resize_weights weights[2];
    const int64_t lengths[2] = {width, height}, apart = cells_apart(height);
    int32_t *numbers = memory;
    for (int64_t k = 0; k < 2; k++) {
        weights[k].taps = most_taps(lengths[k], side);
        weights[k].first = numbers, weights[k].count = numbers + side, weights[k].weight = numbers + 2 * side;
        numbers += (2 + weights[k].taps) * side;
        find_weights(lengths[k], side, &weights[k]);
    }
    uint32_t *columns = (uint32_t *)numbers, *resized = columns + apart * width, *row = resized + apart * side;
    uint8_t *rows = (uint8_t *)(row + width);
    to_columns(pixels, stride, height, width, (uint8_t *)row, columns, apart);
    resize_lines((uint8_t *)columns, 4 * apart, 4 * height, side, &weights[0], (uint8_t *)resized, 4 * apart);
    to_rows(resized, apart, height, side, rows);
    resize_lines(rows, 3 * side + 1, 3 * side, side, &weights[1], out, 3 * side);
}
