/* The elementwise half of a training step on a CPU: ReLU, normalization across maps and max-pooling in one pass over
 * memory, and the update of the parameters. Called by kernels.py; lrn.py, pool.py and optim.py hold the same as PyTorch
 * operators. Maps lie channels last: (images, rows, columns, maps) without gaps. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef CLONES /* each function twice, the better one for this CPU chosen when the library is loaded */
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

/* b = a (k + alpha * sum of a² over `reach` maps on either side)^-3/4, with beta always 3/4. */
typedef struct {
    int64_t maps, reach; /* reach < maps */
    int64_t relu;        /* a is max(x, 0), else x */
    float alpha, k;
} norm;

/* Max-pooling, 3 by 3 with stride 2, of b, or of x itself. */
typedef struct {
    int64_t rows, columns; /* of x, 3 at the least */
    int64_t normalise, relu_after;
} pool;

#define POOLED(n) (((n) - 3) / 2 + 1)
#define NOTHING 9 /* in place of the tap, 0 to 8, that a gradient goes to: ReLU lets none through */

INLINE float positive(float x) { return x < 0 ? 0 : x; } /* NaN stays */

/* Numbers of `count` positions with `reach` zeros before, between and after them: a sum over neighboring maps needs no
 * question where the ends are. */
#define PADDED(count, how) ((how).reach + (count) * ((how).maps + (how).reach))

INLINE void pad(int64_t count, norm how, float *padded) {
    memset(padded, 0, PADDED(count, how) * sizeof *padded);
}

INLINE float window(const float *padded, int64_t reach) {
    if (reach == 2) /* the paper's five maps: vectors want it without a loop */
        return padded[0] + padded[1] + padded[2] + padded[3] + padded[4];
    float sum = padded[0];
    for (int64_t t = 1; t <= 2 * reach; t++)
        sum += padded[t];
    return sum;
}

INLINE void put_squares(const float *restrict x, int64_t count, norm how, int64_t reach, float *restrict squares) {
    for (int64_t p = 0; p < count; p++, x += how.maps) {
        float *restrict to = squares + reach + p * (how.maps + reach);
        for (int64_t i = 0; i < how.maps; i++) {
            const float a = how.relu ? positive(x[i]) : x[i];
            to[i] = a * a;
        }
    }
}

INLINE void normalize_by(const float *restrict x, int64_t count, norm how, int64_t reach, float *restrict squares,
                         float *restrict out) {
    put_squares(x, count, how, reach, squares);
    for (int64_t p = 0; p < count; p++, x += how.maps, out += how.maps) {
        const float *restrict from = squares + p * (how.maps + reach);
        for (int64_t i = 0; i < how.maps; i++) {
            const float root = 1 / sqrtf(how.k + how.alpha * window(from + i, reach));
            out[i] = (how.relu ? positive(x[i]) : x[i]) * (root * sqrtf(root));
        }
    }
}

/* Forward, for `count` positions; `squares` is padded. */
INLINE void normalise(const float *x, int64_t count, norm how, float *squares, float *out) {
    if (how.reach == 2) /* the paper's five maps, without a loop */
        normalize_by(x, count, how, 2, squares, out);
    else
        normalize_by(x, count, how, how.reach, squares, out);
}

/* dL/dx_i = g_i s_i^-3/4 - 2 alpha 3/4 a_i sum over the window of g_j a_j s_j^-7/4, and nothing where ReLU cut. */
INLINE void normalize_back_by(const float *restrict x, const float *restrict grad, int64_t count, norm how,
                              int64_t reach, float *restrict squares, float *restrict terms, float *restrict out) {
    put_squares(x, count, how, reach, squares);
    for (int64_t p = 0; p < count; p++) {
        const float *restrict from = squares + p * (how.maps + reach);
        const float *restrict a = x + p * how.maps, *restrict g = grad + p * how.maps;
        float *restrict to = terms + reach + p * (how.maps + reach), *restrict direct = out + p * how.maps;
        for (int64_t i = 0; i < how.maps; i++) {
            const float root = 1 / sqrtf(how.k + how.alpha * window(from + i, reach));
            direct[i] = g[i] * (root * sqrtf(root));
            to[i] = direct[i] * (how.relu ? positive(a[i]) : a[i]) * (root * root);
        }
    }
    const float factor = 1.5f * how.alpha;
    for (int64_t p = 0; p < count; p++, x += how.maps, out += how.maps) {
        const float *restrict from = terms + p * (how.maps + reach);
        for (int64_t i = 0; i < how.maps; i++) {
            const float found = out[i] - factor * x[i] * window(from + i, reach);
            out[i] = how.relu && x[i] <= 0 ? 0 : found;
        }
    }
}

