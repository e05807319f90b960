/* Causal attention over packed documents for training, and its gradient, by blocks of keys (Dao 2023, FlashAttention-2):
   no tensor of queries × keys exists. Products are of NUMBERs and summed up in fp32, in AMX tiles where there are any.

   A document is a tree of a prompt and branches. Each of these segments is cut into blocks of LINE tokens, the last of
   which is filled up with zeros. Scores are turned: a row for each key, a column for each query, so that whatever is
   reckoned for a query is a lane of a vector. What comes out for a document does not depend on other documents, nor on threads. */

#include "lanes.h"

/* The widest head; blocks of keys that are attended to together, and whose gradients are; those of a stripe. */
enum { WIDEST = 256, CHUNK = 4, SOME = 2, STRIPE = 16, AREA = LINE * LINE, SLACK = 8 };

/* Tokens of a segment. They see the blocks of its prompt, if any, and those from `own`, its first one, to this. */
struct block { int32_t token, count, position, prompt, prompts, own; };

/* Keys of a document whose gradients are summed up together: blocks first to last − 1 of those up to end − 1. */
struct stripe { int32_t number, first, last, end; };

struct flash {
    int64_t packed, kept, taken;                     /* counters, 0 at first */
    int64_t blocks, stripes, heads, groups, width;   /* query heads, key-value heads, of one the width: n · 16 */
    int64_t q_stride, k_stride, v_stride;            /* from token to token */
    int64_t window, tiled;                           /* how far back a token sees; whether tiles may be used */
    const NUMBER *q, *k, *v;
    const struct block *table;                       /* [blocks] */
    const struct stripe *parts;                      /* [stripes], those of a document in order */
    NUMBER *keys, *values, *columns;                 /* blocks of keys; of values; of either, turned:
                                                        [blocks, groups, LINE · wide] */
    NUMBER *out, *rest;                              /* [tokens, heads, width], and what was lost in rounding it */
    float *log_sums;                                 /* of scores, to the base of 2, [blocks, heads, LINE] */
    const NUMBER *gradient;                          /* of out */
    NUMBER *of_q, *of_k, *of_v;                      /* gradients: [tokens, heads or groups, width] */
    float *sums;                                     /* gradients of q, turned, [blocks, heads, wide, LINE], and of how
                                                        many stripes they are: where a document has several */
    int64_t *turns;                                  /* [blocks, groups], 0 at first */
    float scale;
};

/* The width with zeros up to a whole number of lines. */
static inline int64_t wide_of(const struct flash *job) { return (job->width + LINE - 1) / LINE * LINE; }

static inline NUMBER *held(const struct flash *job, NUMBER *packed, int64_t block, int64_t group)
{
    return packed + (block * job->groups + group) * LINE * wide_of(job);
}

/* 2 to t, to 2e-7 of it; 0 where that would be less than a normal number, which is slow. See `exponential`. */
static inline lanes power(lanes t)
{
    lanes low = all(-126.0f), p = all(1.8775767e-3f);
#ifdef __AVX512F__
    __mmask16 some = _mm512_cmp_ps_mask((__m512)t, (__m512)low, _CMP_NLT_UQ);
    t = (lanes)_mm512_max_ps((__m512)low, (__m512)t); /* the second one where it is no number */
    lanes n = (lanes)_mm512_roundscale_ps((__m512)t, 1), f = t - n;
#else
    ints none = t < low, whole;
    t = pick(none, low, t);
    whole = __builtin_convertvector(t, ints);
    whole += (__builtin_convertvector(whole, lanes) > t);
    lanes f = t - __builtin_convertvector(whole, lanes);
#endif
    p = p * f + 8.9893397e-3f;
    p = p * f + 5.5826318e-2f;
    p = p * f + 2.4015361e-1f;
    p = p * f + 6.9315308e-1f;
    p = p * f + 9.9999994e-1f;
#ifdef __AVX512F__
    return (lanes)_mm512_maskz_scalef_ps(some, (__m512)p, (__m512)n);
#else
    return pick(none, all(0), p * (lanes)((whole + 127) << 23));
#endif
}

static inline lanes larger(lanes x, lanes y)
{
#ifdef __AVX512F__
    return (lanes)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return pick(x > y, x, y);
#endif
}

