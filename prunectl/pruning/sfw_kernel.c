/* The Frank-Wolfe step of many contiguous float32 tensors in about three passes over memory: see sfw_kernel.py.

   Exact like topk.py: magnitudes are ordered by their bits, ties go to the lowest index. Sums are double. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { SIGNS = 0, VALUES = 1 };                       /* vertices of the K-sparse polytope, of the k-support ball */
enum { GRADIENT = 0, FIXED = 1 };                     /* gamma = length |m| / |w - v|, gamma = length */
enum { BLOCK = 64, SAMPLE = 1 << 14 };

typedef struct {
    float *w, *m;
    const float *g;
    int64_t n, k;
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

/* m = average of m and g, scanned while in cache; the sum of m^2. */
static double average(Task *t, Found *f) {
    float *restrict m = t->m;
    const float *restrict g = t->g;
    const float weight = t->weight, low = value(t->low), high = value(t->high);
    double norm2 = 0;
    for (int64_t start = 0; start < t->n; start += BLOCK) {
        int64_t end = start + BLOCK < t->n ? start + BLOCK : t->n;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < end; i++) {
            float x = weight == 1.0f ? g[i] : m[i] + weight * (g[i] - m[i]);
            m[i] = x;
            sum += (double)x * x;
        }
        norm2 += sum;
        scan(m + start, end - start, low, high, f);
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
    double a = 0, b = 0, c = 0;
#pragma omp simd reduction(+ : a, b, c)
    for (int64_t i = from; i < to; i++) {
        float x = m[i], u = signs ? (float)((x > 0) - (x < 0)) : x;
        u = fabsf(x) >= threshold ? u : 0.0f;
        a += (double)w[i] * w[i];
        b += (double)w[i] * u;
        c += (double)u * u;
    }
    *ww += a, *wu += b, *uu += c;
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

static void step(Task *t, float *scratch, int64_t room) {
    Found found = {0, 0, room, scratch};
    int64_t surplus;
    double norm2 = average(t, &found), ww = 0, wu = 0, uu = 0;
    t->kth = kth_largest(t, &found, &surplus);
    int64_t cut = cut_after(t->m, t->n, t->kth, surplus);
    float at_least = value(t->kth), more = value(t->kth + 1);
    products(t, 0, cut, at_least, &ww, &wu, &uu);
    products(t, cut, t->n, more, &ww, &wu, &uu);
    float scale = (float)(t->vertex == SIGNS ? -t->radius : -t->radius / sqrt(uu));
    double distance2 = ww - 2.0 * scale * wu + (double)scale * scale * uu;
    t->gamma = norm2 > 0 && distance2 > 0 ? (t->rescale == GRADIENT ? t->length * sqrt(norm2 / distance2) : t->length) : 0;
    if (t->gamma == 0) return;
    float gamma = t->gamma < 1 ? (float)t->gamma : 1.0f;
    move(t, 0, cut, at_least, gamma, scale);
    move(t, cut, t->n, more, gamma, scale);
}

/* scratch: at least max(SAMPLE + SAMPLE / 2, largest n / 8) floats, `room` of them. */
void sfw_steps(Task *tasks, int64_t count, float *scratch, int64_t room) {
    for (int64_t i = 0; i < count; i++) step(&tasks[i], scratch, room);
}
