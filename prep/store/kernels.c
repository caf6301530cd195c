/* Look up many records in the memory maps of LMDB shards. kernels.py calls these functions and explains the formats. */

#include <stdint.h>
#include <string.h>

typedef struct {
    const uint8_t *map; /* the mapped file data.mdb */
    int64_t bytes;      /* size of the map */
    int64_t page_bytes;
    int64_t root; /* number of the page at the root of the B+ tree; less than 0 if the shard cannot be searched */
} shard;

typedef struct {
    const uint8_t *image; /* the JPEG or PPM file in the map; null if the record was not found or has another format */
    int64_t bytes;        /* size of the file */
    int64_t height, width, label;
} record;

enum { PAGE_HEADER = 16, NODE_HEADER = 8, KEY = 8, MAX_DEPTH = 32, BRANCH = 1, LEAF = 2, PAGE_TYPES = 0x6f, IN_PAGES = 1 };

static int64_t u16(const uint8_t *p) { return p[0] | p[1] << 8; }
static int64_t u32(const uint8_t *p) { return u16(p) | u16(p + 2) << 16; }
static int64_t u64(const uint8_t *p) { return (int64_t)((uint64_t)u32(p) | (uint64_t)u32(p + 4) << 32); }

/* Return node `index` of a page; null if the node is not within the page. */
static const uint8_t *node(const shard *s, const uint8_t *page, int64_t index) {
    const int64_t offset = u16(page + PAGE_HEADER + 2 * index);
    if (offset + NODE_HEADER > s->page_bytes || offset + NODE_HEADER + u16(page + offset + 6) > s->page_bytes)
        return 0;
    return page + offset;
}

/* Compare the key of a node with `key` as LMDB does: bytes first, then the length. */
static int compare(const uint8_t *at, const uint8_t *key) {
    const int64_t length = u16(at + 6);
    const int order = memcmp(at + NODE_HEADER, key, length < KEY ? length : KEY);
    return order ? order : (length > KEY) - (length < KEY);
}

/* The value of `key` and its size; null if the key is missing or a page is damaged. Reads only within the map. */
static const uint8_t *find(const shard *s, const uint8_t *key, int64_t *size) {
    int64_t number = s->root;
    for (int depth = 0; depth < MAX_DEPTH; depth++) {
        if (number < 0 || number >= s->bytes / s->page_bytes)
            return 0;
        const uint8_t *page = s->map + number * s->page_bytes, *at;
        const int64_t type = u16(page + 10) & PAGE_TYPES, nodes = (u16(page + 12) - PAGE_HEADER) / 2;
        if (type != BRANCH && type != LEAF)
            return 0;
        if (nodes < 1 || PAGE_HEADER + 2 * nodes > s->page_bytes)
            return 0;
        int64_t first = 0, end = nodes; /* the last node that is not after `key` is in first..end - 1 */
        while (end - first > 1) {       /* the key of node 0 of a branch page is empty and is not compared */
            const int64_t middle = (first + end) / 2;
            if (!(at = node(s, page, middle)))
                return 0;
            if (compare(at, key) > 0)
                end = middle;
            else
                first = middle;
        }
        if (!(at = node(s, page, first)))
            return 0;
        if (type == BRANCH) {
            number = u32(at) | u16(at + 4) << 32;
            continue;
        }
        if (compare(at, key) != 0)
            return 0;
        const uint8_t *value = at + NODE_HEADER + KEY;
        const int64_t flags = u16(at + 4);
        *size = u32(at);
        if (flags == 0) /* a short value is in this page */
            return value - page + *size <= s->page_bytes ? value : 0;
        if (flags != IN_PAGES || value - page + 8 > s->page_bytes)
            return 0;
        number = u64(value); /* a long value is in its own pages, after a page header */
        if (number < 0 || number >= s->bytes / s->page_bytes)
            return 0;
        value = s->map + number * s->page_bytes + PAGE_HEADER;
        return *size <= s->map + s->bytes - value ? value : 0;
    }
    return 0;
}

/* Read a varint of at most 9 bytes at *at, and move *at to the byte after it. Returns -1 if the varint does not end. */
static int64_t varint(const uint8_t **at, const uint8_t *end) {
    uint64_t number = 0;
    for (int shift = 0; shift < 63 && *at < end; shift += 7) {
        const uint8_t byte = *(*at)++;
        number |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return (int64_t)number;
    }
    return -1;
}

/* Find the image in a record, as locate_image in datum.py does. Returns 0 if the record has another format. */
static int parse(const uint8_t *value, int64_t size, record *out) {
    const uint8_t *at = value, *end = value + size;
    if (size < 4 || memcmp(at, "\x08\x03\x10", 3) != 0)
        return 0;
    at += 3;
    if ((out->height = varint(&at, end)) < 0 || at == end || *at++ != 0x18)
        return 0;
    if ((out->width = varint(&at, end)) < 0 || at == end || *at++ != 0x22)
        return 0;
    if ((out->bytes = varint(&at, end)) < 0 || out->bytes >= end - at)
        return 0;
    out->image = at;
    at += out->bytes;
    return *at++ == 0x28 && (out->label = varint(&at, end)) >= 0;
}

/* Look up `count` records. Record k has the key keys[k] of 8 digits, in shard shards[shard_of[k]]. */
void find_records(const shard *shards, const int64_t *shard_of, const int64_t *keys, int64_t count, record *out) {
    for (int64_t k = 0; k < count; k++) {
        uint8_t key[KEY];
        int64_t digits = keys[k], size;
        for (int i = KEY - 1; i >= 0; i--, digits /= 10)
            key[i] = '0' + digits % 10;
        const shard *s = shards + shard_of[k];
        const uint8_t *value = keys[k] >= 0 && digits == 0 && s->root >= 0 ? find(s, key, &size) : 0;
        if (!value || !parse(value, size, out + k))
            out[k].image = 0;
    }
}