static inline int any_larger(lanes x, lanes y)
{
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GT_OQ) != 0;
#else
    ints found = x > y;
    int32_t some = 0;
    for (int i = 0; i < LANES; i++) some |= found[i];
    return some != 0;
#endif
}

/* Where LANES columns begin in panels of SIDE columns, each of so many rows. */
static inline int64_t panel_at(int64_t column, int64_t rows)
{
    return column / SIDE * SIDE * rows + column % SIDE * PAIR;
}

/* Two rows, where wanted as they are, and as a pair of a panel: beside one another where NUMBERs lie in pairs. */
static inline void put_both(NUMBER *rows, int64_t stride, NUMBER *pair, lanes first, lanes second)
{
    NUMBER rounded[2 * LANES];
#ifdef __AVX512BF16__
    if (is_float) {
        store(rounded, first);
        store(rounded + LANES, second);
    } else {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        memcpy(rounded, &both, sizeof both);
    }
#else
    store(rounded, first);
    store(rounded + LANES, second);
#endif
    if (rows) {
        memcpy(rows, rounded, sizeof rounded / 2);
        memcpy(rows + stride, rounded + LANES, sizeof rounded / 2);
    }
    if (!pair) return;
    if (is_float) {
        memcpy(pair, rounded, sizeof rounded / 2);
        memcpy(pair + SIDE, rounded + LANES, sizeof rounded / 2);
    } else *(lanes *)pair = (lanes)((words)load(rounded) >> 16 | (words)load(rounded + LANES));
}

/* 16 × 16 words with rows and columns exchanged; by halves, quarters and so on where a vector has 16 words. */
static inline void turn_words(const word *x, int64_t stride, word *out, int64_t out_stride)
{
#ifdef __AVX512F__
    words rows[SIDE];
    for (int r = 0; r < SIDE; r++) memcpy(rows + r, x + r * stride, sizeof rows[r]);
#pragma GCC unroll 4
    for (int step = SIDE / 2; step > 0; step /= 2) {
        words low, high;
        for (int i = 0; i < SIDE; i++) {
            low[i] = i & step ? SIDE + i - step : i;
            high[i] = i & step ? SIDE + i : i + step;
        }
#pragma GCC unroll 16
        for (int r = 0; r < SIDE; r++)
            if (!(r & step)) {
                words first = rows[r], second = rows[r + step];
                rows[r] = __builtin_shuffle(first, second, low);
                rows[r + step] = __builtin_shuffle(first, second, high);
            }
    }
    for (int r = 0; r < SIDE; r++) memcpy(out + r * out_stride, rows + r, sizeof rows[r]);
#else
    for (int r = 0; r < SIDE; r++)
        for (int c = 0; c < SIDE; c++) out[c * out_stride + r] = x[r * stride + c];
#endif
}

/* Tokens of a block, [LINE, wide], with zeros around them. */
static void copy(const struct flash *job, const struct block *block, const NUMBER *x, int64_t stride, NUMBER *rows)
{
    int64_t wide = wide_of(job), width = job->width;
    if (wide > width || block->count < LINE) memset(rows, 0, LINE * wide * sizeof(NUMBER));
    for (int64_t t = 0; t < block->count; t++)
        memcpy(rows + t * wide, x + (block->token + t) * stride, width * sizeof(NUMBER));
}

/* [LINE, wide] as what is multiplied from the right: a panel of SIDE columns after the other, `size` apart, with pairs
   of rows beside one another. */
static void pair_rows(const NUMBER *rows, int64_t wide, NUMBER *panels, int64_t size)
{
    for (int64_t e = 0; e < wide; e += LANES)
        for (int64_t t = 0; t < LINE; t += 2) {
            const NUMBER *row = rows + t * wide + e;
            put_both(NULL, 0, panels + panel_at(e, size / SIDE) + t * SIDE, load(row), load(row + wide));
        }
}

/* The same of the matrix turned, [wide, LINE]. */
static void pair_columns(const NUMBER *rows, int64_t wide, NUMBER *panels)
{
    int64_t size = wide / PAIR;
    for (int64_t t = 0; t < LINE; t += SIDE)
        for (int64_t w = 0; w < size; w += SIDE)
            turn_words((const word *)(rows + t * wide) + w, size, (word *)(panels + t * wide) + w * SIDE, SIDE);
}

