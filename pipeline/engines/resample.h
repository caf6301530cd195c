/* Resize a rectangle of RGB pixels to a square. The result has the same bits as Pillow's antialiased bilinear filter,
 * Image.resize((side, side), Image.Resampling.BILINEAR). The source is src/libImaging/Resample.c of Pillow, up to
 * version 12. Later versions resize columns before rows if the height shrinks and the width does not.
 *
 * A row or column of `in` pixels becomes `out` pixels. With scale = max(1, in / out), output pixel i is
 * Σ w[x] · pixel[x]. The weight w[x] is proportional to max(0, 1 − |x + 0.5 − (i + 0.5) · in / out| / scale). The sum
 * of the weights of an output pixel is 1. The weights are rounded to multiples of 2^-22. The first pass resizes
 * rows, and the second pass resizes columns. Each pass rounds to bytes.
 *
 * There are two versions of each pass, which compute the same integers: one for all CPUs, and one for x86 CPUs with
 * AVX2. The instructions of AVX2 multiply numbers of 16 bits, so a weight is stored as high · 2^11 + low. */

enum { WEIGHT_BITS = 22, LOW_BITS = 11, ROUND_HALF = 1 << (WEIGHT_BITS - 1), VECTOR = 32, ROWS = 4 };

/* Two weights: high * 2^11 + low. */
typedef struct {
    int16_t high[2], low[2];
} weight_pair;

/* The weights of a resized row or column. Output pixel i is a weighted sum of 2 * pairs input pixels, which begin at
 * input pixel first[i]. Their weights begin at weights[most_pairs * i]. Pixels after the end of the row or column have
 * the weight 0. */
typedef struct {
    int64_t pairs, most_pairs;
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
        for (int64_t t = 0; t < end - first; t++) {
            const int32_t one = (int32_t)(0.5 + weight[t] / sum * (1 << WEIGHT_BITS));
            weight_pair *pair = out->weights + out->most_pairs * i + t / 2;
            pair->high[t % 2] = (int16_t)(one >> LOW_BITS), pair->low[t % 2] = (int16_t)(one & ((1 << LOW_BITS) - 1));
            used = one && t >= used ? t + 1 : used;
        }
        out->first[i] = (int32_t)first;
    }
    out->pairs = (used + 1) / 2;
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

#ifdef __x86_64__
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))
#define AVX2_INLINE AVX2 INLINE

/* Sums of 8 channels: high * 2^11 + low. */
typedef struct {
    __m256i high, low;
} sums8;

AVX2_INLINE sums8 no_sums(void) { return (sums8){_mm256_setzero_si256(), _mm256_set1_epi32(ROUND_HALF)}; }

/* Add 8 pairs of 16-bit numbers, each multiplied by its weight. */
AVX2_INLINE sums8 add_pairs(sums8 sums, __m256i pairs, const weight_pair *weights) {
    int32_t high, low;
    memcpy(&high, weights->high, 4), memcpy(&low, weights->low, 4);
    sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(pairs, _mm256_set1_epi32(high)));
    sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(pairs, _mm256_set1_epi32(low)));
    return sums;
}

/* Round 8 sums to levels, as 32-bit integers. */
AVX2_INLINE __m256i levels(sums8 sums) {
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_slli_epi32(sums.high, LOW_BITS), sums.low), WEIGHT_BITS);
}

