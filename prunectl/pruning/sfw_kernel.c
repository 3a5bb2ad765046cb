/* The Frank-Wolfe step of many contiguous float32 tensors in two or three passes over memory: see sfw_kernel.py.

   Exact like topk.py and nm.py: magnitudes are ordered by their bits, ties go to the lowest index. Sums are float within a
   stretch of the cache, double over the stretches. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { SIGNS = 0, VALUES = 1, PATTERN = 2 };          /* vertices of the K-sparse polytope, of the k-support, of the N:M ball */
enum { GRADIENT = 0, FIXED = 1 };                     /* gamma = length |m| / |w - v|, gamma = length */
enum { BLOCK = 64, STRETCH = 1024, SAMPLE = 1 << 14 };
static const double NEAR = 0.1;                       /* |w - v|^2 / |w|^2 */

typedef struct {
    float *w, *m;
    const float *g;
    int64_t n, keep;                                  /* a vertex keeps so many entries, with PATTERN of every group */
    int64_t group, stride;                            /* PATTERN: a group's entries, and how far apart they lie */
    int32_t vertex, rescale;
    float weight;                                     /* of g in the average */
    int32_t low, high;                                /* bits between which the k-th largest is expected */
    double radius, length;
    int32_t kth;                                      /* out: bits of the k-th largest magnitude */
    double gamma;                                     /* out: before clamping to 1 */
} Task;

typedef struct {
    int64_t above, inside, room;
    float *values;
} Found;