/* [LINE, wide] → [wide, LINE]. */
static void turn_block(const NUMBER *rows, int64_t wide, NUMBER *out)
{
    NUMBER panels[LINE * WIDEST] __attribute__((aligned(64)));
    int64_t size = LINE / PAIR;
    pair_rows(rows, wide, panels, LINE * SIDE);
    for (int64_t e = 0; e < wide; e += SIDE)
        for (int64_t w = 0; w < size; w += SIDE)
            turn_words((const word *)(panels + e * LINE) + w * SIDE, SIDE, (word *)(out + e * LINE) + w, size);
}

/* What `pair_columns` was given. */
static void unpair_columns(const NUMBER *panels, int64_t wide, NUMBER *rows)
{
    int64_t size = wide / PAIR;
    for (int64_t t = 0; t < LINE; t += SIDE)
        for (int64_t w = 0; w < size; w += SIDE)
            turn_words((const word *)(panels + t * wide) + w * SIDE, SIDE, (word *)(rows + t * wide) + w, size);
}

/* Tokens of a block, in panels, to where they belong. */
static void
put_tokens(const struct flash *job, const struct block *block, const NUMBER *panels, NUMBER *out, int64_t stride)
{
    int64_t wide = wide_of(job);
    NUMBER rows[LINE * WIDEST] __attribute__((aligned(64)));
    unpair_columns(panels, wide, rows);
    for (int64_t t = 0; t < block->count; t++)
        memcpy(out + (block->token + t) * stride, rows + t * wide, job->width * sizeof(NUMBER));
}

/* [wide, LINE] in fp32, times a factor for each column, as tokens; what is lost in rounding goes to `rest`, if any. */
static void put_turned(const struct flash *job, const struct block *block, const float *sums, const lanes *factors,
                       NUMBER *out, NUMBER *rest, int64_t stride)
{
    int64_t wide = wide_of(job);
    NUMBER panels[LINE * WIDEST] __attribute__((aligned(64))), lost[LINE * WIDEST] __attribute__((aligned(64)));
    for (int64_t t = 0; t < LINE; t += LANES)
        for (int64_t e = 0; e < wide; e += 2) {
            lanes first = get(sums + e * LINE + t) * factors[t / LANES];
            lanes second = get(sums + (e + 1) * LINE + t) * factors[t / LANES];
            int64_t at = panel_at(t, wide) + e * SIDE;
            put_both(NULL, 0, panels + at, first, second);
            if (!rest) continue;
            words both = (words)*(const lanes *)(panels + at);
            put_both(NULL, 0, lost + at, first - (lanes)(both << 16), second - (lanes)(both & 0xffff0000));
        }
    put_tokens(job, block, panels, out, stride);
    if (rest) put_tokens(job, block, lost, rest, stride);
}

/* What is multiplied: rows in parts of LINE columns, `stride` from row to row, and panels as of `pair_rows`. */
struct factors {
    const NUMBER *const *left;
    int64_t parts, stride, rows;
    const NUMBER *right;
    int64_t columns;
};

#ifdef __AMX_BF16__
static const tiles whole __attribute__((aligned(64))) = {
    .palette = 1,
    .bytes = { 64, 64, 64, 64, 64, 64, 64, 64 },
    .rows = { SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE },
};

static void shape_tiles(void) { _tile_loadconfig(&whole); }

