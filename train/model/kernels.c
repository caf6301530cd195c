/* Operations of a training step on a CPU, each in one pass over memory: ReLU, local response normalization and
 * max-pooling; the parameter update; sums of squares. kernels.py calls the functions. lrn.py, pooling.py and
 * train/optim have equivalents in PyTorch operators. Feature maps are channels-last arrays (images, rows, columns,
 * maps) without gaps. A "position" is one pixel of one image: `maps` consecutive values. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef CLONES /* compile each function twice; the dynamic linker picks the fastest version that this CPU can run */
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

/* Parameters of b = a (k + alpha * sum of a²)^-3/4. The sum is over a map and the `reach` maps on each side of this
 * map. beta is always 3/4. */
typedef struct {
    int64_t maps, reach; /* reach < maps */
    int64_t relu;        /* nonzero: a = max(x, 0); zero: a = x */
    float alpha, k;
} norm_params;

/* Parameters of 3 by 3 max-pooling with stride 2. If `normalize`, b (see norm_params) is pooled, and otherwise x. */
typedef struct {
    int64_t rows, columns; /* of x, at least 3 */
    int64_t normalize, relu_after;
} pool_params;

#define POOLED(n) (((n) - 3) / 2 + 1)
#define NO_GRADIENT 9 /* stored instead of an argmax (0 to 8) if ReLU lets no gradient through */

INLINE float positive(float x) { return x < 0 ? 0 : x; } /* NaN stays NaN */

/* Length, in values, of a buffer for `count` positions with `reach` zeros before, between and after positions. Because
 * of the zeros, a sum over neighboring maps needs no test for the first and last maps. */
#define PADDED(count, norm) ((norm).reach + (count) * ((norm).maps + (norm).reach))

INLINE void clear_padded(int64_t count, norm_params norm, float *padded) {
    memset(padded, 0, PADDED(count, norm) * sizeof *padded);
}

INLINE float window_sum(const float *padded, int64_t reach) {
    if (reach == 2) /* a window of five maps, as in the paper; the compiler vectorizes the sum without a loop */
        return padded[0] + padded[1] + padded[2] + padded[3] + padded[4];
    float sum = padded[0];
    for (int64_t t = 1; t <= 2 * reach; t++)
        sum += padded[t];
    return sum;
}

INLINE void write_squares(const float *restrict x, int64_t count, norm_params norm, int64_t reach,
                          float *restrict squares) {
    for (int64_t p = 0; p < count; p++, x += norm.maps) {
        float *restrict to = squares + reach + p * (norm.maps + reach);
        for (int64_t i = 0; i < norm.maps; i++) {
            const float a = norm.relu ? positive(x[i]) : x[i];
            to[i] = a * a;
        }
    }
}

INLINE void normalize_with_reach(const float *restrict x, int64_t count, norm_params norm, int64_t reach,
                                 float *restrict squares, float *restrict out) {
    write_squares(x, count, norm, reach, squares);
    for (int64_t p = 0; p < count; p++, x += norm.maps, out += norm.maps) {
        const float *restrict from = squares + p * (norm.maps + reach);
        for (int64_t i = 0; i < norm.maps; i++) {
            const float root = 1 / sqrtf(norm.k + norm.alpha * window_sum(from + i, reach));
            out[i] = (norm.relu ? positive(x[i]) : x[i]) * (root * sqrtf(root));
        }
    }
}

/* Forward pass for `count` positions. `squares` has the layout of PADDED(count), with zero padding. */
INLINE void normalize(const float *x, int64_t count, norm_params norm, float *squares, float *out) {
    if (norm.reach == 2) /* a constant, so that window_sum needs no loop */
        normalize_with_reach(x, count, norm, 2, squares, out);
    else
        normalize_with_reach(x, count, norm, norm.reach, squares, out);
}

/* dL/dx_i = g_i s_i^-3/4 - 2 alpha 3/4 a_i sum over the window of g_j a_j s_j^-7/4, and 0 where ReLU gave 0.
 * g is dL/db, and s_i = k + alpha * sum over the window of a_j². */
INLINE void normalize_backward_with_reach(const float *restrict x, const float *restrict grad, int64_t count,
                                          norm_params norm, int64_t reach, float *restrict squares,
                                          float *restrict terms, float *restrict out) {
    write_squares(x, count, norm, reach, squares);
    for (int64_t p = 0; p < count; p++) {
        const float *restrict from = squares + p * (norm.maps + reach);
        const float *restrict a = x + p * norm.maps, *restrict g = grad + p * norm.maps;
        float *restrict to = terms + reach + p * (norm.maps + reach), *restrict direct = out + p * norm.maps;
        for (int64_t i = 0; i < norm.maps; i++) {
            const float root = 1 / sqrtf(norm.k + norm.alpha * window_sum(from + i, reach));
            direct[i] = g[i] * (root * sqrtf(root));
            to[i] = direct[i] * (norm.relu ? positive(a[i]) : a[i]) * (root * root);
        }
    }
    const float factor = 1.5f * norm.alpha;
    for (int64_t p = 0; p < count; p++, x += norm.maps, out += norm.maps) {
        const float *restrict from = terms + p * (norm.maps + reach);
        for (int64_t i = 0; i < norm.maps; i++) {
            const float gradient = out[i] - factor * x[i] * window_sum(from + i, reach);
            out[i] = norm.relu && x[i] <= 0 ? 0 : gradient;
        }
    }
}