/* Backward, for `count` positions; `squares` and `terms` are padded. */
INLINE void normalize_back(const float *x, const float *grad, int64_t count, norm how, float *squares, float *terms,
                           float *out) {
    if (how.reach == 2)
        normalize_back_by(x, grad, count, how, 2, squares, terms, out);
    else
        normalize_back_by(x, grad, count, how, how.reach, squares, terms, out);
}

/* `positions` of x to out, some at a time. `scratch` is for PADDED(some) numbers. */
EACH_CPU void norm_forward(const float *x, int64_t positions, int64_t some, norm how, float *out, float *scratch) {
    pad(some, how, scratch);
    for (int64_t p = 0; p < positions; p += some)
        normalise(x + p * how.maps, positions - p < some ? positions - p : some, how, scratch, out + p * how.maps);
}

/* The gradient of x, given b's. `scratch` is for 2 * PADDED(some) numbers. */
EACH_CPU void norm_backward(const float *x, const float *grad, int64_t positions, int64_t some, norm how, float *out,
                            float *scratch) {
    float *terms = scratch + PADDED(some, how);
    pad(some, how, scratch), pad(some, how, terms);
    for (int64_t p = 0; p < positions; p += some) {
        const int64_t at = p * how.maps, count = positions - p < some ? positions - p : some;
        normalize_back(x + at, grad + at, count, how, scratch, terms, out + at);
    }
}

/* One row of windows over three lines of `maps` numbers a position: the greatest, and which of the nine. As PyTorch
 * has it, the first of equals, and NaN is greater than all. */
INLINE void pool_line(const float *const lines[3], int64_t windows, int64_t maps, int64_t relu, float *restrict out,
                      uint8_t *restrict taps) {
    for (int64_t q = 0; q < windows; q++, out += maps, taps += maps) {
        const float *restrict a = lines[0] + 2 * q * maps, *restrict b = lines[1] + 2 * q * maps;
        const float *restrict c = lines[2] + 2 * q * maps;
        for (int64_t i = 0; i < maps; i++) {
            const float values[9] = {a[i], a[maps + i], a[2 * maps + i], b[i],           b[maps + i],
                                     b[2 * maps + i], c[i], c[maps + i], c[2 * maps + i]};
            float most = values[0];
            int32_t tap = 0;
            for (int32_t t = 1; t < 9; t++) {
                const int take = (values[t] > most) | (values[t] != values[t]);
                most = take ? values[t] : most, tap = take ? t : tap;
            }
            taps[i] = (uint8_t)(relu && most <= 0 ? NOTHING : tap);
            out[i] = relu ? positive(most) : most;
        }
    }
}

/* Where a gradient may come from: windows of one row, and which tap of theirs the line is, left to right + 0, 1, 2. */
typedef struct {
    const float *grad;
    const uint8_t *taps;
    int32_t first; /* NOBODY where there is no such row */
} sender;

#define NOBODY 10 /* no tap is this or more */

INLINE float sent(const float *grad, const uint8_t *taps, int64_t at, int32_t tap) {
    const float all = grad[at];
    return taps[at] == tap ? all : 0;
}