static void multiply_in_tiles(const struct factors *f, float *sums, int64_t width, int fresh)
{
    int64_t size = f->parts * LINE * SIDE, row = width * sizeof(float), stride = f->stride * sizeof(NUMBER);
    for (int64_t c = 0; c < f->columns; c += LINE)
        for (int64_t r = 0; r < f->rows; r += LINE) {
            float *above = sums + r * width + c, *below = above + SIDE * width;
            if (fresh) {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            } else {
                _tile_loadd(0, above, row);
                _tile_loadd(1, above + SIDE, row);
                _tile_loadd(2, below, row);
                _tile_loadd(3, below + SIDE, row);
            }
            for (int64_t p = 0; p < f->parts; p++) {
                const NUMBER *x = f->left[p] + r * f->stride, *y = f->right + c / SIDE * size + p * LINE * SIDE;
                _tile_loadd(4, x, stride);
                _tile_loadd(6, y, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, y + size, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, x + SIDE * f->stride, stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, above, row);
            _tile_stored(1, above + SIDE, row);
            _tile_stored(2, below, row);
            _tile_stored(3, below + SIDE, row);
        }
}
#else
static void shape_tiles(void) {}
static void _tile_release(void) {}
static void multiply_in_tiles(const struct factors *f, float *sums, int64_t width, int fresh) {}
#endif

/* Rows and columns whose sums fit into the registers. */
enum { ROWS = LANES == 16 ? 8 : 4, COLUMNS = 2 * LANES };

static void multiply_in_lanes(const struct factors *f, float *sums, int64_t width, int fresh)
{
    int64_t size = f->parts * LINE * SIDE;
    for (int64_t c = 0; c < f->columns; c += COLUMNS)
        for (int64_t r = 0; r < f->rows; r += ROWS) {
            float *at = sums + r * width + c;
            lanes left[ROWS] = {}, right[ROWS] = {};
            for (int i = 0; i < ROWS && !fresh; i++) left[i] = get(at + i * width), right[i] = get(at + i * width + LANES);
            for (int64_t p = 0; p < f->parts; p++) {
                const NUMBER *x = f->left[p] + r * f->stride, *of_part = f->right + p * LINE * SIDE;
                const NUMBER *y = of_part + panel_at(c, size / SIDE), *z = of_part + panel_at(c + LANES, size / SIDE);
                for (int64_t j = 0; j < LINE; j += 2)
#pragma GCC unroll 8
                    for (int i = 0; i < ROWS; i++) {
                        left[i] = with_two(left[i], y + j * SIDE, x + i * f->stride + j);
                        right[i] = with_two(right[i], z + j * SIDE, x + i * f->stride + j);
                    }
            }
            for (int i = 0; i < ROWS; i++) put(at + i * width, left[i]), put(at + i * width + LANES, right[i]);
        }
}

/* sums [rows, columns], `width` from row to row, plus the product, or the product alone. */
static void multiply(const struct flash *job, struct factors f, float *sums, int64_t width, int fresh)
{
    (job->tiled ? multiply_in_tiles : multiply_in_lanes)(&f, sums, width, fresh);
}

/* A block's rows times a block of queries, or of their gradients, in panels: [LINE, LINE]. */
static void meet(const struct flash *job, const NUMBER *rows, const NUMBER *panels, float *scores)
{
    int64_t wide = wide_of(job);
    const NUMBER *left[WIDEST / LINE];
    for (int64_t p = 0; p < wide / LINE; p++) left[p] = rows + p * LINE;
    multiply(job, (struct factors){ left, wide / LINE, wide, LINE, panels, LINE }, scores, LINE, 1);
}

/* Whether a token of block q sees a key of block k, which is one of its prompt or segment. */
static int sees(const struct flash *job, const struct block *q, const struct block *k)
{
    return k->position + k->count - 1 > q->position - job->window;
}

/* The first block from k on that block q sees, or q + 1. */
static int64_t seen_from(const struct flash *job, int64_t q, int64_t k)
{
    const struct block *block = job->table + q;
    for (; k <= q; k++) {
        if (k < block->prompt) k = block->prompt;
        if (k >= block->prompt + block->prompts && k < block->own) k = block->own;
        if (sees(job, block, job->table + k)) return k;
    }
    return q + 1;
}

/* Hides scores of keys that their queries do not see. */
static void hide(const struct flash *job, const struct block *q, const struct block *k, float *scores)
{
    int before = k->count == LINE && k->position + LINE - 1 <= q->position;
    if (before && k->position > q->position + q->count - 1 - job->window) return;
    for (int64_t t = 0; t < LINE; t += LANES) {
        ints place;
        for (int i = 0; i < LANES; i++) place[i] = q->position + t + i;
        for (int32_t j = 0; j < LINE; j++) {
            int32_t key = j < k->count ? k->position + j : INT32_MAX;
            ints seen = (place >= key) & (place - (int32_t)job->window < key);
            put(scores + j * LINE + t, pick(seen, get(scores + j * LINE + t), all(-INFINITY)));
        }
    }
}

static void pack(const struct flash *job, int64_t number)
{
    const struct block *block = job->table + number;
    NUMBER rows[LINE * WIDEST] __attribute__((aligned(64)));
    for (int64_t g = 0; g < job->groups; g++) {
        copy(job, block, job->k + g * job->width, job->k_stride, held(job, job->keys, number, g));
        NUMBER *values = job->values ? held(job, job->values, number, g) : rows;
        copy(job, block, job->v + g * job->width, job->v_stride, values);
        const NUMBER *turned = job->values ? held(job, job->keys, number, g) : values;
        turn_block(turned, wide_of(job), held(job, job->columns, number, g));
    }
}

/* Keys and values of all blocks are packed by all threads. */
static void pack_all(struct flash *job)
{
    int64_t block;
    while ((block = next(&job->packed)) < job->blocks) {
        pack(job, block);
        __atomic_fetch_add(&job->kept, 1, __ATOMIC_RELEASE);
    }
    wait_until(&job->kept, job->blocks);
}

/* The softmax so far of a block of queries: sums of values, turned; for each query the sum of weights, which are
   relative to 2^top. */
struct softmax {
    float sums[WIDEST * LINE] __attribute__((aligned(64)));
    lanes top[VECTORS], total[VECTORS];
};

/* Raises `top` to the largest of some scores, where that is much larger: weights may be as large as 2^SLACK. */
static void raise_top(struct softmax *s, int64_t v, const float *scores, int64_t rows, float scale, int64_t wide)
{
    lanes high[4] = { all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY) };
    for (int64_t j = 0; j < rows; j += 4)
        for (int i = 0; i < 4; i++) high[i] = larger(get(scores + (j + i) * LINE), high[i]);
    lanes most = larger(larger(high[0], high[1]), larger(high[2], high[3])) * scale, top = s->top[v];
    if (!any_larger(most, top + SLACK)) return;
    lanes raised = larger(most, top), kept = power(top - raised);
    s->top[v] = raised;
    s->total[v] *= kept;
    for (int64_t e = 0; e < wide; e++) {
        float *at = s->sums + e * LINE + v * LANES;
        put(at, get(at) * kept);
    }
}