/* Backward pass for `count` positions. `squares` and `terms` have the layout of PADDED(count), with zero padding. */
INLINE void normalize_backward(const float *x, const float *grad, int64_t count, norm_params norm, float *squares,
                               float *terms, float *out) {
    if (norm.reach == 2)
        normalize_backward_with_reach(x, grad, count, norm, 2, squares, terms, out);
    else
        normalize_backward_with_reach(x, grad, count, norm, norm.reach, squares, terms, out);
}

/* Normalize the first `positions` positions of x into out, `block` at a time. `scratch` has PADDED(block) values. */
EACH_CPU void norm_forward(const float *x, int64_t positions, int64_t block, norm_params norm, float *out,
                           float *scratch) {
    clear_padded(block, norm, scratch);
    for (int64_t p = 0; p < positions; p += block) {
        const int64_t at = p * norm.maps, count = positions - p < block ? positions - p : block;
        normalize(x + at, count, norm, scratch, out + at);
    }
}

/* Compute the gradient of x from the gradient of norm_forward's output. `scratch` has 2 * PADDED(block) values. */
EACH_CPU void norm_backward(const float *x, const float *grad, int64_t positions, int64_t block, norm_params norm,
                            float *out, float *scratch) {
    float *terms = scratch + PADDED(block, norm);
    clear_padded(block, norm, scratch), clear_padded(block, norm, terms);
    for (int64_t p = 0; p < positions; p += block) {
        const int64_t at = p * norm.maps, count = positions - p < block ? positions - p : block;
        normalize_backward(x + at, grad + at, count, norm, scratch, terms, out + at);
    }
}

/* Pool three rows of x into one row of `windows` windows. Write the maximum of each 3 by 3 window, and the index, 0 to
 * 8, of the maximum within the window. As in PyTorch, the first of equal values counts, and NaN counts as greater than
 * any number. */
INLINE void pool_row(const float *const rows[3], int64_t windows, int64_t maps, int64_t relu, float *restrict out,
                     uint8_t *restrict argmax) {
    for (int64_t q = 0; q < windows; q++, out += maps, argmax += maps) {
        const float *restrict a = rows[0] + 2 * q * maps, *restrict b = rows[1] + 2 * q * maps;
        const float *restrict c = rows[2] + 2 * q * maps;
        for (int64_t i = 0; i < maps; i++) {
            const float values[9] = {a[i], a[maps + i], a[2 * maps + i], b[i],           b[maps + i],
                                     b[2 * maps + i], c[i], c[maps + i], c[2 * maps + i]};
            float maximum = values[0];
            int32_t index = 0;
            for (int32_t t = 1; t < 9; t++) {
                const int take = (values[t] > maximum) | (values[t] != values[t]);
                maximum = take ? values[t] : maximum, index = take ? t : index;
            }
            argmax[i] = (uint8_t)(relu && maximum <= 0 ? NO_GRADIENT : index);
            out[i] = relu ? positive(maximum) : maximum;
        }
    }
}

/* One row of pooling windows that covers a given row of x. */
typedef struct {
    const float *grad; /* the gradient of the pooled row */
    const uint8_t *argmax;
    int32_t first_index; /* index of the leftmost value of the row within a window: 0, 3 or 6; or NO_WINDOWS */
} window_row;

#define NO_WINDOWS 10 /* no window covers the value; larger than every value of argmax, which is at most 9 */

INLINE float gradient_if(const float *grad, const uint8_t *argmax, int64_t at, int32_t index) {
    const float gradient = grad[at];
    return argmax[at] == index ? gradient : 0;
}

/* Compute the gradient of one row of x, which is covered by the row of windows `a`, and also by `b` if `both`. */
INLINE void unpool_row_from(window_row a, window_row b, int64_t both, int64_t columns, int64_t maps,
                            float *restrict out) {
    const int64_t windows = POOLED(columns);
    /* Column 2q of x is the left column of window q and the right column of window q - 1. Column 2q + 1 is the middle
     * column of window q. */
    for (int64_t q = 0; q <= windows; q++) {
        const int64_t this = (q < windows ? q : q - 1) * maps, last = (q > 0 ? q - 1 : q) * maps;
        const int32_t left = q < windows ? 0 : NO_WINDOWS, right = q > 0 ? 2 : NO_WINDOWS, middle = left + 1;
        float *restrict even = out + 2 * q * maps, *restrict odd = even + maps;
        for (int64_t i = 0; i < maps; i++) {
            even[i] = gradient_if(a.grad, a.argmax, this + i, a.first_index + left) +
                      gradient_if(a.grad, a.argmax, last + i, a.first_index + right) +
                      (both ? gradient_if(b.grad, b.argmax, this + i, b.first_index + left) +
                                  gradient_if(b.grad, b.argmax, last + i, b.first_index + right)
                            : 0);
        }
        if (2 * q + 1 < columns)
            for (int64_t i = 0; i < maps; i++)
                odd[i] = gradient_if(a.grad, a.argmax, this + i, a.first_index + middle) +
                         (both ? gradient_if(b.grad, b.argmax, this + i, b.first_index + middle) : 0);
    }
}