/* The gradient of one line of the pool's input from the one or two rows of windows over it. */
INLINE void pool_line_from(sender a, sender b, int64_t both, int64_t columns, int64_t maps, float *restrict out) {
    const int64_t windows = POOLED(columns);
    for (int64_t q = 0; q <= windows; q++) { /* columns 2q, the left of window q and the right of q - 1, and 2q + 1 */
        const int64_t here = (q < windows ? q : q - 1) * maps, before = (q > 0 ? q - 1 : q) * maps;
        const int32_t left = q < windows ? 0 : NOBODY, right = q > 0 ? 2 : NOBODY, middle = left + 1;
        float *restrict even = out + 2 * q * maps, *restrict odd = even + maps;
        for (int64_t i = 0; i < maps; i++) {
            even[i] = sent(a.grad, a.taps, here + i, a.first + left) + sent(a.grad, a.taps, before + i, a.first + right) +
                      (both ? sent(b.grad, b.taps, here + i, b.first + left) +
                                  sent(b.grad, b.taps, before + i, b.first + right)
                            : 0);
        }
        if (2 * q + 1 < columns)
            for (int64_t i = 0; i < maps; i++)
                odd[i] = sent(a.grad, a.taps, here + i, a.first + middle) +
                         (both ? sent(b.grad, b.taps, here + i, b.first + middle) : 0);
    }
}

INLINE void pool_line_back(const float *grad, const uint8_t *taps, int64_t row, int64_t rows, int64_t columns,
                           int64_t maps, float *restrict out) {
    const int64_t p = row / 2, line = POOLED(columns) * maps, last = POOLED(rows) - 1, at = (p < last ? p : last) * line;
    const sender a = {grad + at, taps + at, p <= last ? row % 2 * 3 : NOBODY};
    if (row % 2 == 0 && p > 0) {
        const int64_t above = (p - 1) * line;
        const sender b = {grad + above, taps + above, 6};
        pool_line_from(a, b, 1, columns, maps, out);
    } else
        pool_line_from(a, a, 0, columns, maps, out);
}

/* ReLU, normalization and pooling of `images`. `scratch` is for 3 lines of columns * maps and PADDED(columns). */
EACH_CPU void pool_forward(const float *x, int64_t images, pool shape, norm how, float *out, uint8_t *taps,
                           float *scratch) {
    const int64_t line = shape.columns * how.maps;
    const int64_t windows = POOLED(shape.columns), pooled_line = windows * how.maps;
    float *squares = scratch + 3 * line;
    pad(shape.columns, how, squares);
    for (int64_t image = 0; image < images; image++, x += shape.rows * line) {
        int64_t ready = 0; /* lines of this image that are normalized */
        for (int64_t p = 0; p < POOLED(shape.rows); p++, out += pooled_line, taps += pooled_line) {
            const float *lines[3];
            for (; shape.normalise && ready < 2 * p + 3; ready++)
                normalise(x + ready * line, shape.columns, how, squares, scratch + ready % 3 * line);
            for (int64_t row = 2 * p; row < 2 * p + 3; row++)
                lines[row - 2 * p] = shape.normalise ? scratch + row % 3 * line : x + row * line;
            pool_line(lines, windows, how.maps, shape.relu_after, out, taps);
        }
    }
}

/* The gradient of x, given the pooled maps'. `scratch` is for a line of columns * maps and 2 * PADDED(columns). */
EACH_CPU void pool_backward(const float *x, const float *grad, const uint8_t *taps, int64_t images, pool shape,
                            norm how, float *out, float *scratch) {
    const int64_t line = shape.columns * how.maps;
    const int64_t pooled = POOLED(shape.rows) * POOLED(shape.columns) * how.maps;
    float *squares = scratch + line, *terms = squares + PADDED(shape.columns, how);
    pad(shape.columns, how, squares), pad(shape.columns, how, terms);
    for (int64_t image = 0; image < images; image++, grad += pooled, taps += pooled)
        for (int64_t row = 0; row < shape.rows; row++, x += line, out += line) {
            float *into = shape.normalise ? scratch : out;
            pool_line_back(grad, taps, row, shape.rows, shape.columns, how.maps, into);
            if (shape.normalise)
                normalize_back(x, into, shape.columns, how, squares, terms, out);
        }
}

/* v <- momentum v - rate decay w - rate g, then w <- w + v, for `count` numbers. */
EACH_CPU void update(float *restrict w, float *restrict v, const float *restrict g, int64_t count, float momentum,
                     float rate, float decay) {
    const float pull = rate * decay;
    for (int64_t i = 0; i < count; i++) {
        v[i] = momentum * v[i] - pull * w[i] - rate * g[i];
        w[i] += v[i];
    }
}