/* Scores become weights, in pairs of keys, which are added up. */
static void weigh(struct softmax *s, int64_t v, const float *scores, int64_t rows, float scale, NUMBER *weights)
{
    lanes total[2] = {}, top = s->top[v];
    for (int64_t j = 0; j < rows; j += 2) {
        lanes first = power(get(scores + j * LINE) * scale - top);
        lanes second = power(get(scores + (j + 1) * LINE) * scale - top);
        total[0] += first;
        total[1] += second;
        put_both(NULL, 0, weights + j * SIDE, first, second);
    }
    s->total[v] += total[0] + total[1];
}

/* Attention of a block of queries, in panels, to so many blocks of keys. */
static void attend_to(const struct flash *job, struct softmax *s, const NUMBER *panels, const struct block *q,
                      const int64_t *blocks, int64_t count, int64_t group)
{
    int64_t wide = wide_of(job), rows = count * LINE;
    float scores[CHUNK * AREA] __attribute__((aligned(64))), scale = job->scale * 1.44269504f;
    NUMBER weights[CHUNK * AREA] __attribute__((aligned(64)));
    const NUMBER *values[CHUNK];
    for (int64_t b = 0; b < count; b++) {
        meet(job, held(job, job->keys, blocks[b], group), panels, scores + b * AREA);
        hide(job, q, job->table + blocks[b], scores + b * AREA);
        values[b] = held(job, job->columns, blocks[b], group);
    }
    for (int64_t v = 0; v < VECTORS; v++) {
        raise_top(s, v, scores + v * LANES, rows, scale, wide);
        weigh(s, v, scores + v * LANES, rows, scale, weights + panel_at(v * LANES, rows));
    }
    multiply(job, (struct factors){ values, count, LINE, wide, weights, LINE }, s->sums, LINE, 0);
}