/* As resize_row, for ROWS rows. Each half of a vector belongs to one row. `pairs` is self.pairs. */
AVX2_INLINE void resize_some(const uint8_t *in, int64_t stride, int64_t side, resize_weights self, int64_t pairs,
                             uint8_t *restrict out, int64_t bytes) {
    const __m256i split = _mm256_broadcastsi128_si256( /* two pixels become pairs of 16 bits: RR, GG, BB, 00 */
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1));
    const __m256i join = _mm256_broadcastsi128_si256( /* four RGB0 become four RGB */
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    for (int64_t i = 0; i < side; i += 4) {
        __m256i pixels[ROWS / 2][4];
        for (int64_t k = 0; k < 4; k++) {
            sums8 sums[ROWS / 2];
            for (int64_t r = 0; r < ROWS / 2; r++)
                sums[r] = no_sums();
            for (int64_t p = 0; p < pairs; p++)
                for (int64_t r = 0; r < ROWS / 2; r++) {
                    const uint8_t *pixel = in + 3 * (self.first[i + k] + 2 * p) + 2 * r * stride;
                    const __m128i a = _mm_loadu_si128((const __m128i *)pixel);
                    const __m128i b = _mm_loadu_si128((const __m128i *)(pixel + stride));
                    sums[r] = add_pairs(sums[r], _mm256_shuffle_epi8(_mm256_set_m128i(b, a), split),
                                        self.weights + self.most_pairs * (i + k) + p);
                }
            for (int64_t r = 0; r < ROWS / 2; r++)
                pixels[r][k] = levels(sums[r]);
        }
        for (int64_t r = 0; r < ROWS / 2; r++) {
            const __m256i two = _mm256_packus_epi32(pixels[r][0], pixels[r][1]);
            const __m256i four = _mm256_packus_epi16(two, _mm256_packus_epi32(pixels[r][2], pixels[r][3]));
            const __m256i rgb = _mm256_shuffle_epi8(four, join);
            _mm_storeu_si128((__m128i *)(out + 2 * r * bytes + 3 * i), _mm256_castsi256_si128(rgb));
            _mm_storeu_si128((__m128i *)(out + (2 * r + 1) * bytes + 3 * i), _mm256_extracti128_si256(rgb, 1));
        }
    }
}

AVX2 static void resize_some_avx2(const uint8_t *in, int64_t stride, int64_t side, const resize_weights *self,
                                  uint8_t *restrict out, int64_t bytes) {
    if (self->pairs == 1) /* with a constant number of pairs, the compiler unrolls the loops */
        resize_some(in, stride, side, *self, 1, out, bytes);
    else if (self->pairs == 2)
        resize_some(in, stride, side, *self, 2, out, bytes);
    else
        resize_some(in, stride, side, *self, self->pairs, out, bytes);
}

/* As resize_line. `bytes` is a multiple of VECTOR, and `pairs` is self.pairs. */
AVX2_INLINE void add_rows(const uint8_t *rows, int64_t bytes, int64_t height, resize_weights self, int64_t pairs,
                          int64_t i, uint8_t *restrict out) {
    const __m256i zero = _mm256_setzero_si256();
    for (int64_t j = 0; j < bytes; j += VECTOR) {
        sums8 sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        for (int64_t p = 0; p < pairs; p++) {
            const int64_t last = height - 1, first = self.first[i] + 2 * p < last ? self.first[i] + 2 * p : last;
            const weight_pair *weights = self.weights + self.most_pairs * i + p;
            const uint8_t *row = rows + first * bytes + j;
            const __m256i a = _mm256_loadu_si256((const __m256i *)row);
            const __m256i b = _mm256_loadu_si256((const __m256i *)(row + (first < last ? bytes : 0)));
            const __m256i front = _mm256_unpacklo_epi8(a, b), back = _mm256_unpackhi_epi8(a, b);
            sums[0] = add_pairs(sums[0], _mm256_unpacklo_epi8(front, zero), weights);
            sums[1] = add_pairs(sums[1], _mm256_unpackhi_epi8(front, zero), weights);
            sums[2] = add_pairs(sums[2], _mm256_unpacklo_epi8(back, zero), weights);
            sums[3] = add_pairs(sums[3], _mm256_unpackhi_epi8(back, zero), weights);
        }
        const __m256i front = _mm256_packus_epi32(levels(sums[0]), levels(sums[1]));
        const __m256i back = _mm256_packus_epi32(levels(sums[2]), levels(sums[3]));
        _mm256_storeu_si256((__m256i *)(out + j), _mm256_packus_epi16(front, back));
    }
}

AVX2 static void resize_line_avx2(const uint8_t *rows, int64_t bytes, int64_t height, const resize_weights *self,
                                  int64_t i, uint8_t *restrict out) {
    if (self->pairs == 1)
        add_rows(rows, bytes, height, *self, 1, i, out);
    else
        add_rows(rows, bytes, height, *self, self->pairs, i, out);
}
#endif

