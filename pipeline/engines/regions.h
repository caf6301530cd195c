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

/* Number of bytes of the table for blending (resample_avx2.h) of rows of `bytes` bytes. */
INLINE int64_t table_bytes(int64_t bytes) { return bytes / 8 * 4 + 6 * bytes; }

/* Number of bytes of memory that resize_rows uses. */
INLINE int64_t resize_bytes(int64_t height, int64_t width, int64_t side) {
    const int64_t pairs = most_pairs(width, side);
    const int64_t weights = weight_bytes(pairs, side) + weight_bytes(most_pairs(height, side), side);
    const int64_t rows = (height + ROWS - 1) * line_bytes(side);
    return rows + weights + table_bytes(line_bytes(side)) + copy_bytes(width, pairs);
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
#ifdef AVX2
    const int has_avx2 = __builtin_cpu_supports("avx2");
    blend_table table = {0};
    if (has_avx2 && across.is_blend)
        table = fill_table(&across, side, result.bytes, memory);
#endif
    memory += table_bytes(result.bytes);
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
        if (has_avx2 && across.is_blend) {
            blend_some_avx2(in, in_stride, table, out, result.bytes);
            continue;
        }
        if (has_avx2) {
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
        if (__builtin_cpu_supports("avx2") && rows->weights.is_blend)
            blend_line_avx2(rows->rows, rows->bytes, rows->height, &rows->weights, i, fits ? out : line);
        else if (__builtin_cpu_supports("avx2"))
            resize_line_avx2(rows->rows, rows->bytes, rows->height, &rows->weights, i, fits ? out : line);
        else
#endif
            resize_line(rows->rows, rows->bytes, rows->height, &rows->weights, i, fits ? out : line);
        if (!fits)
            memcpy(out, line, 3 * side);
    }
}