/* Attention of a head of a block of queries. */
static void attend(const struct flash *job, int64_t number, int64_t head)
{
    const struct block *block = job->table + number;
    int64_t wide = wide_of(job), width = job->width, stride = job->heads * width, group = head / (job->heads / job->groups);
    int64_t blocks[CHUNK], count = 0;
    NUMBER rows[LINE * WIDEST] __attribute__((aligned(64))), panels[LINE * WIDEST] __attribute__((aligned(64)));
    struct softmax s;
    copy(job, block, job->q + head * width, job->q_stride, rows);
    pair_columns(rows, wide, panels);
    memset(s.sums, 0, wide * LINE * sizeof(float));
    for (int v = 0; v < VECTORS; v++) s.top[v] = all(-1e30f), s.total[v] = all(0);
    for (int64_t k = seen_from(job, number, 0); k <= number; k = seen_from(job, number, k + 1)) {
        blocks[count++] = k;
        if (count < CHUNK && k < number) continue;
        attend_to(job, &s, panels, block, blocks, count, group);
        count = 0;
    }
    lanes factors[VECTORS];
    for (int v = 0; v < VECTORS; v++) factors[v] = 1 / s.total[v];
    NUMBER *out = job->out + head * width, *rest = job->rest ? job->rest + head * width : NULL;
    put_turned(job, block, s.sums, factors, out, rest, stride);
    float *log_sums = job->log_sums + (number * job->heads + head) * LINE;
    for (int64_t t = 0; t < LINE; t++)
        log_sums[t] = t < block->count ? s.top[t / LANES][t % LANES] + log2f(s.total[t / LANES][t % LANES]) : 1e30f;
}

/* The task of most work comes first. */
void flash(struct flash *job)
{
    int64_t task, tasks = job->blocks * job->groups, shared = job->heads / job->groups;
    if (job->tiled) shape_tiles();
    pack_all(job);
    while ((task = tasks - 1 - next(&job->taken)) >= 0)
        for (int64_t r = 0; r < shared; r++) attend(job, task / job->groups, task % job->groups * shared + r);
    if (job->tiled) _tile_release();
}

/* What a thread needs for the gradients of a stripe, of R heads: sums of keys and values [STRIPE, LINE, wide], of queries
   [R, wide, LINE]; in panels queries and gradients of out, by columns [R, wide, LINE] and by rows [R · LINE, wide];
   weights and gradients of scores [R, SOME, LINE, LINE]; of each query its log-sum, and the sum of out times its gradient. */
struct room {
    float *of_keys, *of_values, *of_queries, *log_sums, *along;
    NUMBER *queries, *slopes, *query_rows, *slope_rows, *weights, *of_scores;
    void *itself;
};

static struct room make_room(const struct flash *job)
{
    int64_t size = wide_of(job) * LINE, shared = job->heads / job->groups;
    int64_t floats = (2 * STRIPE + shared) * size + 2 * shared * LINE, numbers = shared * (4 * size + 2 * SOME * AREA);
    struct room room = { aligned_alloc(64, floats * sizeof(float) + numbers * sizeof(NUMBER)) };
    room.itself = room.of_keys;
    room.of_values = room.of_keys + STRIPE * size;
    room.of_queries = room.of_values + STRIPE * size;
    room.log_sums = room.of_queries + shared * size;
    room.along = room.log_sums + shared * LINE;
    room.queries = (NUMBER *)(room.along + shared * LINE);
    room.slopes = room.queries + shared * size;
    room.query_rows = room.slopes + shared * size;
    room.slope_rows = room.query_rows + shared * size;
    room.weights = room.slope_rows + shared * size;
    room.of_scores = room.weights + shared * SOME * AREA;
    return room;
}