/* A rectangle whose rows were resized, and the weights of its columns. `bytes` is the number of bytes from one row to
 * the next: a multiple of VECTOR, and at least 16 more than the pixels need. */
typedef struct {
    uint8_t *rows;
    int64_t height, bytes;
    resize_weights weights;
} resized_rows;

INLINE int64_t line_bytes(int64_t side) { return (3 * side + 16 + VECTOR - 1) / VECTOR * VECTOR; }

/* Number of bytes of ROWS copied rows. After its pixels, a row has bytes that are read and multiplied by 0. */
INLINE int64_t copy_bytes(int64_t width, int64_t pairs) { return ROWS * (3 * width + 6 * pairs + 16); }

/* Number of bytes of the weights of a row or column. Four pixels are resized at a time, so there is room for the
 * weights of three more pixels. */
INLINE int64_t weight_bytes(int64_t pairs, int64_t side) {
    return (side + 3) * (4 + pairs * (int64_t)sizeof(weight_pair));
}

/* Number of bytes of memory that resize_rows uses. */
INLINE int64_t resize_bytes(int64_t height, int64_t width, int64_t side) {
    const int64_t pairs = most_pairs(width, side);
    const int64_t weights = weight_bytes(pairs, side) + weight_bytes(most_pairs(height, side), side);
    return (height + ROWS - 1) * line_bytes(side) + weights + copy_bytes(width, pairs);
}

/* Resize the rows of a rectangle. The result uses the resize_bytes(height, width, side) bytes at `memory`. */
static resized_rows resize_rows(const uint8_t *pixels, int64_t stride, int64_t height, int64_t width, int64_t side,
                                uint8_t *memory) {
    resized_rows result = {.rows = memory, .height = height, .bytes = line_bytes(side)};
    resize_weights across, *both[2] = {&across, &result.weights};
    memory += (height + ROWS - 1) * result.bytes;
    for (int64_t k = 0; k < 2; k++) {
        const int64_t length = k ? height : width, pairs = both[k]->most_pairs = most_pairs(length, side);
        both[k]->first = (int32_t *)memory, both[k]->weights = (weight_pair *)(memory + 4 * (side + 3));
        memory += weight_bytes(pairs, side);
        find_weights(length, side, both[k]);
        memset(both[k]->first + side, 0, 3 * 4);
    }
    const int64_t copy_stride = copy_bytes(width, across.pairs) / ROWS;
    for (int64_t y = 0; y < height; y += ROWS) {
        const uint8_t *in = pixels + y * stride;
        uint8_t *out = result.rows + y * result.bytes;
        int64_t in_stride = stride;
        if ((height - y - ROWS) * stride < copy_stride) { /* the memory of `pixels` may end after the last row */
            for (int64_t k = 0; k < ROWS && y + k < height; k++)
                memcpy(memory + k * copy_stride, in + k * stride, 3 * width);
            in = memory, in_stride = copy_stride;
        }
#ifdef AVX2
        if (__builtin_cpu_supports("avx2")) {
            resize_some_avx2(in, in_stride, side, &across, out, result.bytes);
            continue;
        }
#endif
        for (int64_t k = 0; k < ROWS && y + k < height; k++)
            resize_row(in + k * in_stride, side, &across, out + k * result.bytes);
    }
    return result;
}

/* Write the lines `first` to `end` - 1 of the square to `out`, without gaps. */
static void resize_columns(const resized_rows *rows, int64_t side, int64_t first, int64_t end, uint8_t *out) {
    uint8_t line[rows->bytes]; /* longer than a line of `out` */
    for (int64_t i = first; i < end; i++, out += 3 * side) {
        const int fits = (end - i) * 3 * side >= rows->bytes; /* the next line replaces the bytes after line i */
#ifdef AVX2
        if (__builtin_cpu_supports("avx2"))
            resize_line_avx2(rows->rows, rows->bytes, rows->height, &rows->weights, i, fits ? out : line);
        else
#endif
            resize_line(rows->rows, rows->bytes, rows->height, &rows->weights, i, fits ? out : line);
        if (!fits)
            memcpy(out, line, 3 * side);
    }
}
