/* The Frank-Wolfe step of many contiguous float32 tensors in about three passes over memory: see sfw_kernel.py.

   Exact like topk.py and nm.py: magnitudes are ordered by their bits, ties go to the lowest index. Sums are float within a
   stretch of the cache, double over the stretches. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

enum { SIGNS = 0, VALUES = 1, PATTERN = 2 };          /* vertices of the K-sparse polytope, of the k-support, of the N:M ball */
enum { GRADIENT = 0, FIXED = 1 };                     /* gamma = length |m| / |w - v|, gamma = length */
enum { BLOCK = 64, STRETCH = 1024, SAMPLE = 1 << 14 };

typedef struct {
    float *w, *m;
    const float *g;
    int64_t n, k;                                     /* k: also how many of a group of `group` entries, `stride` apart, stay */
    int64_t group, stride;
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

static double squares(const float *x, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

static void average(const Task *t, int64_t from, int64_t to) {
    float *restrict m = t->m;
    const float *restrict g = t->g;
    const float weight = t->weight;
#pragma omp simd
    for (int64_t i = from; i < to; i++) m[i] = weight == 1.0f ? g[i] : m[i] + weight * (g[i] - m[i]);
}

/* m = average of m and g, scanned while in cache; the sum of m^2. */
static double average_and_scan(Task *t, Found *f) {
    const float low = value(t->low), high = value(t->high);
    double norm2 = 0;
    for (int64_t start = 0; start < t->n; start += STRETCH) {
        int64_t end = least(start + STRETCH, t->n);
        average(t, start, end);
        norm2 += squares(t->m + start, end - start);
        for (int64_t i = start; i < end; i += BLOCK) scan(t->m + i, least(BLOCK, end - i), low, high, f);
    }
    return norm2;
}

/* Bits of the k-th largest magnitude of m: in the given bracket, else in a sampled one, else among all. */
static int32_t kth_largest(const Task *t, Found *f, int64_t *surplus) {
    if (!holds_rank(f, t->k) && t->n > 32 * SAMPLE) {
        int64_t stride = t->n / SAMPLE | 1, taken = 0, ignored;
        while (stride % 3 == 0 || stride % 5 == 0 || stride % 7 == 0) stride += 2; /* out of step with kernels and channels */
        for (int64_t i = 0; i < t->n && taken < f->room; i += stride) f->values[taken++] = t->m[i];
        double share = (double)t->k / t->n, spread = 4 * sqrt(taken * share * (1 - share)) + 2;
        int64_t first = (int64_t)(taken * share - spread), last = (int64_t)(taken * share + spread);
        int32_t high = first < 1 ? 0x7f7fffff : select_kth(f->values, taken, first, &ignored);
        int32_t low = last > taken ? 0 : select_kth(f->values, taken, last, &ignored);
        f->above = f->inside = 0;
        for (int64_t start = 0; start < t->n; start += BLOCK)
            scan(t->m + start, start + BLOCK < t->n ? BLOCK : t->n - start, value(low), value(high), f);
    }
    if (holds_rank(f, t->k)) return select_kth(f->values, f->inside, t->k - f->above, surplus);
    return select_kth(t->m, t->n, t->k, surplus);
}

/* Index from which on entries equal to the k-th no longer count: the last `surplus` of them lie there. */
static int64_t cut_after(const float *m, int64_t n, int32_t kth, int64_t surplus) {
    while (surplus > 0) surplus -= magnitude(m[--n]) == kth;
    return n;
}

/* Over [from, to), entries with |m| >= threshold: sums of w^2, of w u and of u^2, u = sign(m) or m there and 0 elsewhere. */
static void products(const Task *t, int64_t from, int64_t to, float threshold, double *ww, double *wu, double *uu) {
    const float *restrict w = t->w, *restrict m = t->m;
    const int signs = t->vertex == SIGNS;
    for (int64_t start = from; start < to; start += STRETCH) {
        int64_t end = least(start + STRETCH, to);
        float a = 0, b = 0, c = 0;
#pragma omp simd reduction(+ : a, b, c)
        for (int64_t i = start; i < end; i++) {
            float x = m[i], u = signs ? (float)((x > 0) - (x < 0)) : x;
            u = fabsf(x) >= threshold ? u : 0.0f;
            a += w[i] * w[i];
            b += w[i] * u;
            c += u * u;
        }
        *ww += a, *wu += b, *uu += c;
    }
}

static void move(const Task *t, int64_t from, int64_t to, float threshold, float gamma, float scale) {
    float *restrict w = t->w;
    const float *restrict m = t->m;
    const int signs = t->vertex == SIGNS;
#pragma omp simd
    for (int64_t i = from; i < to; i++) {
        float x = m[i], u = signs ? (float)((x > 0) - (x < 0)) : x;
        float v = fabsf(x) >= threshold ? scale * u : 0.0f;
        w[i] = gamma < 0.5f ? w[i] + gamma * (v - w[i]) : v - (1 - gamma) * (v - w[i]); /* never past v */
    }
}

/* gamma before clamping, and the vertex's entries in units of u, from |m|^2, |w|^2, <w, u> and |u|^2. The sums are good to about
   1e-7 of |w|^2, so that gamma is good to 1e-4 even where w is within a thirtieth of its length of the vertex. */
static float aim(Task *t, double norm2, double ww, double wu, double uu) {
    float scale = (float)(t->vertex == SIGNS ? -t->radius : -t->radius / sqrt(uu));
    double distance2 = ww - 2.0 * scale * wu + (double)scale * scale * uu;
    t->gamma = norm2 > 0 && distance2 > 0 ? (t->rescale == GRADIENT ? t->length * sqrt(norm2 / distance2) : t->length) : 0;
    return scale;
}

static void step_to_largest(Task *t, float *scratch, int64_t room) {
    Found found = {0, 0, room, scratch};
    int64_t surplus;
    double norm2 = average_and_scan(t, &found), ww = 0, wu = 0, uu = 0;
    t->kth = kth_largest(t, &found, &surplus);
    int64_t cut = cut_after(t->m, t->n, t->kth, surplus);
    float at_least = value(t->kth), more = value(t->kth + 1);
    products(t, 0, cut, at_least, &ww, &wu, &uu);
    products(t, cut, t->n, more, &ww, &wu, &uu);
    float scale = aim(t, norm2, ww, wu, uu);
    if (t->gamma == 0) return;
    float gamma = t->gamma < 1 ? (float)t->gamma : 1.0f;
    move(t, 0, cut, at_least, gamma, scale);
    move(t, cut, t->n, more, gamma, scale);
}

typedef struct {
    float *a;                                         /* magnitudes of a stretch of whole groups */
    int32_t *place, *beaten, *wins;                   /* an entry's place in its group; by how many of the group it is beaten */
} Groups;

/* beaten[i] of the n entries at x; two channels d apart are d strides apart, so shifted comparisons meet every pair. */
static void count_beaten(const Task *t, const Groups *s, const float *restrict x, int64_t n) {
    float *restrict a = s->a;
    int32_t *restrict beaten = s->beaten, *restrict wins = s->wins;
    const int32_t *restrict place = s->place;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) a[i] = fabsf(x[i]), beaten[i] = 0;
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
}

/* The masks are worked out twice: twice the arithmetic is cheaper than keeping them in memory. */
static void step_to_pattern(Task *t, float *scratch) {
    const int64_t whole = t->group * t->stride, size = whole < STRETCH ? STRETCH / whole * whole : whole;
    const int32_t k = (int32_t)t->k;
    int32_t *more = (int32_t *)(scratch + size);
    Groups s = {scratch, more, more + size, more + 2 * size};
    double norm2 = 0, ww = 0, wu = 0, uu = 0;
    for (int64_t i = 0; i < size; i++) s.place[i] = (int32_t)(i / t->stride % t->group);
    for (int64_t start = 0; start < t->n; start += size) {
        const int64_t n = least(size, t->n - start);
        average(t, start, start + n);
        const float *restrict m = t->m + start, *restrict w = t->w + start;
        count_beaten(t, &s, m, n);
        float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
        for (int64_t i = 0; i < n; i++) {
            float u = s.beaten[i] < k ? m[i] : 0.0f;
            a += m[i] * m[i];
            b += w[i] * w[i];
            c += w[i] * u;
            d += u * u;
        }
        norm2 += a, ww += b, wu += c, uu += d;
    }
    float scale = aim(t, norm2, ww, wu, uu), gamma = t->gamma < 1 ? (float)t->gamma : 1.0f;
    if (t->gamma == 0) return;
    for (int64_t start = 0; start < t->n; start += size) {
        const int64_t n = least(size, t->n - start);
        const float *restrict m = t->m + start;
        float *restrict w = t->w + start;
        count_beaten(t, &s, m, n);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float v = s.beaten[i] < k ? scale * m[i] : 0.0f;
            w[i] = gamma < 0.5f ? w[i] + gamma * (v - w[i]) : v - (1 - gamma) * (v - w[i]);
        }
    }
}

/* Each tensor whole by one thread, so that results do not depend on their number; largest first balances best. The threads are
   OpenMP's, torch's own: threads of ours would share the cores with torch's, which spin for a while after their last task.
   scratch: for each thread `room` floats, at least max(SAMPLE + SAMPLE / 2, largest n / 8), and 4 max(STRETCH, group stride). */
void sfw_steps(Task *tasks, int64_t count, float *scratch, int64_t room, int32_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float *own = scratch + omp_get_thread_num() * room;
        if (tasks[i].vertex == PATTERN) step_to_pattern(&tasks[i], own);
        else step_to_largest(&tasks[i], own, room);
    }
}