/* The sum of out times its gradient, of each token of a block: what rounding took from out would be missed here. */
static void add_along(const struct flash *job, const struct block *block, int64_t head, float *along)
{
    for (int64_t t = 0; t < LINE; t += SIDE) {
        float parts[SIDE * SIDE] = {}, turned[SIDE * SIDE];
        for (int64_t i = 0; i < SIDE && t + i < block->count; i++) {
            int64_t at = ((block->token + t + i) * job->heads + head) * job->width;
            lanes part = {};
            for (int64_t e = at; e < at + job->width; e += LANES) {
                lanes out = load(job->out + e);
                if (job->rest) out += load(job->rest + e);
                part += out * load(job->gradient + e);
            }
            put(parts + i * SIDE, part);
        }
        turn_words((const word *)parts, SIDE, (word *)turned, SIDE);
        for (int64_t c = 0; c < SIDE; c += LANES) {
            lanes total = {};
            for (int i = 0; i < LANES; i++) total += get(turned + i * SIDE + c);
            put(along + t + c, total);
        }
    }
}

/* Makes ready the queries of a block, and the gradients of what they gave, of the heads of a group. */
static void fill(const struct flash *job, int64_t number, int64_t group, struct room *room)
{
    const struct block *block = job->table + number;
    int64_t wide = wide_of(job), shared = job->heads / job->groups;
    NUMBER rows[LINE * WIDEST] __attribute__((aligned(64)));
    for (int64_t r = 0; r < shared; r++) {
        int64_t head = group * shared + r, size = shared * LINE * SIDE;
        copy(job, block, job->q + head * job->width, job->q_stride, rows);
        pair_columns(rows, wide, room->queries + r * wide * LINE);
        pair_rows(rows, wide, room->query_rows + r * LINE * SIDE, size);
        copy(job, block, job->gradient + head * job->width, job->heads * job->width, rows);
        pair_columns(rows, wide, room->slopes + r * wide * LINE);
        pair_rows(rows, wide, room->slope_rows + r * LINE * SIDE, size);
        memcpy(room->log_sums + r * LINE, job->log_sums + (number * job->heads + head) * LINE, LINE * sizeof(float));
        add_along(job, block, head, room->along + r * LINE);
    }
}

/* Of so many keys the weights and, but for the scale, the gradients of scores, these in pairs of keys, too. */
static void differentiate(
    const float *scores, const float *slopes, int64_t rows, float scale, struct room *room, int64_t r, NUMBER *pairs)
{
    for (int64_t t = 0; t < LINE; t += LANES) {
        lanes log_sum = get(room->log_sums + r * LINE + t), along = get(room->along + r * LINE + t);
        NUMBER *weights = room->weights + r * SOME * AREA + t, *of_scores = room->of_scores + r * SOME * AREA + t;
        for (int64_t j = 0; j < rows; j += 2) {
            int64_t at = j * LINE + t;
            lanes first = power(get(scores + at) * scale - log_sum);
            lanes second = power(get(scores + at + LINE) * scale - log_sum);
            put_both(weights + j * LINE, LINE, NULL, first, second);
            first *= get(slopes + at) - along, second *= get(slopes + at + LINE) - along;
            put_both(of_scores + j * LINE, LINE, pairs + panel_at(t, rows) + j * SIDE, first, second);
        }
    }
}

/* Adds what a block of queries and so many blocks of keys, of a stripe that begins at `first`, give to the gradients. */
static void add_gradients(const struct flash *job, struct room *room, float *of_queries, int64_t number,
                          const int64_t *blocks, int64_t count, int64_t first, int64_t group)
{
    int64_t wide = wide_of(job), rows = count * LINE, shared = job->heads / job->groups;
    float scores[SOME * AREA] __attribute__((aligned(64))), slopes[SOME * AREA] __attribute__((aligned(64)));
    NUMBER pairs[SOME * AREA] __attribute__((aligned(64)));
    const NUMBER *columns[SOME], *weights[shared], *of_scores[shared];
    for (int64_t r = 0; r < shared; r++) {
        for (int64_t b = 0; b < count; b++) {
            meet(job, held(job, job->keys, blocks[b], group), room->queries + r * wide * LINE, scores + b * AREA);
            meet(job, held(job, job->values, blocks[b], group), room->slopes + r * wide * LINE, slopes + b * AREA);
            hide(job, job->table + number, job->table + blocks[b], scores + b * AREA);
            columns[b] = held(job, job->columns, blocks[b], group);
        }
        differentiate(scores, slopes, rows, job->scale * 1.44269504f, room, r, pairs);
        struct factors with_keys = { columns, count, LINE, wide, pairs, LINE };
        multiply(job, with_keys, of_queries + r * wide * LINE, LINE, 0);
    }
    for (int64_t b = 0; b < count; b++) {
        int64_t at = (blocks[b] - first) * LINE * wide;
        for (int64_t r = 0; r < shared; r++) {
            weights[r] = room->weights + (r * SOME + b) * AREA;
            of_scores[r] = room->of_scores + (r * SOME + b) * AREA;
        }
        struct factors with_slopes = { weights, shared, LINE, LINE, room->slope_rows, wide };
        struct factors with_queries = { of_scores, shared, LINE, LINE, room->query_rows, wide };
        multiply(job, with_slopes, room->of_values + at, wide, 0);
        multiply(job, with_queries, room->of_keys + at, wide, 0);
    }
}