static inline int32_t magnitude(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

static inline float value(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Bits of the k-th largest magnitude of x[0..n), by its 11 + 10 + 10 leading bits; *surplus: equal entries beyond the k. */
static int32_t select_kth(const float *x, int64_t n, int64_t k, int64_t *surplus) {
    static const int shifts[3] = {20, 10, 0}, widths[3] = {11, 10, 10};
    int32_t prefix = 0;
    int64_t room = k, count[2048];
    for (int pass = 0; pass < 3; pass++) {
        int shift = shifts[pass], digits = 1 << widths[pass], digit;
        memset(count, 0, sizeof count);
        for (int64_t i = 0; i < n; i++) {
            int32_t bits = magnitude(x[i]);
            if (pass == 0 || bits >> shifts[pass - 1] == prefix >> shifts[pass - 1]) count[bits >> shift & (digits - 1)]++;
        }
        for (digit = digits - 1; count[digit] < room; digit--) room -= count[digit];
        prefix |= digit << shift;
        *surplus = count[digit] - room;
    }
    return prefix;
}

/* Counts magnitudes above `high` and collects those in [low, high], at most `room` of them. */
static inline void scan(const float *x, int64_t n, float low, float high, Found *f) {
    int32_t larger = 0, any = 0;
#pragma omp simd reduction(+ : larger) reduction(| : any)
    for (int64_t i = 0; i < n; i++) {
        float a = fabsf(x[i]);
        larger += a > high;
        any |= (a >= low) & (a <= high);
    }
    f->above += larger;
    if (!any) return;
    for (int64_t i = 0; i < n; i++) {
        float a = fabsf(x[i]);
        if (a >= low && a <= high) {
            if (f->inside < f->room) f->values[f->inside] = a;
            f->inside++;
        }
    }
}

static int holds_rank(const Found *f, int64_t k) {
    return f->above < k && k <= f->above + f->inside && f->inside <= f->room;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void average(const Task *t, int64_t from, int64_t to) {
    float *restrict m = t->m;
    const float *restrict g = t->g;
    const float weight = t->weight;
#pragma omp simd
    for (int64_t i = from; i < to; i++) m[i] = weight == 1.0f ? g[i] : m[i] + weight * (g[i] - m[i]);
}

/* m = average of m and g, scanned while in cache. */
static void average_and_scan(Task *t, Found *f) {
    const float low = value(t->low), high = value(t->high);
    for (int64_t start = 0; start < t->n; start += BLOCK) {
        int64_t end = least(start + BLOCK, t->n);
        average(t, start, end);
        scan(t->m + start, end - start, low, high, f);
    }
}

/* Bits of the k-th largest magnitude of m: in the given bracket, else in a sampled one, else among all. */
static int32_t kth_largest(const Task *t, Found *f, int64_t *surplus) {
    if (!holds_rank(f, t->keep) && t->n > 32 * SAMPLE) {
        int64_t stride = t->n / SAMPLE | 1, taken = 0, ignored;
        while (stride % 3 == 0 || stride % 5 == 0 || stride % 7 == 0) stride += 2; /* out of step with kernels and channels */
        for (int64_t i = 0; i < t->n && taken < f->room; i += stride) f->values[taken++] = t->m[i];
        double share = (double)t->keep / t->n, spread = 4 * sqrt(taken * share * (1 - share)) + 2;
        int64_t first = (int64_t)(taken * share - spread), last = (int64_t)(taken * share + spread);
        int32_t high = first < 1 ? 0x7f7fffff : select_kth(f->values, taken, first, &ignored);
        int32_t low = last > taken ? 0 : select_kth(f->values, taken, last, &ignored);
        f->above = f->inside = 0;
        for (int64_t start = 0; start < t->n; start += BLOCK)
            scan(t->m + start, least(BLOCK, t->n - start), value(low), value(high), f);
    }
    if (holds_rank(f, t->keep)) return select_kth(f->values, f->inside, t->keep - f->above, surplus);
    return select_kth(t->m, t->n, t->keep, surplus);
}

/* Index from which on entries equal to the k-th no longer count: the last `surplus` of them lie there. */
static int64_t cut_after(const float *m, int64_t n, int32_t kth, int64_t surplus) {
    while (surplus > 0) surplus -= magnitude(m[--n]) == kth;
    return n;
}

/* What is needed to say which entries a vertex keeps, and room for one stretch of it. */
typedef struct {
    int64_t size;                                     /* of a stretch; whole groups with PATTERN */
    int64_t cut;                                      /* where the threshold goes from `at_least` to `more` */
    float at_least, more;
    float *u, *a;                                     /* the vertex in units of its entries; magnitudes */
    int32_t *place, *beaten, *wins;                   /* an entry's place in its group; by how many of it it is beaten */
} Vertex;

static void keep_above(float *restrict u, const float *restrict m, int64_t n, float threshold, int signs) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float x = m[i], kept = signs ? (float)((x > 0) - (x < 0)) : x;
        u[i] = fabsf(x) >= threshold ? kept : 0.0f;
    }
}

/* Two channels d apart are d strides apart in memory, so shifted comparisons meet every pair of every group. */
static void largest_of_groups(const Task *t, const Vertex *v, const float *restrict m, int64_t n) {
    float *restrict a = v->a, *restrict u = v->u;
    int32_t *restrict beaten = v->beaten, *restrict wins = v->wins;
    const int32_t *restrict place = v->place;
    const int32_t keep = (int32_t)t->keep;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) a[i] = fabsf(m[i]), beaten[i] = 0;
    for (int32_t d = 1; d < t->group; d++) {
        const int64_t shift = d * t->stride, pairs = n - shift;
        const int32_t last = (int32_t)t->group - d;
#pragma omp simd
        for (int64_t i = 0; i < pairs; i++) {
            int32_t win = (a[i] >= a[i + shift]) & (place[i] < last);
            wins[i] = win;
            beaten[i] += (place[i] < last) - win;
        }
#pragma omp simd
        for (int64_t i = 0; i < pairs; i++) beaten[i + shift] += wins[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) u[i] = beaten[i] < keep ? m[i] : 0.0f;
}

/* v->u for the stretch that begins at `start`; its length. Worked out twice, which is cheaper than keeping it in memory. */
static int64_t stretch_of(const Task *t, const Vertex *v, int64_t start) {
    const float *m = t->m + start;
    const int64_t n = least(v->size, t->n - start);
    if (t->vertex == PATTERN) {
        if (t->keep < t->group) largest_of_groups(t, v, m, n);
        else memcpy(v->u, m, n * sizeof *m);
        return n;
    }
    const int64_t before = v->cut < start ? 0 : least(v->cut - start, n);
    keep_above(v->u, m, before, v->at_least, t->vertex == SIGNS);
    keep_above(v->u + before, m + before, n - before, v->more, t->vertex == SIGNS);
    return n;
}

typedef struct {
    double mm, ww, wu, uu;                            /* |m|^2, |w|^2, <w, u>, |u|^2 */
} Sums;

static void add(Sums *s, const float *restrict m, const float *restrict w, const float *restrict u, int64_t n) {
    float mm = 0, ww = 0, wu = 0, uu = 0;
#pragma omp simd reduction(+ : mm, ww, wu, uu)
    for (int64_t i = 0; i < n; i++) {
        mm += m[i] * m[i];
        ww += w[i] * w[i];
        wu += w[i] * u[i];
        uu += u[i] * u[i];
    }
    s->mm += mm, s->ww += ww, s->wu += wu, s->uu += uu;
}

static double scale_of(const Task *t, double uu) { return t->vertex == SIGNS ? -t->radius : -t->radius / sqrt(uu); }

/* |m|^2, |u|^2 and |w - v|^2 once more in double, entry by entry: for squares beyond float's range, and for w so near v that
   rounding of the sums would show. */
static double careful(const Task *t, const Vertex *v, Sums *s) {
    double distance2 = 0;
    s->mm = s->uu = 0;
    for (int64_t start = 0, n; start < t->n; start += n) {
        n = stretch_of(t, v, start);
        for (int64_t i = 0; i < n; i++) s->mm += (double)t->m[start + i] * t->m[start + i], s->uu += (double)v->u[i] * v->u[i];
    }
    const float scale = (float)scale_of(t, s->uu);
    for (int64_t start = 0, n; start < t->n; start += n) {
        n = stretch_of(t, v, start);
        for (int64_t i = 0; i < n; i++) {
            double gap = (double)t->w[start + i] - scale * v->u[i];
            distance2 += gap * gap;
        }
    }
    return distance2;
}

static int in_range(double square) { return square > 1e-30 && square < 1e38; }

static void step(Task *t, float *scratch, int64_t room) {
    const int pattern = t->vertex == PATTERN;
    const int64_t whole = pattern ? t->group * t->stride : 1, size = whole < STRETCH ? STRETCH / whole * whole : whole;
    int32_t *counts = (int32_t *)(scratch + 2 * size);
    Vertex v = {size, t->n, 0, 0, scratch, scratch + size, counts, counts + size, counts + 2 * size};
    if (pattern) {
        for (int64_t i = 0; i < least(size, t->n); i++) v.place[i] = (int32_t)(i / t->stride % t->group);
    } else {
        Found found = {0, 0, room, scratch};
        int64_t surplus;
        average_and_scan(t, &found);
        t->kth = kth_largest(t, &found, &surplus);
        v.cut = cut_after(t->m, t->n, t->kth, surplus);
        v.at_least = value(t->kth), v.more = value(t->kth + 1);
    }
    Sums s = {0, 0, 0, 0};
    for (int64_t start = 0, n; start < t->n; start += n) {
        if (pattern) average(t, start, least(start + size, t->n));
        n = stretch_of(t, &v, start);
        add(&s, t->m + start, t->w + start, v.u, n);
    }
    double scale = scale_of(t, s.uu), distance2 = s.ww - 2 * scale * s.wu + scale * scale * s.uu;
    if (!in_range(s.mm) || !in_range(s.uu) || !(distance2 >= NEAR * s.ww)) {
        distance2 = careful(t, &v, &s);
        scale = scale_of(t, s.uu);
    }
    t->gamma = 0;
    if (!(s.mm > 0 && s.uu > 0 && distance2 > 0 && isfinite((float)scale))) return;
    t->gamma = t->rescale == GRADIENT ? t->length * sqrt(s.mm / distance2) : t->length;
    const float gamma = t->gamma < 1 ? (float)t->gamma : 1.0f, c = (float)scale;
    for (int64_t start = 0, n; start < t->n; start += n) {
        n = stretch_of(t, &v, start);
        float *restrict w = t->w + start;
        const float *restrict u = v.u;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float end = c * u[i];
            w[i] = gamma < 0.5f ? w[i] + gamma * (end - w[i]) : end - (1 - gamma) * (end - w[i]); /* never past the vertex */
        }
    }
}

/* Each tensor whole by one thread, so that results do not depend on their number; largest first balances best. The threads are
   OpenMP's, torch's own where torch uses the same library: other threads would share the cores with torch's, which spin for a while
   after their last task. scratch: for each thread `room` floats, as many as sfw_kernel.py says. */
void sfw_steps(Task *tasks, int64_t count, float *scratch, int64_t room, int32_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; i++) step(&tasks[i], scratch + omp_get_thread_num() * room, room);
}