/* Compute the gradient of row `row` of x. Row 2p of x is the top row of the windows in window row p, and the bottom row
 * of the windows in window row p - 1. */
INLINE void unpool_row(const float *grad, const uint8_t *argmax, int64_t row, int64_t rows, int64_t columns,
                       int64_t maps, float *restrict out) {
    const int64_t p = row / 2, length = POOLED(columns) * maps, last = POOLED(rows) - 1;
    const int64_t at = (p < last ? p : last) * length;
    const window_row a = {grad + at, argmax + at, p <= last ? row % 2 * 3 : NO_WINDOWS};
    if (row % 2 == 0 && p > 0) {
        const int64_t above = (p - 1) * length;
        const window_row b = {grad + above, argmax + above, 6};
        unpool_row_from(a, b, 1, columns, maps, out);
    } else
        unpool_row_from(a, a, 0, columns, maps, out);
}

/* ReLU, normalization and pooling of `images` images. `scratch` has 3 * columns * maps + PADDED(columns) values. */
EACH_CPU void pool_forward(const float *x, int64_t images, pool_params pool, norm_params norm, float *out,
                           uint8_t *argmax, float *scratch) {
    const int64_t length = pool.columns * norm.maps; /* the length of a row of x, in values */
    const int64_t windows = POOLED(pool.columns), pooled_length = windows * norm.maps;
    float *squares = scratch + 3 * length;
    clear_padded(pool.columns, norm, squares);
    for (int64_t image = 0; image < images; image++, x += pool.rows * length) {
        int64_t ready = 0; /* number of rows of this image that are normalized already */
        for (int64_t p = 0; p < POOLED(pool.rows); p++, out += pooled_length, argmax += pooled_length) {
            const float *rows[3];
            for (; pool.normalize && ready < 2 * p + 3; ready++)
                normalize(x + ready * length, pool.columns, norm, squares, scratch + ready % 3 * length);
            for (int64_t row = 2 * p; row < 2 * p + 3; row++)
                rows[row - 2 * p] = pool.normalize ? scratch + row % 3 * length : x + row * length;
            pool_row(rows, windows, norm.maps, pool.relu_after, out, argmax);
        }
    }
}

/* Compute the gradient of x from the gradient of the pooled maps. `scratch` has columns * maps + 2 * PADDED(columns)
 * values. */
EACH_CPU void pool_backward(const float *x, const float *grad, const uint8_t *argmax, int64_t images, pool_params pool,
                            norm_params norm, float *out, float *scratch) {
    const int64_t length = pool.columns * norm.maps;
    const int64_t pooled = POOLED(pool.rows) * POOLED(pool.columns) * norm.maps;
    float *squares = scratch + length, *terms = squares + PADDED(pool.columns, norm);
    clear_padded(pool.columns, norm, squares), clear_padded(pool.columns, norm, terms);
    for (int64_t image = 0; image < images; image++, grad += pooled, argmax += pooled)
        for (int64_t row = 0; row < pool.rows; row++, x += length, out += length) {
            float *unpooled = pool.normalize ? scratch : out;
            unpool_row(grad, argmax, row, pool.rows, pool.columns, norm.maps, unpooled);
            if (pool.normalize)
                normalize_backward(x, unpooled, pool.columns, norm, squares, terms, out);
        }
}

/* v <- momentum v - lr decay w - lr g, then w <- w + v, for `count` parameters. */
EACH_CPU void update(float *restrict w, float *restrict v, const float *restrict g, int64_t count, float momentum,
                     float lr, float decay) {
    const float pull = lr * decay;
    for (int64_t i = 0; i < count; i++) {
        v[i] = momentum * v[i] - pull * w[i] - lr * g[i];
        w[i] += v[i];
    }
}

#define LANES 8 /* number of independent sums; the compiler can use vectors without reordering the additions of a sum */

/* Write the sum of the squares of each block of `block` values of x, in float64. The last block can be shorter. The
 * square of a float32 number is exact in float64. */
EACH_CPU void sums_of_squares(const float *restrict x, int64_t count, int64_t block, double *restrict sums) {
    for (int64_t first = 0; first < count; first += block) {
        const int64_t end = first + block < count ? first + block : count;
        double lanes[LANES] = {0}, sum = 0;
        int64_t i = first;
        for (; i + LANES <= end; i += LANES)
            for (int lane = 0; lane < LANES; lane++)
                lanes[lane] += (double)x[i + lane] * x[i + lane];
        for (; i < end; i++)
            sum += (double)x[i] * x[i];
        for (int lane = 0; lane < LANES; lane++)
            sum += lanes[lane];
        *sums++ = sum;
    }
}
