/* Effects: colour jitter, grey and blur of one window, and erasing a box of the finished image. kernels.c includes this
 * file. pipeline/effects/ has the parameters, the formulas and their sources. pipeline/effects/batch.py computes the
 * same bits with PyTorch. All arithmetic is on integers, so every compiler gives the same bits. */

enum { BRIGHTNESS = 0, CONTRAST = 1, SATURATION = 2, HUE = 3 };
enum { FACTOR_BITS = 12, ROW_BITS = 7, BLOCK = 64 };

typedef struct {
    int32_t order[4];  /* the operations of the jitter in their order: BRIGHTNESS to HUE, or -1 for no operation */
    int32_t factor[4]; /* factors of brightness, contrast and saturation, times 4096; hue: rotation in sextants, times 4096 */
    int32_t grey;      /* 1: the window becomes grey */
    int32_t radius;    /* number of blur weights on each side of the middle; 0: no blur */
} effects;

INLINE uint8_t clip(int32_t value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

/* The floor of 0.2989 r + 0.587 g + 0.114 b, exactly, for 0..255. The weights in the code are multiplied by 2^22 and
 * rounded. Adding 272 corrects this rounding. */
INLINE int32_t grey_level(int32_t r, int32_t g, int32_t b) {
    return (1253677 * r + 2462056 * g + 478151 * b + 272) >> 22;
}

/* Brightness and contrast: x becomes the floor of (factor x + offset) / 4096, within 0..255. */
INLINE void blend_constant(uint8_t *restrict x, int64_t count, int32_t factor, int32_t offset) {
    for (int64_t i = 0; i < count; i++)
        x[i] = clip((factor * x[i] + offset) >> FACTOR_BITS);
}

/* Return the `offset` of blend_constant for contrast: the product of (4096 - factor) and the mean grey level, rounded
 * down. */
INLINE int32_t contrast_offset(const uint8_t *r, const uint8_t *g, const uint8_t *b, int64_t count, int32_t factor) {
    int64_t sum = 0;
    for (int64_t first = 0; first < count; first += 1 << 16) { /* the sum of 65,536 grey levels fits in 32 bits */
        const int64_t end = first + (1 << 16) < count ? first + (1 << 16) : count;
        int32_t part = 0;
        for (int64_t i = first; i < end; i++)
            part += grey_level(r[i], g[i], b[i]);
        sum += part;
    }
    const int64_t product = ((1 << FACTOR_BITS) - factor) * sum;
    return product / count - (product % count < 0);
}

INLINE void blend_grey(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, int64_t count, int32_t factor) {
    for (int64_t i = 0; i < count; i++) {
        const int32_t grey = ((1 << FACTOR_BITS) - factor) * grey_level(r[i], g[i], b[i]);
        r[i] = clip((factor * r[i] + grey) >> FACTOR_BITS);
        g[i] = clip((factor * g[i] + grey) >> FACTOR_BITS);
        b[i] = clip((factor * b[i] + grey) >> FACTOR_BITS);
    }
}

/* A channel after the rotation of the hue: max - chroma * max(0, min(k, 4 - k, 1)), with k = (hue + n) mod 6 and n = 5,
 * 3, 1 for R, G, B. `angle` is chroma * (hue + n) * 4096, from 0 to less than 12 * unit. `unit` is chroma * 4096. */
INLINE uint8_t hue_channel(int32_t max, int32_t unit, int32_t angle) {
    int32_t k = angle >= 6 * unit ? angle - 6 * unit : angle;
    k = k < 4 * unit - k ? k : 4 * unit - k;
    k = k < unit ? k : unit;
    const int32_t level = (max << FACTOR_BITS) - (k > 0 ? k : 0);
    return (level + (level * 257 >> 16)) >> FACTOR_BITS; /* about level * 255.999 / 255, as in torchvision */
}

INLINE void rotate_hue(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, int64_t count, int32_t sextants) {
    for (int64_t i = 0; i < count; i++) {
        const int32_t red = r[i], green = g[i], blue = b[i];
        const int32_t low = red < green ? red : green, high = red < green ? green : red;
        const int32_t max = high > blue ? high : blue, chroma = max - (low < blue ? low : blue);
        const int32_t unit = chroma << FACTOR_BITS;
        const int32_t from_red = green - blue, from_green = 2 * chroma + blue - red, from_blue = 4 * chroma + red - green;
        const int32_t hue = max == red ? from_red : max == green ? from_green : from_blue; /* the hue times chroma */
        int32_t angle = hue * (1 << FACTOR_BITS) + chroma * sextants; /* from -unit to less than 11 * unit */
        angle = angle < 0 ? angle + 6 * unit : angle;
        angle = angle >= 6 * unit ? angle - 6 * unit : angle;
        r[i] = hue_channel(max, unit, angle + 5 * unit);
        g[i] = hue_channel(max, unit, angle + 3 * unit);
        b[i] = hue_channel(max, unit, angle + unit);
    }
}

INLINE void make_grey(uint8_t *restrict r, uint8_t *restrict g, uint8_t *restrict b, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        r[i] = g[i] = b[i] = grey_level(r[i], g[i], b[i]);
}

/* The smallest multiple of BLOCK that is at least `side`. */
INLINE int64_t row_width(int64_t side) { return (side + BLOCK - 1) / BLOCK * BLOCK; }

INLINE int64_t reflect(int64_t i, int64_t side) { return i < 0 ? -i : i >= side ? 2 * side - 2 - i : i; }

/* The cast lets the compiler use one instruction for several products. */
INLINE uint16_t multiply_high(uint16_t a, uint16_t b) { return (uint16_t)((uint32_t)a * b >> 16); }

/* Weighted sums of BLOCK columns: middle * weights[0] plus (first[k] + second[k]) * weights[k] for k = 1..radius. Each
 * product is divided by 65536 and rounded down. `bias` corrects the mean error of this rounding. */
INLINE void weighted_sums(const uint16_t *middle, const uint16_t *const *first, const uint16_t *const *second, int64_t column,
                          const uint16_t *weights, uint16_t bias, uint16_t *out) {
    const uint16_t weight = weights[0], *m = middle + column;
    uint16_t sums[BLOCK]; /* stays in registers */
    for (int64_t j = 0; j < BLOCK; j++)
        sums[j] = multiply_high(m[j], weight) + bias;
    for (int64_t k = 1; weights[k]; k++) {
        const uint16_t weight = weights[k], *a = first[k] + column, *b = second[k] + column;
        for (int64_t j = 0; j < BLOCK; j++) {
            const uint16_t both = a[j] + b[j];
            sums[j] += multiply_high(both, weight);
        }
    }
    memcpy(out, sums, sizeof sums);
}

/* Blur one channel: a row pass to `rows`, then a column pass, both with 7 bits after the binary point. The last step
 * rounds to nearest. Pixels outside the image are reflections of the image at its edge pixels. */
INLINE void blur_channel(uint8_t *restrict x, int64_t side, const uint16_t *weights, int64_t radius, uint16_t *restrict rows) {
    const int64_t width = row_width(side);
    const uint16_t bias = (radius + 1) / 2, *first[radius + 1], *second[radius + 1];
    uint16_t padded[width + 2 * radius], sums[BLOCK];
    memset(padded, 0, sizeof padded);
    for (int64_t i = 0; i < side; i++) {
        const uint8_t *row = x + i * side;
        for (int64_t j = 0; j < side; j++)
            padded[radius + j] = row[j] << ROW_BITS;
        for (int64_t k = 1; k <= radius; k++)
            padded[radius - k] = row[k] << ROW_BITS, padded[radius + side - 1 + k] = row[side - 1 - k] << ROW_BITS;
        for (int64_t k = 1; k <= radius; k++)
            first[k] = padded + radius - k, second[k] = padded + radius + k;
        for (int64_t j = 0; j < side; j += BLOCK)
            weighted_sums(padded + radius, first, second, j, weights, bias, rows + i * width + j);
    }
    for (int64_t i = 0; i < side; i++) {
        for (int64_t k = 1; k <= radius; k++)
            first[k] = rows + reflect(i - k, side) * width, second[k] = rows + reflect(i + k, side) * width;
        for (int64_t j = 0; j < side; j += BLOCK) {
            weighted_sums(rows + i * width, first, second, j, weights, bias + (1 << (ROW_BITS - 1)), sums);
            const int64_t columns = side - j < BLOCK ? side - j : BLOCK;
            for (int64_t c = 0; c < columns; c++)
                x[i * side + j + c] = sums[c] >> ROW_BITS;
        }
    }
}

/* Number of bytes of memory that apply_effects needs: for rows of the blur, the three channels, and the result. */
static int64_t effect_bytes(int64_t side) { return 2 * side * row_width(side) + 6 * side * side; }

/* Apply the effects to a window of side * side pixels, whose rows are `stride` bytes apart. Writes the result to
 * `memory`, without gaps between rows, and returns the address of the result. */
EACH_CPU const uint8_t *apply_effects(const uint8_t *pixels, int64_t stride, int64_t side, const effects *e,
                                      const uint16_t *weights, uint8_t *memory) {
    const int64_t count = side * side;
    uint16_t *rows = (uint16_t *)memory;
    uint8_t *channels = memory + 2 * side * row_width(side), *r = channels, *g = r + count, *b = g + count;
    uint8_t *restrict out = b + count;
    for (int64_t i = 0; i < side; i++)
        for (int64_t j = 0; j < side; j++) {
            const uint8_t *pixel = pixels + i * stride + 3 * j;
            r[i * side + j] = pixel[0], g[i * side + j] = pixel[1], b[i * side + j] = pixel[2];
        }
    for (int64_t k = 0; k < 4; k++) {
        const int32_t operation = e->order[k], factor = operation < 0 ? 0 : e->factor[operation];
        if (operation == BRIGHTNESS)
            blend_constant(channels, 3 * count, factor, 0);
        else if (operation == CONTRAST)
            blend_constant(channels, 3 * count, factor, contrast_offset(r, g, b, count, factor));
        else if (operation == SATURATION)
            blend_grey(r, g, b, count, factor);
        else if (operation == HUE)
            rotate_hue(r, g, b, count, factor);
    }
    if (e->grey)
        make_grey(r, g, b, count);
    for (int64_t c = 0; e->radius && c < 3; c++)
        blur_channel(channels + c * count, side, weights, e->radius, rows);
    for (int64_t i = 0; i < count; i++)
        out[3 * i] = r[i], out[3 * i + 1] = g[i], out[3 * i + 2] = b[i];
    return out;
}

/* Set a box of a finished image to 0. `box` is row, column, height and width. */
static void erase_box(float *image, int64_t side, int32_t channels_last, const int32_t *box) {
    const int64_t top = box[0], left = box[1], height = box[2], width = box[3];
    for (int64_t i = top; i < top + height; i++) {
        if (channels_last)
            memset(image + 3 * (i * side + left), 0, 3 * width * sizeof *image);
        else
            for (int64_t c = 0; c < 3; c++)
                memset(image + (c * side + i) * side + left, 0, width * sizeof *image);
    }
}