/* What a block of queries gives to the gradients of a stripe's keys and values, and gets from them. */
static void visit(const struct flash *job, struct room *room, const struct stripe *stripe, int64_t number, int64_t group,
                  float *of_queries)
{
    int64_t blocks[SOME], count = 0, last = stripe->last - 1 < number ? stripe->last - 1 : number;
    int64_t k = seen_from(job, number, stripe->first);
    if (k <= last) fill(job, number, group, room);
    while (k <= last) {
        blocks[count++] = k;
        k = seen_from(job, number, k + 1);
        if (count < SOME && k <= last) continue;
        add_gradients(job, room, of_queries, number, blocks, count, stripe->first, group);
        count = 0;
    }
}

/* Gradients of a stripe's keys or values. */
static void put_rows(
    const struct flash *job, const struct stripe *stripe, const float *sums, int64_t group, float scale, NUMBER *out)
{
    int64_t wide = wide_of(job), width = job->width;
    for (int64_t b = stripe->first; b < stripe->last; b++)
        for (int64_t t = 0; t < job->table[b].count; t++) {
            const float *from = sums + ((b - stripe->first) * LINE + t) * wide;
            NUMBER *to = out + ((job->table[b].token + t) * job->groups + group) * width;
            for (int64_t e = 0; e < width; e += LANES) store(to + e, get(from + e) * scale);
        }
}

/* Gradients of a stripe's keys and values. A block's queries add up theirs from stripe to stripe in order. */
static void differentiate_stripe(struct flash *job, const struct stripe *stripe, int64_t group, struct room *room)
{
    int64_t size = wide_of(job) * LINE, shared = job->heads / job->groups, head = group * shared;
    int64_t width = job->width, stride = job->heads * width;
    int alone = stripe->number == 0 && stripe->last == stripe->end;
    lanes factors[VECTORS];
    for (int v = 0; v < VECTORS; v++) factors[v] = all(job->scale);
    memset(room->of_keys, 0, 2 * STRIPE * size * sizeof(float));
    for (int64_t q = stripe->first; q < stripe->end; q++) {
        float *of_queries = alone ? room->of_queries : job->sums + (q * job->heads + head) * size;
        int64_t *turn = alone ? NULL : job->turns + q * job->groups + group;
        if (turn) wait_until(turn, stripe->number);
        if (stripe->number == 0) memset(of_queries, 0, shared * size * sizeof(float));
        visit(job, room, stripe, q, group, of_queries);
        for (int64_t r = 0; r < shared && q < stripe->last; r++)
            put_turned(job, job->table + q, of_queries + r * size, factors, job->of_q + (head + r) * width, NULL, stride);
        if (turn) __atomic_store_n(turn, stripe->number + 1, __ATOMIC_RELEASE);
    }
    put_rows(job, stripe, room->of_keys, group, job->scale, job->of_k);
    put_rows(job, stripe, room->of_values, group, 1, job->of_v);
}

/* A stripe waits for earlier ones of its document alone, which have been taken before it. */
void flash_gradient(struct flash *job)
{
    int64_t task;
    struct room room = make_room(job);
    if (job->tiled) shape_tiles();
    pack_all(job);
    while ((task = next(&job->taken)) < job->stripes * job->groups)
        differentiate_stripe(job, job->parts + task / job->groups, task % job->groups, &room);
    if (job->tiled) _tile_release();
    free(room.itself);
}
